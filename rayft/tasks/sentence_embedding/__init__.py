"""Sentence embedding: texts that belong together become vectors that lie close, for search and comparison.

One row of MedQuAD, for `anchor: question` and `positive: answer`:

    {"question": "What causes Noonan syndrome ?", "answer": "Mutations in multiple genes can cause Noonan syndrome. …"}

The vector is the mean of the last layer's tokens, of length 1. Each anchor has to find its positive among all texts of
its group: the positives of `group_size` rows, and where `negative` names a column the hard negatives (in-batch
negatives: Henderson et al. 2017; MultipleNegativesRankingLoss of sentence-transformers, by cosine times `scale`).
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from rayft.errors import ModelError
from rayft.tasks.later import torch, transformers
from rayft.tasks.loading import from_pretrained, load_config, load_tokenizer, pad
from rayft.tasks.sentence_embedding.folder import write_modules
from rayft.tasks.sentence_embedding.ranking import ranking_loss, retrieval
from rayft.tasks.task import Batch, Columns, Encoded, Prediction, Pretrained, Task, check_text
from rayft.tasks.texts import tokenize

ROLES = ("anchor", "positive", "negative")
DIGITS = 6  # of a vector's numbers that are kept


class SentenceEmbedding(Task):
    """Vectors of texts: those that belong together lie close."""

    first_metric: ClassVar[str] = "mrr"
    one_pass: ClassVar[bool] = False

    type: Literal["sentence-embedding"] = "sentence-embedding"
    """Which vector a text has, for search and comparison."""
    anchor: str = "anchor"
    """The column of the texts that search, such as questions."""
    positive: str = "positive"
    """The column of the texts that are to be found, each by the anchor of its row."""
    negative: str | None = None
    """The column of texts that are not to be found, though they look like it; null: there are none."""
    group_size: int = Field(default=16, ge=2)
    """Rows among whose texts an anchor has to find its own.

    They stay together: `train.global_batch_size` is a multiple of it, and `train.micro_batch_size` no smaller.
    """
    scale: float = Field(default=20.0, gt=0)
    """What the cosine of two texts is multiplied by in the loss."""
    max_length: int = Field(default=128, ge=4)
    """Tokens of each text; what is longer is cut."""

    @model_validator(mode="after")
    def _different(self) -> SentenceEmbedding:
        named = self.columns()
        if len(set(named)) < len(named):
            raise ValueError(f"anchor, positive and negative need columns of their own, got {', '.join(named)}")
        return self

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        """For prediction the anchor's alone: its vector is what a user gets."""
        if not labelled:
            return (self.anchor,)
        return (self.anchor, self.positive) if self.negative is None else (self.anchor, self.positive, self.negative)

    def coupled(self) -> int:
        return self.group_size

    def limit(self) -> int:
        return self.max_length * len(self.columns())

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer; its `model_max_length` is the task's, so that a pipeline truncates at the same place.

        ModelError where the model has a decoder above its encoder: what AutoModel and a pipeline make of T5 asks for
        texts to decode, and the last layer of BART is its decoder's.
        """
        config = load_config(model)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{model.path} ({config.model_type}) has an encoder and a decoder; sentence-embedding needs an encoder"
                " alone, such as BERT or MPNet"
            )
        tokenizer = load_tokenizer(model, self.max_length)
        tokenizer.model_max_length = self.max_length
        return tokenizer

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """Tokens of each text, null where a row has no such one, and `keys` that tell equal texts, one for each."""
        texts = [pa.field(role, pa.list_(pa.int32())) for role in ROLES[: len(self.columns())]]
        return pa.schema([*texts, pa.field("keys", pa.list_(pa.int64()))])

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """One feature per row, whose length is that of its texts together; references are its keys."""
        columns = self.columns(labelled)
        bad: dict[int, str] = {}
        for row in range(len(rows[self.anchor])):
            try:
                for column in columns:
                    check_text(column, rows[column][row])
            except ValueError as fault:
                bad[row] = str(fault)
        usable = [row for row in range(len(rows[self.anchor])) if row not in bad]
        features: Columns = {name: [None] * len(usable) for name in self.arrow_schema(evaluation).names}
        features["keys"] = [[text_key(rows[column][row]) for column in columns] for row in usable]
        lengths = [0] * len(usable)
        truncated: set[int] = set()
        for role, column in zip(ROLES, columns, strict=False):
            tokens, cut = tokenize(processor, [[rows[column][row] for row in usable]], self.max_length)
            features[role] = tokens["input_ids"]
            lengths = [length + len(ids) for length, ids in zip(lengths, tokens["input_ids"], strict=True)]
            truncated.update(usable[place] for place in cut)
        references = list(features["keys"]) if evaluation and labelled else None
        return Encoded(features, usable, lengths, references, truncated=sorted(truncated), bad=bad)

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The encoder without the pooling layer that some have above it, from which nothing would learn."""
        network: Any = from_pretrained(transformers.AutoModel, model, pad_token_id=processor.pad_token_id)
        if getattr(network, "pooler", None) is not None:
            network.pooler = None
            kept = {name for name, _ in network.named_parameters()}
            network.rayft_drawn = tuple(name for name in getattr(network, "rayft_drawn", ()) if name in kept)
        return network

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """For each of anchor, positive and negative that there is, padded on the right to the longest, l tokens:

        <role>_ids, <role>_mask   (n, l) int64
        keys                      (n, number of texts) int64
        """
        batch: Batch = {}
        for role in ROLES[: len(features["keys"][0])]:
            batch[f"{role}_ids"] = pad(features[role], processor.pad_token_id)
            batch[f"{role}_mask"] = pad([np.ones(len(ids)) for ids in features[role]], 0)
        batch["keys"] = torch.as_tensor(np.asarray(features["keys"], np.int64))
        return batch

    def items(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["keys"])

    def padded(self, batch: Batch) -> int:
        return sum(value.numel() for name, value in batch.items() if name.endswith("_ids"))

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """{role: vectors of length 1, (n, width) float32}, by one pass for each role."""
        return {
            role: embed(model, batch[f"{role}_ids"], batch[f"{role}_mask"]) for role in ROLES if f"{role}_ids" in batch
        }

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy of each anchor's positive among the texts of its group, summed over rows.

        The groups are consecutive rows, the last may be smaller. Texts that are equal to the anchor or to a positive of
        an equal anchor are no negatives.
        """
        candidates = torch.cat([outputs[role] for role in ROLES[1:] if role in outputs])
        groups = torch.arange(len(batch["keys"]), device=candidates.device) // self.group_size
        logits = self.scale * outputs["anchor"] @ candidates.T
        return ranking_loss(logits, batch["keys"], groups, label_smoothing)

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """The vector of each of the row's texts, by its role."""
        vectors = {role: _listed(found) for role, found in outputs.items()}
        return [dict(zip(vectors, row, strict=True)) for row in zip(*vectors.values(), strict=True)]

    def generate(
        self, model: torch.nn.Module, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """{"embedding"}: the anchor's vector."""
        return [{"embedding": row} for row in _listed(embed(model, batch["anchor_ids"], batch["anchor_mask"]))]

    def metrics(self) -> tuple[str, ...]:
        return ("mrr", "accuracy_at_1", "recall_at_10", "loss")

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """How well each anchor finds its positive among all positives and negatives of the set.

        mrr           the mean of 1 / the positive's place
        accuracy_at_1, recall_at_10   the share that comes first, and among the first ten
        loss          as in training, in groups of rows that lie far apart

        Equal texts count once, and a positive need not come before others of an equal anchor.
        """
        keys = np.asarray(references, np.int64)
        vectors = {role: np.asarray([row[role] for row in predictions], np.float32) for role in predictions[0]}
        return {**retrieval(vectors, keys), "loss": self._mean_loss(vectors, keys)}

    def _mean_loss(self, vectors: dict[str, np.ndarray], keys: np.ndarray) -> float:
        count = max(1, len(keys) // self.group_size)
        total = 0.0
        for first in range(count):
            own = {role: torch.from_numpy(found[first::count]) for role, found in vectors.items()}
            candidates = torch.cat([own[role] for role in ROLES[1:] if role in own])
            group = torch.zeros(len(own["anchor"]), dtype=torch.int64)
            logits = self.scale * own["anchor"] @ candidates.T
            total += float(ranking_loss(logits, torch.from_numpy(keys[first::count]), group))
        return total / len(keys)

    def pipeline(self) -> str | None:
        """It gives the vectors of tokens, whose mean is a text's."""
        return "feature-extraction"

    def export(self, folder: str, model: torch.nn.Module, processor: Any, facts: dict[str, Any]) -> None:
        """What sentence-transformers reads: mean pooling, and vectors of length 1."""
        write_modules(folder, model.config.get_text_config().hidden_size, self.max_length)  # type: ignore[union-attr, operator]


def embed(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the last layer's tokens that are no padding, as (n, width) float32 of length 1."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def text_key(text: str) -> int:
    """A signed 64-bit number that texts share if they are equal, blanks around them aside."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "little", signed=True)


def _listed(vectors: torch.Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in vectors.detach().float().tolist()]
