"""Masked language modelling: an encoder reads texts of a field, and learns to fill in words that it does not see.

One row of MedQuAD, for `text: answer`:

    {"answer": "Signs and symptoms of adult ALL include fever, feeling tired, and easy bruising or bleeding. …"}

Whole words are chosen, 15 of 100; of their tokens 80 in 100 are shown as the mask, 10 as a random token and 10 as they
are (Devlin et al. 2019). Which ones follows from the row alone in evaluation, and from (seed, epoch, row) in training.
A text that is longer than `max_length` gives several features.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayft.errors import ModelError
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_tokenizer, padded
from rayft.tasks.logits import logits_of
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task, check_text

IGNORED = -100  # the label of tokens that are not asked for
SHOWN_AS_MASK, SHOWN_AS_ANOTHER = 0.8, 0.9  # a draw below the first shows the mask, below the second a random token
SEEN = 1.0  # the draw of a token that is shown as it is


class MaskedLM(Task):
    """An encoder fills in words of a text that it does not see."""

    lower_is_better: ClassVar[frozenset[str]] = Task.lower_is_better | {"pseudo_perplexity"}
    first_metric: ClassVar[str] = "pseudo_perplexity"

    type: Literal["masked-lm"] = "masked-lm"
    """Which words are missing in a text: an encoder reads the texts of a field."""
    text: str = "text"
    """The column of the texts."""
    max_length: int = Field(default=128, ge=8)
    """Tokens that are read at a time; a longer text gives several features."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """The share of a text's words that is asked for, one at least; without `whole_words`, of its tokens."""
    whole_words: bool = True
    """Whether all tokens of a word are asked for together; false: single tokens are chosen."""

    @property
    def varies(self) -> bool:
        return True

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.text,)

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; ModelError where it has no mask token."""
        tokenizer = load_tokenizer(model, self.max_length, offsets_for="masking whole words")
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"the tokenizer of {model.path} has no mask token; masked-lm needs an encoder such as BERT"
            )
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`words` is each token's word, -1 for special tokens; `masked` the tokens that are asked for, ascending, and
        `draws` in [0, 1] what each of them is shown as."""
        integers = ("input_ids", "words", "masked")
        return pa.schema([*((name, pa.list_(pa.int32())) for name in integers), ("draws", pa.list_(pa.float32()))])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """References are None, since the tokens are the truth. labelled=False asks for a text's mask tokens alone."""
        encoded = Encoded(
            {name: [] for name in self.arrow_schema(evaluation).names}, [], [], [] if evaluation else None
        )
        texts: dict[int, str] = {}
        for row, text in enumerate(rows[self.text]):
            try:
                check_text(self.text, text)
                texts[row] = text
            except ValueError as fault:
                encoded.bad[row] = str(fault)
        if not texts:
            return encoded
        options = {
            "truncation": True,
            "max_length": self.max_length,
            "return_overflowing_tokens": True,
            "verbose": False,
        }
        made = processor(list(texts.values()), return_attention_mask=False, return_token_type_ids=False, **options)
        given, mask = list(texts), processor.mask_token_id  # which takes a property of transformers long to tell
        for window, place in enumerate(made["overflow_to_sample_mapping"]):
            row, ids = given[place], list(made["input_ids"][window])
            words = [-1 if word is None else word for word in made.word_ids(window)]
            if not self.whole_words:
                words = [-1 if word < 0 else token for token, word in enumerate(words)]
            if max(words) < 0:
                continue
            if labelled:
                masked, draws = drawn(words, self.mask_share, _generator(ids))
            else:
                masked = [token for token, number in enumerate(ids) if number == mask]
                draws = [SEEN] * len(masked)
            feature = {"input_ids": ids, "words": words, "masked": masked, "draws": draws}
            for name, values in encoded.features.items():
                values.append(feature[name])
            encoded.rows.append(row)
            encoded.lengths.append(len(ids))
            if encoded.references is not None:
                encoded.references.append(None)
        for row in set(given) - set(encoded.rows):
            encoded.bad[row] = f"`{self.text}` holds nothing that the tokenizer reads; it needs text"
        return encoded

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        return from_pretrained(transformers.AutoModelForMaskedLM, model, pad_token_id=processor.pad_token_id)

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        """Other words are asked for."""
        masked, draws = drawn(features["words"][0], self.mask_share, rng)
        return {**features, "masked": [masked], "draws": [draws]}

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded on the right to the longest of n features, l tokens.

        input_ids, attention_mask   (n, l) int64, the tokens as they are shown
        labels                      (n, l) int64, those that are asked for; else IGNORED
        """
        batch = padded({"input_ids": features["input_ids"]}, processor)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (places, draws) in enumerate(zip(features["masked"], features["draws"], strict=True)):
            asked = torch.as_tensor(np.asarray(places, np.int64))
            draw = torch.as_tensor(np.asarray(draws, np.float32))
            true = batch["input_ids"][row, asked]
            share = (draw - SHOWN_AS_MASK) / (SHOWN_AS_ANOTHER - SHOWN_AS_MASK)
            other = (share.clamp(0, 1) * len(processor)).long().clamp(max=len(processor) - 1)
            shown = torch.where(draw < SHOWN_AS_ANOTHER, other, true)
            labels[row, asked] = true
            batch["input_ids"][row, asked] = shown.masked_fill(draw < SHOWN_AS_MASK, processor.mask_token_id)
        return {**batch, "labels": labels}

    def items(self, batch: Batch) -> int:
        """Tokens that are asked for."""
        return int((batch["labels"] != IGNORED).sum())

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """(tokens that are asked for, vocabulary) logits: for the others none are computed, which are most."""
        asked = batch["labels"] != IGNORED
        return logits_of(model, asked, {name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy summed over the tokens that are asked for."""
        labels = batch["labels"][batch["labels"] != IGNORED]
        return torch.nn.functional.cross_entropy(
            outputs.float(), labels, reduction="sum", label_smoothing=label_smoothing
        )

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"tokens"}: the best at each place that is asked for; where the text tells the true ones, also {"nll",
        "right"}: over all their negative log-likelihood, and how many of the best are true."""
        asked = batch["labels"] != IGNORED
        counts = asked.sum(dim=1).tolist()
        logits, labels = outputs.detach().float().split(counts), batch["labels"][asked].split(counts)
        lost = [torch.nn.functional.cross_entropy(*row, reduction="sum") for row in zip(logits, labels, strict=True)]
        best = [row.argmax(dim=-1) for row in logits]
        # All rows' at once: each number that is read from a GPU is waited for.
        nll, tokens, truth = torch.stack(lost).tolist(), torch.cat(best).tolist(), torch.cat(labels).tolist()
        predictions, begin = [], 0
        for row, count in enumerate(counts):
            own, true = (values[begin : begin + count] for values in (tokens, truth))
            found: Prediction = {"tokens": processor.convert_ids_to_tokens(own)}
            if any(draw != SEEN for draw in features["draws"][row]):  # else the masks are the user's own
                found |= {"nll": nll[row], "right": sum(a == b for a, b in zip(own, true, strict=True))}
            predictions.append(found)
            begin += count
        return predictions

    def combine(self, parts: list[Prediction]) -> Prediction:
        """The same of all windows."""
        tokens = [token for part in parts for token in part["tokens"]]
        sums = (name for name in ("nll", "right") if name in parts[0])
        return {"tokens": tokens, **{name: sum(part[name] for part in parts) for name in sums}}

    def metrics(self) -> tuple[str, ...]:
        return ("pseudo_perplexity", "accuracy")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """pseudo_perplexity and accuracy, over all tokens that were asked for.

        The first is exp of their mean negative log-likelihood (Salazar et al. 2020, who ask for one at a time), the
        second the share that was guessed.
        """
        count = sum(len(prediction["tokens"]) for prediction in predictions)
        nll = sum(prediction["nll"] for prediction in predictions)
        right = sum(prediction["right"] for prediction in predictions)
        return {"pseudo_perplexity": math.exp(min(nll / count, 700.0)), "accuracy": right / count}

    def pipeline(self) -> str | None:
        return "fill-mask"


def drawn(words: list[int], share: float, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """The tokens of a share of the words, ascending, and for each a number in [0, 1) that says what it is shown as."""
    numbers = np.asarray(words)
    there = np.unique(numbers[numbers >= 0])
    chosen = rng.choice(there, max(1, round(share * len(there))), replace=False)
    taken = np.zeros(there[-1] + 2, bool)  # the last is that of -1
    taken[chosen] = True
    places = np.flatnonzero(taken[numbers])
    return places.tolist(), rng.random(len(places), np.float32).tolist()


def _generator(ids: list[int]) -> np.random.Generator:
    """Random numbers that follow from these tokens."""
    digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
