"""The contract between rayft and a task: everything particular to one kind of fine-tuning is behind these methods.

A task is a frozen pydantic model. Its fields are the recipe's `task:` section. Nothing outside this package knows a
task by name, so a new file here is a new task.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from rayft.tasks.cells import quoted
from rayft.tasks.stacked import Blocks, stacked_blocks

if TYPE_CHECKING:  # heavy and needed by the annotations alone
    import numpy as np
    import pyarrow as pa
    import torch

Columns = dict[str, list[Any]]  # column name -> one value per row
Batch = dict[str, Any]  # tensors by name, as `collate` makes them
Prediction = dict[str, Any]  # plain JSON-able values, or the bytes of a PNG


@dataclass(frozen=True)
class Pretrained:
    """Where a model comes from and how to load it.

    `path` is a local folder or a Hub id; `dropout` None keeps the config's.
    `dtype` is the dtype of the weights in memory ("float32", "bfloat16", "float16"). With `meta` the model is built
    without its weights, to count its parameters. `seed` draws parameters that the checkpoint lacks.

    `quantize` "4bit" keeps the weights of linear layers in 4 bits; "4bit, and back" gives them their width again, with
    the values that they had in 4 bits.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str | None = None
    quantize: Literal["4bit", "4bit, and back"] | None = None
    dropout: float | None = None
    trust_remote_code: bool = False
    seed: int = 0
    meta: bool = False


@dataclass(frozen=True)
class Encoded:
    """What `encode` made of a batch of rows. A row may give none, one or many features.

    features    columns of equal length, one entry per feature, of the Arrow types that `arrow_schema` says
    rows        for each feature, the index in the given batch of the row it came from, ascending
    lengths     for each feature, its size in tokens (or frames, ...): batches are sorted by it
    references  with evaluation=True, for each feature the JSON-able truth that `score` compares with; else None
    truncated   indices of rows that were cut to fit
    dropped     index -> reason, for rows that rightly give no feature (nothing to learn from: "no answer tokens left")
    bad         index -> what is wrong with it and what would fit, for rows that break the contract ("label 'hamm' is
                not one of ham, spam"); the caller adds file and row number and raises or skips, as the recipe says
    """

    features: Columns
    rows: list[int]
    lengths: list[int]
    references: list[Any] | None = None
    truncated: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Task(BaseModel):
    """One kind of fine-tuning. Subclasses add `type: Literal["their-name"] = "their-name"` and fields.

    What each field does is said below it, and reaches the user by the recipe's schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    # Metric names whose smaller value is the better one; every other metric is better when larger.
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    # The metric that drives early stopping and sweeps unless the recipe names another: the first that `score` returns.
    first_metric: ClassVar[str] = "accuracy"
    # False if the rows of a batch pass through the model more than once: what frozen blocks give is then not stored.
    one_pass: ClassVar[bool] = True
    # False if the loss has no labels to smooth.
    smooths: ClassVar[bool] = True
    # True if of a row's tokens the head reads the first alone, in an encoder of the BERT kind.
    reads_first: ClassVar[bool] = False
    # What makes the scores of validation rows that are cut from train too good, as a sentence goes on; "": nothing.
    cut_flatters: ClassVar[str] = ""

    type: str
    """The name of the task: that of its file, with hyphens."""

    @property
    def varies(self) -> bool:
        """Whether `vary` does something."""
        return False

    def steady(self, depth: int) -> int:
        """How many of the first `depth` blocks see nothing of what `vary` changes: up to there, what frozen blocks give
        for a row may be stored. By default none, where rows vary."""
        return 0 if self.varies else depth

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        """Columns that every row needs; with labelled=False those needed for prediction only."""
        raise NotImplementedError

    def fact_columns(self) -> tuple[str, ...]:
        """Columns that `facts` looks at: the least, so that a scan of a large source stays cheap."""
        return ()

    def file_columns(self) -> tuple[str, ...]:
        """Columns whose cells may name files: what these hold is part of what the rows are."""
        return ()

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer, image processor or feature extractor saved with the model."""
        raise NotImplementedError

    def notes(self, processor: Any) -> list[str]:
        """What of the task's fields does nothing with the model that `processor` belongs to, as sentences."""
        return []

    def facts(self, rows: Iterable[Columns]) -> dict[str, Any]:
        """What has to be known from the training rows, as JSON-able values; `rows` are batches of `fact_columns`."""
        for _ in rows:
            pass
        return {}

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        """The Arrow types of the features that `encode` gives."""
        raise NotImplementedError

    def encode(
        self, rows: Columns, processor: Any, facts: dict[str, Any], *, evaluation: bool, labelled: bool = True
    ) -> Encoded:
        """Columns to features; pure.

        With evaluation=True features may carry more columns (offsets, texts) and references.
        labelled=False encodes rows for prediction, which have no truth.
        """
        raise NotImplementedError

    def check_references(self, references: Iterable[Any]) -> None:
        """DataError where the features of a split, one reference each, together lack what their scores need.

        By default nothing is needed, and no reference is read.
        """

    def balance_columns(self) -> tuple[str, ...]:
        """Columns of the features that `balance` looks at; none where there is nothing to balance."""
        return ()

    def balance(self, features: Columns, facts: dict[str, Any]) -> dict[str, int]:
        """How many of the features have which label, for those labels that occur."""
        return {}

    def limit(self) -> int | None:
        """The most that one feature holds, in the unit of its length; None where there is no limit."""
        return getattr(self, "max_length", None)

    def packs(self) -> int | None:
        """The capacity in tokens of a packed sequence, or None where features are not packed."""
        return None

    def coupled(self) -> int:
        """How many consecutive rows of a global batch know of each other in `loss`; 1: rows are independent.

        Whole groups of so many rows, of which the epoch's last may be smaller, go to one rank and into one micro-batch,
        one after the other. Evaluation knows no groups: `score` then gives `loss` too, over the whole set.
        """
        return 1

    def load(self, model: Pretrained, facts: dict[str, Any], processor: Any) -> torch.nn.Module:
        """The pretrained model with this task's head."""
        raise NotImplementedError

    def blocks(self, model: torch.nn.Module) -> Blocks:
        """What freezing depth counts: by default the largest outermost list of equal modules and all before it."""
        return stacked_blocks(model)

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        """What differs by epoch (masking, augmentation); `features` holds one feature, as {name: [value]}.

        It may change columns of `arrow_schema(False)` only, and those keep their types.
        """
        return features

    def collate(self, features: Columns, processor: Any, facts: dict[str, Any]) -> Batch:
        """Features to tensors; shapes and dtypes in the docstring of each task."""
        raise NotImplementedError

    def items(self, batch: Batch) -> int:
        """How many items (tokens, rows, frames) `loss` sums over, known before the forward pass."""
        raise NotImplementedError

    def padded(self, batch: Batch) -> int:
        """How many tokens (or frames, ...) are computed, padding too: the size of the first two-dimensional tensor."""
        return next((value.numel() for value in batch.values() if getattr(value, "ndim", 0) == 2), 0)

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """One forward pass; its outputs serve `loss` and `predict` both, so that evaluation needs no second pass."""
        raise NotImplementedError

    def loss(self, outputs: Any, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
        """The *sum* of the loss over the items, a scalar in float32."""
        raise NotImplementedError

    def predict(
        self, outputs: Any, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """Compact results, one per feature of the batch."""
        raise NotImplementedError

    def generate(
        self, model: torch.nn.Module, batch: Batch, features: Columns, processor: Any, facts: dict[str, Any]
    ) -> list[Prediction]:
        """What a user who asks for predictions gets, one per feature: by default `predict` after one forward pass."""
        return self.predict(self.forward(model, batch), batch, features, processor, facts)

    def asked(self, features: Columns) -> tuple[list[int], Columns]:
        """What evaluation lets the model `generate` for, beside its forward pass: places in `features`, and for each a
        feature as `encode` gives it with labelled=False. By default nothing. What is generated joins the prediction."""
        return [], {}

    def combine(self, parts: list[Prediction]) -> Prediction:
        """The result of one source row from those of its features, in their order."""
        return parts[0]

    def metrics(self) -> tuple[str, ...]:
        """The names of what `score` gives, in its order; where the rows lack what one is about, it may be left out."""
        raise NotImplementedError

    def score(self, predictions: list[Prediction], references: list[Any]) -> dict[str, float]:
        """Metrics over the whole set, one prediction and one reference per source row; the first metric leads."""
        raise NotImplementedError

    def pictures(self, predictions: list[Prediction], references: list[Any]) -> dict[str, bytes]:
        """What `score` is given, as pictures for the run's folder: name -> PNG; by default none."""
        return {}

    def pipeline(self) -> str | None:
        """The name of the `transformers.pipeline` that serves the exported folder, or None where there is none."""
        return None

    def usage(self) -> str:
        """How the exported folder is used where that takes more than its pipeline: Markdown for the model card."""
        return ""

    def export(self, folder: str, model: torch.nn.Module, processor: Any, facts: dict[str, Any]) -> None:
        """Writes what belongs in the model folder beyond weights, config and processor; by default nothing."""


def check_text(column: str, value: Any) -> None:
    """ValueError, whose sentence is for `Encoded.bad`, unless `value` is text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{column}` is {quoted(value)}; it needs text")
