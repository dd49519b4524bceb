"""The contract between rayft and a task: everything particular to one kind of fine-tuning is behind these methods.

A task is a frozen pydantic model. Its fields are the recipe's `task:` section. Nothing outside this package knows a
task by name, so a new file here is a new task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # heavy and needed by the annotations alone
    import numpy as np
    import pyarrow as pa
    import torch

Columns = dict[str, list[Any]]  # column name -> one value per row
Batch = dict[str, Any]  # tensors by name, as `collate` makes them
Prediction = dict[str, Any]  # plain JSON-able values


@dataclass(frozen=True)
class Pretrained:
    """Where a model comes from and how to load it.

    `path` is a local folder or a Hub id; `dropout` None keeps the config's.
    `dtype` is the dtype of the weights in memory ("float32", "bfloat16", "float16"). With `meta` the model is built
    without its weights, to count its parameters. `seed` draws parameters that the checkpoint lacks.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str | None = None
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


@dataclass(frozen=True)
class Blocks:
    """Names of modules, as `named_modules` gives them: what freezing depth counts, from the input side.

    `embeddings` are the modules (or single parameters) below the first block; `blocks` the repeated blocks in order.
    All other parameters lie above the blocks: final norms, poolers, heads.
    """

    embeddings: tuple[str, ...]
    blocks: tuple[str, ...]


class Task(BaseModel):
    """One kind of fine-tuning. Subclasses add fields and `type: Literal["their-name"] = "their-name"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Metric names whose smaller value is the better one; every other metric is better when larger.
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity"})
    # The metric that drives early stopping and sweeps unless the recipe names another: the first that `score` returns.
    first_metric: ClassVar[str] = "accuracy"
    type: str

    @property
    def varies(self) -> bool:
        """Whether `vary` does something: what lies below the freezing depth may then not be cached."""
        return False

    def columns(self, labelled: bool = True) -> tuple[str, ...]:
        """Columns that every row needs; with labelled=False those needed for prediction only."""
        raise NotImplementedError

    def optional_columns(self) -> tuple[str, ...]:
        """Columns that are used where the data has them."""
        return ()

    def fact_columns(self) -> tuple[str, ...]:
        """Columns that `facts` looks at: the least, so that a scan of a large source stays cheap."""
        return ()

    def processor(self, model: Pretrained) -> Any:
        """The tokenizer, image processor or feature extractor saved with the model."""
        raise NotImplementedError

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

    def combine(self, parts: list[Prediction]) -> Prediction:
        """The result of one source row from those of its features, in their order."""
        return parts[0]

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
        raise ValueError(f"`{column}` is {value!r}; it needs text")


def stacked_blocks(model: Any) -> Blocks:
    """The largest outermost `ModuleList` of equal modules, and the modules registered before it on the way to it.

    Found to name the right list in 29 architectures, from BERT to ResNet; a task whose model differs overrides
    `blocks`.
    """
    lists = list(_outermost_lists(model, ""))
    if not lists:
        return Blocks((), ())
    name, members = max(lists, key=lambda pair: sum(getattr(p, "ds_numel", p.numel()) for p in pair[1].parameters()))
    before: list[str] = []
    module, prefix = model, ""
    for part in name.split("."):
        for child, value in module.named_children():
            if child == part:
                break
            if any(True for _ in value.parameters()):
                before.append(prefix + child)
        before.extend(prefix + parameter for parameter, _ in module.named_parameters(recurse=False))
        module, prefix = getattr(module, part), f"{prefix}{part}."
    return Blocks(tuple(before), tuple(f"{name}.{index}" for index in range(len(members))))


def _outermost_lists(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    import torch

    for name, child in module.named_children():
        stacked = isinstance(child, torch.nn.ModuleList | torch.nn.Sequential) and len(child) > 1
        if stacked and len({type(member) for member in child}) == 1:
            if any(True for _ in child.parameters()):
                yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")
