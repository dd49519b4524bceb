"""What a speech recogniser reads and writes with: a feature extractor, and a tokenizer that may have to be made."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayft.errors import ModelError
from rayft.tasks.later import transformers
from rayft.tasks.listening import load_extractor
from rayft.tasks.loading import load_config, load_part
from rayft.tasks.task import Pretrained

# Models that give each frame a letter or a blank (CTC), and those that write the text (sequence to sequence).
LETTERS = frozenset(
    {"data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert"}
) | {"wav2vec2-conformer", "wavlm"}
WRITERS = frozenset({"whisper"})
BLANK, UNKNOWN, BETWEEN = "<pad>", "<unk>", "|"


@dataclass(frozen=True)
class Recogniser:
    """`own` is the model's tokenizer, None where the letters of the training texts make one; `writes` tells whether
    the model writes texts or gives each frame a letter. `positions` is how many tokens a model that writes has room
    for, the prompt's among them."""

    extractor: Any
    own: Any
    writes: bool
    positions: int = 0

    def tokenizer(self, facts: dict[str, Any]) -> Any:
        return self.own if self.own is not None else made_tokenizer(tuple(facts["letters"]))

    def save_pretrained(self, folder: str) -> None:
        self.extractor.save_pretrained(folder)
        if self.own is not None:
            self.own.save_pretrained(folder)


def load_recogniser(model: Pretrained, max_seconds: float, language: str | None) -> Recogniser:
    """ModelError where the model is of neither kind, or knows no `language`."""
    config = load_config(model)
    kind = config.model_type
    if kind not in LETTERS | WRITERS:
        raise ModelError(
            f"{model.path} ({kind}) is no speech model that speech-recognition trains; {', '.join(sorted(LETTERS))} "
            f"and {', '.join(WRITERS)} fit"
        )
    writes = kind in WRITERS
    extractor = load_extractor(model, max_seconds)
    tokenizer = _own_tokenizer(model)
    if writes and tokenizer is None:
        raise ModelError(f"model.path: `{model.path}` has no tokenizer; one with tokenizer.json fits")
    if language is not None and not writes:
        raise ModelError(f"task.language is {language!r}, but {model.path} ({kind}) writes letters of any; null fits")
    if writes and language is not None:
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe")
        except ValueError as fault:
            raise ModelError(f"task.language is {language!r}: {str(fault).splitlines()[0]}") from fault
    return Recogniser(extractor, tokenizer, writes, config.max_target_positions if writes else 0)


def _own_tokenizer(model: Pretrained) -> Any:
    """The model's tokenizer; None where its folder holds none."""
    if os.path.isdir(model.path):
        names = ("vocab.json", "tokenizer.json", "tokenizer_config.json")
        if not any(os.path.exists(os.path.join(model.path, name)) for name in names):
            return None
    tokenizer = load_part(transformers.AutoTokenizer, model, "tokenizer")
    # What transformers makes where there are no files knows special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


@lru_cache(maxsize=4)
def made_tokenizer(letters: Sequence[str]) -> Any:
    """A tokenizer of blank, unknown, the sign between words, and `letters`."""
    tokens = [BLANK, UNKNOWN, BETWEEN, *letters]
    with tempfile.TemporaryDirectory(prefix="rayft-letters-") as folder:
        path = os.path.join(folder, "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({token: number for number, token in enumerate(tokens)}, file, ensure_ascii=False)
        return transformers.Wav2Vec2CTCTokenizer(
            path,
            bos_token=None,
            eos_token=None,
            unk_token=UNKNOWN,
            pad_token=BLANK,
            word_delimiter_token=BETWEEN,
        )
