"""Token classification: a tag for every word, such as where the names of people and places begin and end.

One row of WNUT 2017:

    {"tokens": ["Empire", "State", "Building", "=", "ESB", "."],
     "ner_tags": ["B-location", "I-location", "I-location", "O", "B-location", "O"]}

Tags that begin with B- and I- (or as IOB1, IOE and IOBES have it) mark entities, which are scored whole; any other tag,
say a part of speech, marks a run of words. A word's tag is learned and read at its first piece. Text in `tokens` or
`tags` is a list as JSON or Python writes one, or else what blanks separate; an array as NumPy writes one, ['a' 'b'], is
refused. A row that is longer than `max_length` is cut at a word into several features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayft.errors import DataError
from rayft.tasks.cells import in_brackets, list_in, quoted, side_by_side
from rayft.tasks.labels import NUMBER, LabelNames, fit_head, in_order, index_of, known_labels, label_name, shown
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config, load_tokenizer, pad, padded
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task
from rayft.tasks.token_classification.entities import entities, scores
from rayft.tasks.token_classification.windows import Window, cut

IGNORED = -100  # the label of pieces from which nothing is learned


class TokenClassification(Task):
    """A tag for every word; tags that mark entities are scored by whole entities."""

    first_metric: ClassVar[str] = "f1"

    type: Literal["token-classification"] = "token-classification"
    """Which tag each word has: names of people and places, parts of speech."""
    tokens: str = "tokens"
    """The column of the words: a list of them, or a text whose words are what blanks separate."""
    tags: str = "tags"
    """The column of the tags, one for each word."""
    labels: LabelNames | None = None
    """The tags in the order of their indices; null: those of the training rows, O first. They also name the tags of
    rows that hold numbers, from 0."""
    max_length: int = Field(default=128, ge=8)
    """Tokens that are read at a time; a longer row is cut at a word into several features."""

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        return (self.tokens, self.tags) if labelled else (self.tokens,)

    def fact_columns(self) -> tuple[str, ...]:
        return () if self.labels is not None else (self.tags,)

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; one that takes a word for another where a blank stands before it reads all with a blank."""
        tokenizer = load_tokenizer(model, self.max_length, offsets_for="token classification", words=True)
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """{"labels": the tags in the order of their indices: O, then by what they mark, B- before I-}."""
        if self.labels is not None:
            return {"labels": list(self.labels)}
        found: set[str] = set()
        unread = ""  # a bad row, which is told with its place where there are others
        for batch in rows:
            for value in batch[self.tags]:
                try:
                    found.update(name for name in map(label_name, self._tags(value)) if name)
                except ValueError as fault:
                    unread = str(fault)
        if len(found) < 2:
            only = f"only the tag {quoted(found.pop())}" if found else "no tags"
            poor = f"column `{self.tags}` of the training rows holds {only}; there is nothing to tell apart"
            raise DataError(unread or poor)
        if all(NUMBER.fullmatch(name) for name in found):  # with "0" for a name even O would mark entities
            numbers = f"numbers, {shown(in_order(found))}, which don't say what they mark"
            fits = "name the tags in the order of their numbers, from 0 on: task.labels=[O,B-PER,I-PER,...]"
            raise DataError(f"column `{self.tags}` of the training rows holds {numbers}; {fits}")
        if all("-" in name or name == "O" for name in found):
            return {"labels": sorted(found, key=lambda name: (name != "O", name.partition("-")[::-1]))}
        return {"labels": in_order(found)}

    def balance_columns(self) -> tuple[str, ...]:
        return ("label",)

    def balance(self, features: Columns, facts: dict[str, Any]) -> dict[str, int]:
        """Words by tag."""
        given = np.asarray([label for row in features["label"] for label in row], np.int64)
        counts = np.bincount(given[given != IGNORED], minlength=len(facts["labels"])).tolist()
        return {name: count for name, count in zip(facts["labels"], counts, strict=True) if count}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """`label` has an index for each piece, IGNORED for all but the first of a word, and is null without truth;
        `places` is where each word's first piece stands, -1 for a word of which the tokenizer reads nothing."""
        fields = [pa.field("input_ids", pa.list_(pa.int32())), pa.field("label", pa.list_(pa.int32()))]
        return pa.schema([*fields, pa.field("places", pa.list_(pa.int32()))] if evaluation else fields)

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row, or several where it is too long. References are a row's tags, a name for each word.

        Truncated are rows with a word whose pieces alone are too many.
        """
        names: list[str] = facts["labels"]
        index = {name: number for number, name in enumerate(names)}
        columns: Columns = {name: [] for name in self.arrow_schema(evaluation).names}
        encoded = Encoded(columns, [], [], [] if evaluation and labelled else None)
        texts: dict[int, list[str]] = {}
        truths: dict[int, list[int] | None] = {}
        for row, value in enumerate(rows[self.tokens]):
            try:
                words = self._words(value)
                truths[row] = self._truth(rows[self.tags][row], words, index) if labelled else None
                texts[row] = words
            except ValueError as fault:
                encoded.bad[row] = str(fault)
        for row, windows in zip(texts, cut(list(texts.values()), processor, self.max_length), strict=True):
            if not any(place >= 0 for window in windows for place in window.places):
                encoded.bad[row] = f"`{self.tokens}` holds nothing that the tokenizer reads; it needs words"
                continue
            truth = truths[row]
            for window in windows:
                feature = {"input_ids": window.ids, "label": _labels(window, truth), "places": window.places}
                for name, values in encoded.features.items():
                    values.append(feature[name])
                encoded.rows.append(row)
                encoded.lengths.append(len(window.ids))
                if encoded.references is not None and truth is not None:
                    encoded.references.append([names[label] for label in truth])
            if any(window.short for window in windows):
                encoded.truncated.append(row)
        return encoded

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """A head that was trained on the same tags is kept, in the facts' order; any other is drawn anew."""
        names: list[str] = facts["labels"]
        network = from_pretrained(
            transformers.AutoModelForTokenClassification,
            model,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            problem_type=None,
            pad_token_id=processor.pad_token_id,
        )
        fit_head(network, known_labels(load_config(model)), names, model.seed)
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Padded on the right to the longest of n features, l tokens.

        input_ids, attention_mask   (n, l) int64
        labels                      (n, l) int64, IGNORED where nothing is learned; absent where there is no truth
        """
        batch = padded(features, processor)
        if all(label is not None for label in features["label"]):
            batch["labels"] = pad(features["label"], IGNORED)
        return batch

    def items(self, batch: Batch) -> int:
        """Words."""
        return int((batch["labels"] != IGNORED).sum())

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy summed over words."""
        return torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            batch["labels"].flatten(),
            reduction="sum",
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"tags", "scores"}: of each word the most probable tag and its share; O, or the first, for a word unread."""
        names: list[str] = facts["labels"]
        unread = "O" if "O" in names else names[0]
        shares, indices = (found.tolist() for found in outputs.logits.detach().float().softmax(dim=-1).max(dim=-1))
        predictions = []
        for row, places in enumerate(features["places"]):
            own = [(names[indices[row][p]], shares[row][p]) if p >= 0 else (unread, 0.0) for p in places]
            predictions.append({"tags": [name for name, _ in own], "scores": [share for _, share in own]})
        return predictions

    def combine(self, parts: list[Prediction]) -> Prediction:
        """{"tags", "scores", "entities"} of the row; an entity is [what it is, first word, word after the last]."""
        tags = [tag for part in parts for tag in part["tags"]]
        found = [list(entity) for entity in entities(tags)]
        return {"tags": tags, "scores": [share for part in parts for share in part["scores"]], "entities": found}

    def metrics(self) -> tuple[str, ...]:
        return ("f1", "precision", "recall", "accuracy")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """f1, precision and recall of whole entities (over all of them), and accuracy of words; shares of 1."""
        return scores([prediction["tags"] for prediction in predictions], references)

    def pipeline(self) -> str | None:
        return "token-classification"

    def _words(self, value: Any) -> list[str]:
        """ValueError says what is wrong."""
        words = _words_in(value) if isinstance(value, str) else _entries(value)
        if words is None:
            raise ValueError(
                f"`{self.tokens}` is {quoted(value)}, which is no list; ['two', 'words'] or two words fits"
            )
        if not words:
            raise ValueError(f"`{self.tokens}` is {quoted(value)}; it needs a list of words, or text")
        for place, word in enumerate(words):
            if not isinstance(word, str):
                raise ValueError(f"`{self.tokens}`: word {place} is {quoted(word)}; it needs text")
        return words

    def _tags(self, value: Any) -> list[Any]:
        """What names the tags in a cell; ValueError where text in brackets is no list."""
        if not isinstance(value, str):
            return _entries(value)
        if not in_brackets(value):
            return value.split()
        held = list_in(value)
        if held is None:
            raise ValueError(f"`{self.tags}` is {quoted(value)}, which is no list; ['B-PER', 'O'] or B-PER O fits")
        return held

    def _truth(self, value: Any, words: list[str], index: dict[str, int]) -> list[int]:
        """The index of each word's tag; ValueError says what is wrong."""
        tags = self._tags(value)
        if len(tags) != len(words):
            raise ValueError(f"`{self.tags}` has {len(tags)} tags for {len(words)} words; it needs one for each")
        return [self._index(label_name(tag) or "", index) for tag in tags]

    def _index(self, name: str, index: dict[str, int]) -> int:
        """The index of a tag by its name, or by its number where `labels` names the numbers."""
        if self.labels is not None and name not in index and name.isdecimal() and int(name) < len(self.labels):
            return int(name)
        return index_of(name, index, "tag")


def _words_in(text: str) -> list[Any] | None:
    """The entries of a list that text is, or what blanks separate in other text; None for an array as NumPy writes one.

    Words stand in brackets too, as in [2024] or [Music]: a list without any text is none.
    """
    if not in_brackets(text):
        return text.split()
    if side_by_side(text):
        return None
    held = list_in(text)
    return text.split() if held is None or (held and not any(isinstance(word, str) for word in held)) else held


def _entries(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else []


def _labels(window: Window, truth: list[int] | None) -> list[int] | None:
    """The label of each piece of the window."""
    if truth is None:
        return None
    labels = [IGNORED] * len(window.ids)
    for word, place in enumerate(window.places, start=window.first):
        if place >= 0:
            labels[place] = truth[word]
    return labels
