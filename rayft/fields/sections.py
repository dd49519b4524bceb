"""The sections of a recipe that say what is trained: each option its type, its default, what fits and what it does.

Those that say where it runs are in machines.py, the rules between options in rules.py.
"""

from __future__ import annotations

import difflib
import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rayft.layout import taken

# Strict, since a coerced value hides a mistake: `true` is no number and `"3"` no whole one. Lists may become tuples.
Whole = Annotated[int, Field(strict=True)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Scalar = Flag | Whole | Number | Annotated[str, Field(strict=True)] | None


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def wrong(what: str, fits: str | None = None, nearest: str | None = None) -> PydanticCustomError:
    """An error whose sentence reaches the user as it is; without `fits`, the field's schema says what would fit."""
    return PydanticCustomError("rayft", "{what}", {"what": what, "fits": fits, "nearest": nearest})


def _listed(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if value is None or isinstance(value, list | tuple) else [value]


# --- name and model


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", value):
        raise wrong("not a usable name", "letters, digits and . _ - fit, parts divided by /, none with a dot in front")
    if part := taken(value):
        raise wrong(f"`{part}` is a folder that runs or their storage have inside", "any other part fits in its place")
    return value


Name = Annotated[Text, AfterValidator(_name)]


def _freeze(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) or value == "all":
        return {"layers": value}
    if isinstance(value, str | list | tuple):
        return {"patterns": value}
    return value


class Freeze(Section):
    """What stays as pretrained."""

    layers: Natural | Literal["all"] = 0
    """N: the embeddings and the first N blocks from the input side; 0: nothing; all: all but the head.

    With `model.lora` blocks that stay get no adapters.
    """
    patterns: Annotated[tuple[Text, ...], BeforeValidator(_listed, json_schema_input_type=Text | list[Text])] = ()
    """Shell-style patterns of names of parameters or modules, which stay too; one that matches nothing is refused."""

    @property
    def nothing(self) -> bool:
        return self.layers == 0 and not self.patterns


class Lora(Section):
    """Low-rank adapters: everything else, but a new head, stays as pretrained."""

    r: Positive = 8
    """The rank of the matrices that learn."""
    alpha: Positive = 16
    """What an adapter gives is multiplied by `alpha` / `r`."""
    dropout: Share = 0.0
    """The share of what goes into an adapter that is left out at random in training."""
    targets: Annotated[
        tuple[Text, ...] | None, BeforeValidator(_listed, json_schema_input_type=Text | list[Text] | None)
    ] = None
    """Names of the modules that get adapters, or how they end; null: all linear ones inside the blocks."""


def _model_path(value: str) -> str:
    if value.startswith("pkg:") and not re.fullmatch(r"pkg:[A-Za-z_][\w.]*/.+", value):
        raise wrong("not a folder of a package", "`pkg:<package>/<folder>` fits")
    return value


class Model(Section):
    """Which pretrained model, and what of it learns."""

    path: Annotated[Text, AfterValidator(_model_path)]
    """A Hub id, a folder, an URL such as s3://bucket/folder, or pkg:<package>/<folder>.

    A folder with a config and no weights is a model from nothing: they are drawn from `train.seed`.
    """
    revision: Text | None = None
    """The branch, tag or commit of a Hub id; null: its main branch. Folders have none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the computation: what learns is kept in float32 all the same. float16 needs GPUs."""
    freeze: Annotated[
        Freeze | None,
        BeforeValidator(_freeze, json_schema_input_type=Freeze | Natural | Literal["all"] | Text | list[Text] | None),
    ] = None
    """What stays as pretrained; a number or `all` stands for `layers`, a text or a list for `patterns`."""
    unfreeze_every: Positive | None = None
    """Gradual unfreezing: one more block learns every so many epochs, the topmost first. Null: the depth stays."""
    cache_frozen: Literal["auto", "on", "off"] = "auto"
    """Whether the output of the frozen blocks is computed once per row and stored.

    auto: where the model stands it, it saves time, and half of the free storage is enough; on: refused where it can't.
    """
    lora: Lora | None = None
    """Adapters, which learn in place of the weights below them; null: the weights learn themselves."""
    quantize: Literal["4bit"] | None = None
    """4bit: the weights below the adapters of `lora` are kept in 4 bits (QLoRA); on GPUs. Null: at their width."""
    dropout: Share | None = None
    """Overrides every dropout probability of the model's config; null: they stay."""
    attention: Text | None = None
    """How attention is computed: eager, sdpa, flash_attention_2 (GPUs, 16 bits), …; null: as transformers chooses."""
    batch_norm_rows: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Rows of which BatchNorm takes its statistics, as a model from nothing needs. Null: it keeps those that it has."""
    gradient_checkpointing: Flag = False
    """Computes activations again in the backward pass: less memory and the same model, about a third slower."""
    compile: Flag = False
    """Compiles the network with torch.compile. Not at ZeRO stage 3; the output of frozen blocks is not stored."""
    trust_remote_code: Flag = False
    """Lets Python code run that comes with the model, for kinds that transformers itself does not know."""


# --- data


class Source(Section):
    """Files of rows, and which of their rows are meant."""

    path: Text
    """A file, folder or glob, here or at an URL such as s3://…, or hf://owner/name[/config][:split][@revision].

    Files are csv, tsv, json, jsonl, parquet or txt, also as .gz; pictures and sounds lie in a folder for each class.
    """
    where: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """The source's own columns, each with the value, or the list of values, that a row must have in it."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How often a training row is taken in an epoch: 2 is twice, 0.25 a quarter of the rows, always the same ones."""


def _sources(value: Any) -> Any:
    entries = _listed(value)
    if not isinstance(entries, list | tuple):
        return entries
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


_Given = Text | Source | Annotated[list[Text | Source], Field(min_length=1)]
_Several = Annotated[tuple[Source, ...], Field(min_length=1)]
Sources = Annotated[_Several, BeforeValidator(_sources, json_schema_input_type=_Given)]
SomeSources = Annotated[_Several | None, BeforeValidator(_sources, json_schema_input_type=_Given | None)]


def _no_share(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise wrong("not rows", "a share is not asked for: leave it out, and a tenth of `data.train` is kept apart")
    return value


class Data(Section):
    """Where the rows come from."""

    train: Sources
    """The rows that are learned: a path, a section that says more, or a list of both, which are mixed."""
    validation: Annotated[SomeSources, BeforeValidator(_no_share)] = None
    """The rows that say which model is best; null: a tenth of `train`, at most 10,000, by a hash of the row's id."""
    test: SomeSources = None
    """The rows on which the best model is scored at the end; null: there are no test scores."""
    columns: dict[str, Text] = {}
    """The data's own column names -> what the task's fields call them, for sources whose names differ."""
    shuffle: Flag = True
    """Whether each epoch has an order of its own; false: the source's order throughout, no sorting by length."""
    group_by_length: Flag = True
    """Rows of like length meet in a global batch, and little of it is padding. False where lengths tell the answers."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What follows from a row that can't be used: error ends the run before it trains, and tells the first ones.

    skip leaves such rows out and counts them, up to a tenth of a split.
    """
    stream: Literal["auto", "on", "off"] = "auto"
    """Whether Ray Data reads prepared rows for the workers; else each reads its own.

    auto: where they are more than 16 MiB, or differ from epoch to epoch.
    """


# --- train


class Every(Section):
    """How often: written as "1 epoch", "500 steps" or "10 minutes"."""

    count: float
    """How many of them; of epochs and minutes also fractions."""
    unit: Literal["epoch", "steps", "minutes"]
    """What is counted; a step is one of the optimizer."""

    @model_serializer
    def _written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        stem = self.unit.removesuffix("s")
        return (
            f"{int(self.count) if self.count == int(self.count) else self.count} {stem}{'' if self.count == 1 else 's'}"
        )


_UNITS: dict[str, Literal["epoch", "steps", "minutes"]] = {"epoch": "epoch", "step": "steps", "minute": "minutes"}


def _every(value: Any, allowed: tuple[str, ...]) -> Any:
    if isinstance(value, Every):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([^\d\s]+)\s*", value) if isinstance(value, str) else None
    if not found:
        raise wrong("not a number with a unit")
    count, unit = float(found[1]), found[2].removesuffix("s")
    if unit not in allowed:
        near = difflib.get_close_matches(unit, allowed, 1)
        raise wrong(
            f"unknown unit {found[2]!r}", nearest=f"{found[1]} {near[0]}{'' if count == 1 else 's'}" if near else None
        )
    if count <= 0:
        raise wrong("too small")
    if unit == "step" and count != int(count):
        raise wrong("not a whole number of steps")
    return {"count": count, "unit": _UNITS[unit]}


def _often(*allowed: str) -> Any:
    examples = {"epoch": "1 epoch", "step": "500 steps", "minute": "10 minutes"}
    pattern = rf"^\s*(\d+(\.\d*)?|\.\d+)\s*({'|'.join(allowed)})s?\s*$"
    return Annotated[str, Field(pattern=pattern, examples=[examples[unit] for unit in allowed])]


_EPOCHS, _MORE = ("epoch", "step"), ("epoch", "step", "minute")
_OfEpochs = BeforeValidator(partial(_every, allowed=_EPOCHS), json_schema_input_type=_often(*_EPOCHS))
_OfMore = BeforeValidator(partial(_every, allowed=_MORE), json_schema_input_type=_often(*_MORE))
EvaluateEvery = Annotated[Every, _OfEpochs]
SaveEvery = Annotated[Every, _OfMore]


def _metric(value: str) -> str:
    if value.startswith("test_"):
        raise wrong("a test score, which no choice may depend on", f"`eval_{value.removeprefix('test_')}` fits")
    return "eval_" + value.removeprefix("eval_")


Metric = Annotated[Text, AfterValidator(_metric)]  # with or without `eval_` in the file, always with it here


class EarlyStopping(Section):
    """When a run ends before its last step."""

    metric: Metric | None = None
    """The validation score that has to get better; null: the one by which the best model is chosen."""
    patience: Positive
    """Evaluations in a row without a better score after which the run ends."""


def _warmup(value: Any) -> Any:
    """Asked before the types are: of two that don't fit, neither's sentence says what would."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or (isinstance(value, int) and value >= 1)):
        raise wrong(
            "neither a share nor a number of steps", "a share from 0 to below 1, or a whole number of steps, fits"
        )
    return value


class Train(Section):
    """How long it learns, in which steps, and what is done between them."""

    epochs: Positive | None = None
    """How often the training rows are passed through; needed where `max_steps` is not given."""
    max_steps: Positive | None = None
    """Optimizer steps of the run; with `epochs` too, it and its schedule end at whichever comes first."""
    global_batch_size: Positive = 32
    """Prepared rows per optimizer step, over all workers: independent of their number."""
    micro_batch_size: Positive = 16
    """At most so many rows per forward pass on one worker; by default no more than `global_batch_size`."""
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    """The learning rate of AdamW after the warm-up, its highest."""
    layer_lr_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """0.9: each block learns at 0.9 of the rate of the one above it, the topmost at 0.9 of the head's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up: it falls to 0 in a line or a cosine, or it stays."""
    warmup: Annotated[Number | Whole, BeforeValidator(_warmup)] = 0.0
    """How long the learning rate rises from 0: a share of the steps (below 1), or a whole number of steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    """The weight decay of AdamW; biases and norms have none."""
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    """The norm to which a longer gradient of all parameters is cut; 0: gradients are not clipped."""
    label_smoothing: Share = 0.0
    """The share of a row's label that is spread evenly over all labels, or tokens; 0 for tasks without."""
    evaluate_every: EvaluateEvery = Every(count=1, unit="epoch")
    """How often the validation rows are scored, in epochs or steps; after the last step they always are."""
    save_every: SaveEvery = Every(count=1, unit="epoch")
    """How often a checkpoint is saved, in epochs, steps or minutes.

    One is saved for each better model, at the end, and when a run is asked to stop, too.
    """
    early_stopping: EarlyStopping | None = None
    """Ends the run when a score gets no better; null: it goes on to its last step."""
    metric: Metric | None = None
    """The validation score that says which model is best; null: that of `early_stopping`, else the task's first."""
    seed: Natural = 0
    """What all that is random follows from: the order of rows, dropout, augmentation, new parameters."""

    @model_validator(mode="before")
    @classmethod
    def _fitting_micro_batch(cls, value: Any) -> Any:
        if isinstance(value, dict) and "micro_batch_size" not in value:
            size = value.get("global_batch_size")
            if isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 16:
                return {**value, "micro_batch_size": size}
        return value
