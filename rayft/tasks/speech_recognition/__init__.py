"""Speech recognition: what is said in a sound, as text.

One row of the spoken digits:

    {"file_name": "/data/sounds/7_theo_12.flac", "text": "seven", "speaker": "theo", "accent": "neutral"}

Two kinds of model learn it. wav2vec2 and its kin give each frame a letter or a blank (CTC); where the model comes
without a tokenizer, its letters are those of the training texts, and one that only other texts have is an error of it
wherever it stands, unless it writes the letter in the other case: `case` mends that. Whisper writes the text, after the
tokens that name the `language` and say that it is to transcribe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from rayft.errors import DataError, ModelError
from rayft.tasks.drawing import draw_parameters
from rayft.tasks.generation import greedy
from rayft.tasks.later import torch, transformers
from rayft.tasks.listening import ignore_padding, inputs, listen
from rayft.tasks.loading import from_pretrained, load_config, pad
from rayft.tasks.sound import FRAME_S, Sound, Wanted, need, read_sound
from rayft.tasks.speech_recognition.letters import ctc_loss, frames_needed, read_off, spelled
from rayft.tasks.speech_recognition.processor import BETWEEN, Recogniser, load_recogniser
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task, check_text

IGNORED = -100  # the label of places that are not learnt


class SpeechRecognition(Task):
    """What is said in a sound. Texts are compared and learnt as they stand, blanks folded."""

    lower_is_better: ClassVar[frozenset[str]] = Task.lower_is_better | {"wer", "cer"}
    first_metric: ClassVar[str] = "wer"

    type: Literal["speech-recognition"] = "speech-recognition"
    """What is said in a sound, as text."""
    audio: str = "file_name"
    """The column of the sounds: a path, beside a metadata file or absolute, an URL, or a file's bytes."""
    text: str = "text"
    """The column of what is said."""
    case: Literal["keep", "lower", "upper"] = "keep"
    """Whether texts are learnt and compared as they are, in lower or in upper case."""
    language: str | None = None
    """The language that a model which writes (Whisper) is told; null: none. Null for those that give letters."""
    min_seconds: float = Field(default=0.1, ge=0.025)
    """Sounds that are shorter are left out."""
    max_seconds: float = Field(default=20.0, gt=0)
    """Sounds that last longer are left out, since their text can't be cut with them."""
    on_mismatch: Literal["convert", "refuse"] = "convert"
    """What is done with a sound of several channels, or of another rate than the model's; refuse: its row is bad."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens that a model which writes (Whisper) writes at most; rows with longer texts are left out."""

    @model_validator(mode="after")
    def _sensible(self) -> SpeechRecognition:
        if self.min_seconds >= self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds:g} is not below max_seconds {self.max_seconds:g}")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.audio, self.text) if labelled else (self.audio,)

    def file_columns(self) -> tuple[str, ...]:
        return (self.audio,)

    def fact_columns(self) -> tuple[str, ...]:
        return (self.text,)

    def limit(self) -> int:
        """In frames of `FRAME_S`."""
        return math.ceil(self.max_seconds / FRAME_S)

    def processor(self, model: Pretrained) -> Recogniser:
        need("soundfile", "jiwer")
        return load_recogniser(model, self.max_seconds, self.language)

    def notes(self, processor: Recogniser) -> list[str]:
        if processor.writes or self.max_new_tokens == type(self).model_fields["max_new_tokens"].default:
            return []
        return [f"task.max_new_tokens: {self.max_new_tokens} does nothing, the model gives each frame a letter"]

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"letters": those of the training texts, sorted}: the vocabulary where the model comes without one.

        The sign that stands between words is no letter: in a text it is spelled as a blank, as wav2vec2's own
        tokenizers do it.
        """
        letters: set[str] = set()
        for batch in rows:
            letters.update(*(self._folded(value) for value in batch[self.text] if isinstance(value, str)))
        letters -= {" ", BETWEEN}
        if not letters:
            raise DataError(f"column `{self.text}` of the training rows holds no text; speech-recognition learns it")
        return {"letters": sorted(letters)}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`samples` are int16, at the model's rate; `labels` letters or the tokens to write, null in rows without
        truth; `prompt` the tokens that a model writes on from, null where it gives letters."""
        tokens = pa.list_(pa.int32())
        return pa.schema([("samples", pa.binary()), ("labels", tokens), ("prompt", tokens)])

    def encode(
        self, rows: Columns, processor: Recogniser, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row; references are texts. Lengths are in frames of `FRAME_S`."""
        tokenizer, rate = processor.tokenizer(facts), processor.extractor.sampling_rate
        wanted = Wanted(self.audio, rate, self.max_seconds, self.on_mismatch == "convert")
        prompt = list(tokenizer.prefix_tokens) if processor.writes else None
        made = Encoded({"samples": [], "labels": [], "prompt": []}, [], [], [] if evaluation and labelled else None)
        for row, value in enumerate(rows[self.audio]):
            text, labels = None, None
            try:
                if labelled:
                    check_text(self.text, rows[self.text][row])
                    text = self._folded(rows[self.text][row])
                    labels = self._tokens(text, tokenizer, processor.writes, evaluation)
                sound = read_sound(value, wanted)
            except ValueError as fault:
                made.bad[row] = str(fault)
                continue
            reason = self._unfit(sound, labels, rate, None if prompt is None else processor.positions - len(prompt))
            if reason is not None:
                made.dropped[row] = reason
                continue
            feature = {"samples": sound.samples.tobytes(), "labels": labels, "prompt": prompt}
            for name, values in made.features.items():
                values.append(feature[name])
            made.rows.append(row)
            made.lengths.append(sound.frames(rate))
            if made.references is not None:
                made.references.append(text)
        return made

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Recogniser) -> torch.nn.Module:
        """A head for letters is kept where the model's own tokenizer gives it its meaning, else drawn anew."""
        config = load_config(model)
        if processor.writes:
            network: Any = from_pretrained(transformers.AutoModelForSpeechSeq2Seq, model)
            if self.language is not None and hasattr(network.generation_config, "lang_to_id"):
                network.generation_config.language = self.language
                network.generation_config.task = "transcribe"
            return network
        tokenizer = processor.tokenizer(facts)
        fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "ctc_zero_infinity": True}
        if processor.own is not None and (config.vocab_size or 0) > len(tokenizer):
            fields.pop("vocab_size")  # the head has room that no letter uses
        network = from_pretrained(transformers.AutoModelForCTC, model, **fields)
        ignore_padding(network)
        if not hasattr(network, "_get_feat_extract_output_lengths"):
            raise ModelError(f"{model.path} does not tell how many frames it makes of a sound; wav2vec2's kin does")
        if processor.own is None and not model.meta:
            head = [name for name, _ in network.named_parameters() if name.startswith("lm_head.")]
            drawn = draw_parameters(network, head, model.seed)
            network.rayft_drawn = tuple(sorted({*network.rayft_drawn, *drawn}))
        return network

    def collate(self, features: Columns, processor: Recogniser, facts: dict[str, Any]) -> Batch:
        """What `inputs` makes of n sounds, and

        labels              (n, l) int64, IGNORED where there is none; absent where the features have no truth
        decoder_input_ids   (n, l) int64, for models that write: what stands before each label; without truth the prompt
        """
        batch = inputs(processor.extractor, features["samples"])
        tokenizer = processor.tokenizer(facts)
        batch["blank"] = tokenizer.pad_token_id
        known = all(labels is not None for labels in features["labels"])
        if not processor.writes:
            return {**batch, "labels": pad(features["labels"], IGNORED)} if known else batch
        prompts = [list(ids) for ids in features["prompt"]]
        if not known:
            return {**batch, "decoder_input_ids": pad(prompts, tokenizer.pad_token_id)}
        pairs = [(prompt, list(labels)) for prompt, labels in zip(prompts, features["labels"], strict=True)]
        before = [[*prompt, *labels[:-1]] for prompt, labels in pairs]
        # The prompt is given, never learnt: what follows its last token is the first label.
        after = [[IGNORED] * (len(prompt) - 1) + labels for prompt, labels in pairs]
        return {**batch, "decoder_input_ids": pad(before, tokenizer.pad_token_id), "labels": pad(after, IGNORED)}

    def items(self, batch: Batch) -> int:
        """Letters, or tokens that are written."""
        return int((batch["labels"] >= 0).sum())

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Of a model that gives letters, `frames` (n,) beside the logits: how many of them are a row's."""
        outputs = listen(model, batch)
        if "decoder_input_ids" not in batch:
            outputs["frames"] = inner(model)._get_feat_extract_output_lengths(batch["attention_mask"].sum(dim=-1))
        return outputs

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """CTC summed over rows, or cross entropy summed over the tokens that are written."""
        if "frames" in outputs:
            return ctc_loss(outputs.logits, outputs["frames"], batch["labels"], batch["blank"], label_smoothing)
        logits, labels = outputs.logits.float().flatten(0, 1), batch["labels"].flatten()
        return torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
        )

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Recogniser, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"text"}: the best letters, read off the frames. Of a model that writes, each best token given the true ones
        before it, until what it writes by itself (`asked`) takes its place: that is too good a text."""
        logits, tokenizer = outputs.logits.detach(), processor.tokenizer(facts)
        if not processor.writes:
            return [{"text": text} for text in read_off(tokenizer, logits, outputs["frames"])]
        best = logits.argmax(dim=-1)
        kept = [ids[labels >= 0].tolist() for ids, labels in zip(best, batch["labels"], strict=True)]
        return [{"text": tokenizer.decode(ids, skip_special_tokens=True).strip()} for ids in kept]

    def asked(self, features: Columns) -> tuple[list[int], Columns]:
        """Every feature whose model writes."""
        places = [place for place, prompt in enumerate(features["prompt"]) if prompt is not None]
        chosen = {name: [features[name][place] for place in places] for name in ("samples", "prompt")}
        return places, {**chosen, "labels": [None] * len(places)}

    def generate(
        self, model: torch.nn.Module, batch: Batch, features: Columns, processor: Recogniser, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"text"}: the best letters, or what the model writes after the prompt, always the most likely token."""
        if not processor.writes:
            return super().generate(model, batch, features, processor, facts)
        tokenizer, network = processor.tokenizer(facts), inner(model)
        prompt = pad([list(ids) for ids in features["prompt"]], tokenizer.pad_token_id).to(
            batch["input_features"].device
        )
        room = processor.positions - prompt.shape[1]
        own = network.generation_config
        settings = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(self.max_new_tokens, room),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=int(prompt[0, 0]),
            suppress_tokens=getattr(own, "suppress_tokens", None),
            begin_suppress_tokens=getattr(own, "begin_suppress_tokens", None),
        )
        # Whisper's own `generate` finds its prompt by itself; this is the one below it, which takes ours.
        features_in = batch["input_features"].to(next(network.parameters()).dtype)
        with torch.no_grad(), greedy(network) as writer:
            written = transformers.GenerationMixin.generate(
                writer, features_in, decoder_input_ids=prompt, generation_config=settings
            )
        texts = tokenizer.batch_decode(written[:, prompt.shape[1] :], skip_special_tokens=True)
        return [{"text": text.strip()} for text in texts]

    def metrics(self) -> tuple[str, ...]:
        return ("wer", "cer")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """wer and cer: words and letters that have to be put in, taken out or replaced, over those of the true texts.

        Texts count as they stand: no punctuation is taken away.
        """
        import jiwer

        given = [prediction["text"] for prediction in predictions]
        return {"wer": float(jiwer.wer(references, given)), "cer": float(jiwer.cer(references, given))}

    def pipeline(self) -> str | None:
        return "automatic-speech-recognition"

    def export(self, folder: str, model: torch.nn.Module, processor: Recogniser, facts: dict[str, Any]) -> None:
        """The tokenizer, where it was made from the training texts."""
        if processor.own is None:
            processor.tokenizer(facts).save_pretrained(folder)

    def _folded(self, text: str) -> str:
        folded = " ".join(text.split())
        return {"keep": folded, "lower": folded.lower(), "upper": folded.upper()}[self.case]

    def _tokens(self, text: str, tokenizer: Any, writes: bool, evaluation: bool) -> list[int]:
        """Letters, or what is to be written after the prompt, its end included; ValueError says what is wrong."""
        if writes:
            return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        try:
            return spelled(tokenizer, text, evaluation)
        except ValueError as fault:
            raise ValueError(f"`{self.text}`: {fault}") from None

    def _unfit(self, sound: Sound, labels: list[int] | None, rate: int, room: int | None) -> str | None:
        """Why a row is left out, or None. `room` is how many tokens fit behind the prompt; None: letters are given."""
        if sound.seconds < self.min_seconds:
            return "shorter than task.min_seconds"
        if sound.seconds > self.max_seconds:
            return "longer than task.max_seconds"
        if labels is None:
            return None
        if room is None:
            more = frames_needed(labels) >= sound.frames(rate)  # the first convolutions give one less
            return "its text has more letters than its sound has frames" if more else None
        if len(labels) > self.max_new_tokens:
            return "its text has more tokens than task.max_new_tokens"
        return "its text has more tokens than the model has positions for" if len(labels) > room else None


def inner(model: Any) -> Any:
    """The transformers model (or its adapters' wrapper) within a training engine, or `model` itself."""
    return getattr(model, "module", model)
