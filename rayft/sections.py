"""The sections of a recipe: each option its type, its default and what fits. Rules between options: rules.py."""

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
    PlainSerializer,
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
    """N: the embeddings and the first N blocks from the input side; 0: nothing; all: all but the head."""
    patterns: Annotated[tuple[Text, ...], BeforeValidator(_listed, json_schema_input_type=Text | list[Text])] = ()
    """Shell-style patterns of parameter or module names."""

    @property
    def nothing(self) -> bool:
        return self.layers == 0 and not self.patterns


class Lora(Section):
    """Low-rank adapters: everything else stays as pretrained."""

    r: Positive = 8
    alpha: Positive = 16
    dropout: Share = 0.0
    targets: Annotated[
        tuple[Text, ...] | None, BeforeValidator(_listed, json_schema_input_type=Text | list[Text] | None)
    ] = None
    """Names of the modules that get adapters; null: all linear ones but the head."""


def _model_path(value: str) -> str:
    if value.startswith("pkg:") and not re.fullmatch(r"pkg:[A-Za-z_][\w.]*/.+", value):
        raise wrong("not a folder of a package", "`pkg:<package>/<folder>` fits")
    return value


class Model(Section):
    path: Annotated[Text, AfterValidator(_model_path)]
    """A Hub id, a folder, s3://…, or pkg:<package>/<folder>."""
    revision: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the computation, mixed where that helps."""
    freeze: Annotated[
        Freeze | None,
        BeforeValidator(_freeze, json_schema_input_type=Freeze | Natural | Literal["all"] | Text | list[Text] | None),
    ] = None
    unfreeze_every: Positive | None = None
    """Gradual unfreezing: one more block every so many epochs."""
    cache_frozen: Literal["auto", "on", "off"] = "auto"
    """Whether the output of the frozen blocks is computed once per row and stored."""
    lora: Lora | None = None
    quantize: Literal["4bit"] | None = None
    """4bit: the weights below the adapters of `lora` are kept in 4 bits (QLoRA); on GPUs."""
    dropout: Share | None = None
    """Overrides every dropout probability of the model's config."""
    attention: Text | None = None
    """eager, sdpa, flash_attention_2, …; null: what transformers takes."""
    batch_norm_rows: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Rows of which BatchNorm takes its statistics, as a model from nothing needs. Null: it keeps those that it has."""
    gradient_checkpointing: Flag = False
    compile: Flag = False
    trust_remote_code: Flag = False


# --- data


class Source(Section):
    """Files of rows, and which of their rows are meant."""

    path: Text
    """A file, folder or glob, s3://…, or hf://owner/name[/config][:split]."""
    where: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """The source's own columns and the value, or the list of values, that a row must have."""
    weight: Annotated[Number, Field(gt=0)] = 1.0


def _sources(value: Any) -> Any:
    entries = _listed(value)
    if not isinstance(entries, list | tuple):
        return entries
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


_Given = Text | Source | Annotated[list[Text | Source], Field(min_length=1)]
_Several = Annotated[tuple[Source, ...], Field(min_length=1)]
Sources = Annotated[_Several, BeforeValidator(_sources, json_schema_input_type=_Given)]
SomeSources = Annotated[_Several | None, BeforeValidator(_sources, json_schema_input_type=_Given | None)]


class Data(Section):
    train: Sources
    validation: SomeSources = None
    """Null: cut from train, by a hash of the row's id."""
    test: SomeSources = None
    columns: dict[str, Text] = {}
    """Theirs -> ours."""
    shuffle: Flag = True
    """False: the source's order throughout, no sorting by length."""
    group_by_length: Flag = True
    """Rows of like length meet in a global batch, and little of it is padding. False where lengths tell the answers."""
    on_bad_row: Literal["error", "skip"] = "error"
    stream: Literal["auto", "on", "off"] = "auto"
    """Whether Ray Data reads prepared rows for the workers; else each reads its own. Auto: unless they are few."""


# --- train


class Every(Section):
    """How often: written as "1 epoch", "500 steps" or "10 minutes"."""

    count: float
    unit: Literal["epoch", "steps", "minutes"]

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
_Written = PlainSerializer(str, return_type=str)
_OfEpochs = BeforeValidator(partial(_every, allowed=_EPOCHS), json_schema_input_type=_often(*_EPOCHS))
_OfMore = BeforeValidator(partial(_every, allowed=_MORE), json_schema_input_type=_often(*_MORE))
EvaluateEvery = Annotated[Every, _OfEpochs, _Written]
SaveEvery = Annotated[Every, _OfMore, _Written]


def _metric(value: str) -> str:
    if value.startswith("test_"):
        raise wrong("a test score, which no choice may depend on", f"`eval_{value.removeprefix('test_')}` fits")
    return "eval_" + value.removeprefix("eval_")


Metric = Annotated[Text, AfterValidator(_metric)]  # with or without `eval_` in the file, always with it here


class EarlyStopping(Section):
    metric: Metric | None = None
    """A validation score; null: the one by which the best model is chosen."""
    patience: Positive
    """Evaluations in a row without a better score after which the run ends."""


def _warmup(value: float) -> float:
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise wrong(
            "neither a share nor a number of steps", "a share from 0 to below 1, or a whole number of steps, fits"
        )
    return value


class Train(Section):
    epochs: Positive | None = None
    max_steps: Positive | None = None
    """With `epochs` too, the run and its schedule end at whichever comes first."""
    global_batch_size: Positive = 32
    """Prepared rows per optimizer step, over all workers: independent of their number."""
    micro_batch_size: Positive = 16
    """At most so many rows per forward pass on one worker; by default no more than `global_batch_size`."""
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    layer_lr_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """0.9: each block learns at 0.9 of the one above it."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[Number | Whole, AfterValidator(_warmup)] = 0.0
    """A share of the steps (below 1), or a whole number of steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    """0: gradients are not clipped."""
    label_smoothing: Share = 0.0
    evaluate_every: EvaluateEvery = Every(count=1, unit="epoch")
    save_every: SaveEvery = Every(count=1, unit="epoch")
    early_stopping: EarlyStopping | None = None
    metric: Metric | None = None
    """The validation score that says which model is best; null: that of `early_stopping`, else the task's first."""
    seed: Natural = 0

    @model_validator(mode="before")
    @classmethod
    def _fitting_micro_batch(cls, value: Any) -> Any:
        if isinstance(value, dict) and "micro_batch_size" not in value:
            size = value.get("global_batch_size")
            if isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 16:
                return {**value, "micro_batch_size": size}
        return value


# --- where it runs


class Checkpoints(Section):
    keep: Positive = 2
    """How many of the newest are kept, besides the best."""


def _stage(value: Any) -> Any:
    return "a boolean" if isinstance(value, bool) else value  # or Python takes `true` for 1


class DeepSpeed(Section):
    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_stage)] = "auto"
    """auto: the least sharding that fits."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """To host memory. The optimizer's step is then computed there, by `cluster.cpus_per_worker` threads."""
    extra: dict[str, Any] = {}
    """Raw DeepSpeed keys."""


class Workers(Section):
    """An elastic number of workers."""

    min: Positive
    max: Positive


class Cluster(Section):
    workers: Positive | Workers = 2
    gpus_per_worker: Natural = 0
    """1: each worker computes on a GPU of its own."""
    cpus_per_worker: Positive = 1
    shared_storage: Flag = False
    """True: local paths are the same on every machine."""

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers


class Failure(Section):
    max_retries: Natural = 3
    timeout_s: Positive = 600
    grace_s: Natural = 30


# --- submit


def _quantity(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Amount = Annotated[str, Field(strict=True, pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?|Ki)?$", examples=["4", "16Gi"])]
Quantity = Annotated[_Amount, BeforeValidator(_quantity, json_schema_input_type=_Amount | Number)]


class Kubernetes(Section):
    namespace: Text = "default"
    queue: Text | None = None
    credentials_secret: Text | None = None
    """The Secret whose keys become environment variables of every pod."""
    token_secret: Text | None = None
    """The Secret that holds Ray's token."""
    node_selector: dict[str, Text] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    cpu: Quantity = "4"
    memory: Quantity = "16Gi"
    shm: Quantity = "8Gi"
    trials_at_once: Positive = 1
    """Trials of a sweep that have pods to run side by side: the pods of workers are multiplied by it."""
    mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    retries: Natural = 2
    deadline_s: Positive | None = None
    ttl_s: Natural = 3600


class Submit(Section):
    address: Text | None = None
    image: Text | None = None
    entrypoint_cpus: Annotated[Number, Field(ge=0)] = 0.0
    kubernetes: Kubernetes = Kubernetes()
