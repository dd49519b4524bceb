"""Rules between options: which combinations of a recipe's fields are impossible, and which one mends each.

A rule is a pure function of the values of the fields it names; it is asked only where all of them are sound, so
that one mistake gives one fault. None stands for a field whose section is null.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from rayft.errors import Fault
from rayft.fields.faults import SIGNATURE, show
from rayft.fields.machines import Cluster, Workers
from rayft.fields.search import Space, Tune
from rayft.fields.sections import Freeze, Lora, Source

Faults = Iterator[Fault]


def broken(recipe: Any, unsound: Collection[str]) -> Faults:
    """The faults of every rule whose fields lie neither in, above nor below one of the dotted names in `unsound`."""
    for fields, rule in RULES:
        if not any(_touches(field, name) for field in fields for name in unsound):
            yield from rule(*(_value(recipe, field) for field in fields))


def _touches(field: str, name: str) -> bool:
    return (field + ".").startswith(name + ".") or (name + ".").startswith(field + ".")


def _value(recipe: Any, field: str) -> Any:
    value = recipe
    for part in field.split("."):
        value = None if value is None else getattr(value, part)
    return value


def some_end(epochs: int | None, max_steps: int | None) -> Faults:
    if epochs is None and max_steps is None:
        yield Fault("train.epochs", "missing", fits="`train.epochs` or `train.max_steps` says when the run ends")


def batch_holds_micro_batch(micro: int, batch: int) -> Faults:
    if micro > batch:
        fits = f"a whole number of at most {batch}, which is train.global_batch_size, fits"
        yield Fault("train.micro_batch_size", "too large", show(micro), fits)


def batch_holds_workers(workers: int | Workers, batch: int) -> Faults:
    most = Cluster(workers=workers).max_workers
    if most > batch:
        where = "cluster.workers.max" if isinstance(workers, Workers) else "cluster.workers"
        fits = f"each needs a row of train.global_batch_size, so at most {batch} fits"
        yield Fault(where, "too many workers", show(most), fits)


def batches_hold_groups(task: Any, norm: int | None, micro: int, batch: int, workers: int | Workers) -> Faults:
    """Rows that a task couples, or BatchNorm, stay together, on one worker and in one forward pass."""
    group, most = math.lcm(task.coupled(), norm or 1), Cluster(workers=workers).max_workers
    if group == 1:
        return
    couples = " and ".join(["the task"] * (task.coupled() > 1) + ["model.batch_norm_rows"] * (norm is not None))
    groups = f"whole groups of {group} rows, which {couples} couple{'' if ' and ' in couples else 's'}"
    if batch % group:
        yield Fault("train.global_batch_size", f"not {groups}", show(batch), f"a multiple of {group} fits")
    elif batch // group < most <= batch:
        where = "cluster.workers.max" if isinstance(workers, Workers) else "cluster.workers"
        fits = f"each needs a group of train.global_batch_size, so at most {batch // group} fits"
        yield Fault(where, "too many workers", show(most), fits)
    if micro < group <= batch:
        yield Fault("train.micro_batch_size", f"too small for {groups}", show(micro), f"{group} or more fits")


def workers_in_order(workers: int | Workers) -> Faults:
    if isinstance(workers, Workers) and workers.min > workers.max:
        fits = f"a whole number of at most {workers.max}, which is `max`, fits"
        yield Fault("cluster.workers.min", "larger than `max`", show(workers.min), fits)


def adapters_freeze_the_rest(lora: Lora | None, freeze: Freeze | None, unfreeze_every: int | None) -> Faults:
    if lora is None:
        return
    what = "impossible with `model.lora`, which freezes all but the adapters"
    if freeze is not None and freeze.patterns:
        fits = "a depth fits, below which there are no adapters"
        yield Fault("model.freeze.patterns", what, show(list(freeze.patterns)), fits)
    if unfreeze_every is not None:
        yield Fault("model.unfreeze_every", what, show(unfreeze_every), "null fits")


def unfreezing_needs_frozen_blocks(unfreeze_every: int | None, freeze: Freeze | None, lora: Lora | None) -> Faults:
    if unfreeze_every is not None and lora is None and (freeze is None or freeze.layers == 0):
        fits = "null fits, or blocks to begin with in `model.freeze.layers`"
        yield Fault("model.unfreeze_every", "no block is frozen", show(unfreeze_every), fits)


def four_bits_are_for_adapters_on_gpus(
    quantize: str | None, lora: Lora | None, gpus: int, stage: int | str, offload: str
) -> Faults:
    if quantize is None:
        return
    shown = show(quantize)
    if lora is None:
        yield Fault("model.quantize", "weights in 4 bits don't learn", shown, "null fits, or adapters in `model.lora`")
    if gpus == 0:
        fits = "null fits without GPUs (cluster.gpus_per_worker is 0)"
        yield Fault("model.quantize", "weights in 4 bits need GPUs", shown, fits)
    if stage == 3 or offload == "parameters":
        where = "deepspeed.zero_stage" if stage == 3 else "deepspeed.offload"
        what = "impossible with `model.quantize`: weights in 4 bits are whole on every worker"
        fits = "0, 1, 2 or `auto` fits" if stage == 3 else "`none` or `optimizer` fits"
        yield Fault(where, what, show(stage if stage == 3 else offload), fits)


def quantized_models_are_loaded_alone(quantize: str | None, tune: Tune | None) -> Faults:
    if quantize is not None and tune is not None:
        fits = "null fits in a sweep, whose trials share weights of full width"
        yield Fault("model.quantize", "impossible with `tune`", show(quantize), fits)


def weights_mix_what_is_trained_on(*splits: tuple[Source, ...] | None) -> Faults:
    for name, sources in zip(("validation", "test"), splits, strict=True):
        for source in sources or ():
            if source.weight != 1.0:
                fits = "each row is scored once, so only data.train has weights; 1 fits"
                yield Fault(f"data.{name}", f"a weight for `{source.path}`", show(source.weight), fits)


def smoothing_needs_labels(task: Any, smoothing: float, tune: Tune | None) -> Faults:
    if task.smooths:
        return
    name, what = "train.label_smoothing", f"{task.type} has no labels to smooth"
    if smoothing:
        yield Fault(name, what, show(smoothing), "0 fits")
    if tune is not None and name in tune.search:
        yield Fault(f"tune.search.{name}", what, fits="a search without it fits")


def cache_needs_fixed_depth(
    cache: str, unfreeze_every: int | None, freeze: Freeze | None, compiled: bool, tune: Tune | None, task: Any
) -> Faults:
    if cache != "on":
        return
    wrong = None
    if not task.steady(1):
        wrong = "impossible with rows that differ from epoch to epoch"
    elif not task.one_pass:
        wrong = "impossible with a task whose rows pass through the model more than once"
    elif unfreeze_every is not None:
        wrong = "impossible with `model.unfreeze_every`, which changes what is frozen"
    elif compiled:
        wrong = "impossible with `model.compile`, which would compile anew for what is stored"
    elif (freeze is None or freeze.layers == 0) and not (tune and any("freeze" in name for name in tune.search)):
        wrong = "no block is frozen: model.freeze.layers says how many are"
    if wrong:
        yield Fault("model.cache_frozen", wrong, show(cache), "`auto` or `off` fits")


def metrics_are_what_the_task_scores(task: Any, *named: str | None) -> Faults:
    """`named` have their `eval_`; the loss is always known."""
    known = [f"eval_{name}" for name in dict.fromkeys((*task.metrics(), "loss"))]
    for where, metric in zip(METRICS, named, strict=True):
        if metric is not None and metric not in known:
            near = next(iter(difflib.get_close_matches(metric, known, 1)), None)
            yield Fault(where, "not a score of this task", show(metric), f"{', '.join(known)} fit", near)


METRICS = ("train.metric", "train.early_stopping.metric", "tune.metric")


def offload_needs_sharding(offload: str, stage: int | str) -> Faults:
    least = {"none": 0, "optimizer": 1, "parameters": 3}[offload]
    if isinstance(stage, int) and stage < least:
        fits = "3 or `auto` fits" if least == 3 else "1, 2, 3 or `auto` fits"
        yield Fault("deepspeed.zero_stage", f"too low for `deepspeed.offload: {offload}`", show(stage), fits)


def compiling_needs_whole_weights(compiled: bool, stage: int | str, offload: str) -> Faults:
    if compiled and (stage == 3 or offload == "parameters"):
        where = "deepspeed.zero_stage" if stage == 3 else "deepspeed.offload"
        what = "impossible with `model.compile`: weights that are gathered layer by layer compile anew all the time"
        fits = "0, 1, 2 or `auto` fits" if stage == 3 else "`none` or `optimizer` fits"
        yield Fault(where, what, show(stage if stage == 3 else offload), fits)


# DeepSpeed's key -> the field of the recipe that says it.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate",
    "scheduler": "train.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
    "zero_optimization.offload_param": "deepspeed.offload",
}


def extra_leaves_ours_alone(extra: dict[str, Any]) -> Faults:
    for key, ours in OWNED.items():
        section, _, inner = key.rpartition(".")
        holder = extra.get(section, {}) if section else extra
        if isinstance(holder, dict) and inner in holder:
            yield Fault(
                f"deepspeed.extra.{key}", "set by the recipe itself", show(holder[inner]), f"`{ours}` is its place"
            )


def half_precision_needs_gpus(dtype: str, gpus: int) -> Faults:
    if dtype == "float16" and gpus == 0:
        fits = "`float32` or `bfloat16` fits without GPUs (cluster.gpus_per_worker is 0)"
        yield Fault("model.dtype", "float16 needs GPUs", show(dtype), fits)


def flash_attention_needs_gpus_and_16_bits(attention: str | None, gpus: int, dtype: str) -> Faults:
    if not attention or not attention.startswith("flash_attention"):
        return
    if gpus == 0:
        fits = "`eager` or `sdpa` fits without GPUs (cluster.gpus_per_worker is 0)"
        yield Fault("model.attention", "flash attention needs GPUs", show(attention), fits)
    elif dtype == "float32":
        fits = "`sdpa` fits, or `bfloat16` in model.dtype"
        what = "flash attention computes in 16 bits, and model.dtype has 32"
        yield Fault("model.attention", what, show(attention), fits)


def workers_have_one_gpu(gpus: int) -> Faults:
    if gpus > 1:
        fits = "1 fits: as many workers as there are GPUs, in `cluster.workers`"
        yield Fault("cluster.gpus_per_worker", "a worker computes on one GPU, others would lie idle", show(gpus), fits)


def columns_go_to_different_names(columns: dict[str, str]) -> Faults:
    for theirs, ours in columns.items():
        first = next(name for name, value in columns.items() if value == ours)
        if first != theirs:
            yield Fault(f"data.columns.{theirs}", f"`{first}` is called that already", show(ours), "another name fits")


def no_secrets(storage: str, path: str, *splits: tuple[Source, ...] | None) -> Faults:
    places = [("storage", storage), ("model.path", path)]
    for name, sources in zip(("train", "validation", "test"), splits, strict=True):
        places += [(f"data.{name}", source.path) for source in sources or ()]
    for where, value in places:
        kind = "URL with credentials" if re.match(r"\w+://[^/@]+@", value) else None
        if kind or SIGNATURE.search(value):
            fits = "credentials come from the environment, the instance or a mounted secret; a URL without them fits"
            yield Fault(where, f"a {kind or 'signed URL, which is a credential itself'}", show(value), fits)


def sampler_fits_spaces(sampler: str | None, scheduler: str | None, search: dict[str, Space] | None) -> Faults:
    for field, space in (search or {}).items():
        where, shown = f"tune.search.{field}", show(space.model_dump(mode="json"))
        if sampler == "grid" and not space.choices:
            yield Fault(where, "a grid has no ranges", shown, "`choice` fits, or the sampler `random` or `optuna`")
        elif sampler == "optuna" and space.grid is not None:
            yield Fault(
                where, "the sampler `optuna` has no grid", shown, "`choice` fits, or the sampler `grid` or `random`"
            )
        if scheduler == "pbt" and field not in CHANGEABLE:
            fits = f"{', '.join(CHANGEABLE)} fit, or the scheduler `asha`, `median` or `none`"
            yield Fault(where, "population based training can't change it while a trial runs", None, fits)


# What a run may take over from its newest checkpoint with another value.
CHANGEABLE = (
    "train.learning_rate",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.label_smoothing",
    "train.layer_lr_decay",
)


def trials_are_counted(sampler: str | None, trials: int | None) -> Faults:
    if sampler not in (None, "grid") and trials is None:
        fits = "a whole number of at least 1 fits; only the sampler `grid` needs none"
        yield Fault("tune.trials", f"missing for the sampler `{sampler}`", fits=fits)


RULES: tuple[tuple[tuple[str, ...], Callable[..., Faults]], ...] = (
    (("train.epochs", "train.max_steps"), some_end),
    (("train.micro_batch_size", "train.global_batch_size"), batch_holds_micro_batch),
    (("cluster.workers", "train.global_batch_size"), batch_holds_workers),
    (
        ("task", "model.batch_norm_rows", "train.micro_batch_size", "train.global_batch_size", "cluster.workers"),
        batches_hold_groups,
    ),
    (("cluster.workers",), workers_in_order),
    (("model.lora", "model.freeze", "model.unfreeze_every"), adapters_freeze_the_rest),
    (
        ("model.quantize", "model.lora", "cluster.gpus_per_worker", "deepspeed.zero_stage", "deepspeed.offload"),
        four_bits_are_for_adapters_on_gpus,
    ),
    (("model.quantize", "tune"), quantized_models_are_loaded_alone),
    (("data.validation", "data.test"), weights_mix_what_is_trained_on),
    (("model.unfreeze_every", "model.freeze", "model.lora"), unfreezing_needs_frozen_blocks),
    (("task", "train.label_smoothing", "tune"), smoothing_needs_labels),
    (
        ("model.cache_frozen", "model.unfreeze_every", "model.freeze", "model.compile", "tune", "task"),
        cache_needs_fixed_depth,
    ),
    (("task", *METRICS), metrics_are_what_the_task_scores),
    (("deepspeed.offload", "deepspeed.zero_stage"), offload_needs_sharding),
    (("model.compile", "deepspeed.zero_stage", "deepspeed.offload"), compiling_needs_whole_weights),
    (("deepspeed.extra",), extra_leaves_ours_alone),
    (("model.dtype", "cluster.gpus_per_worker"), half_precision_needs_gpus),
    (("model.attention", "cluster.gpus_per_worker", "model.dtype"), flash_attention_needs_gpus_and_16_bits),
    (("cluster.gpus_per_worker",), workers_have_one_gpu),
    (("data.columns",), columns_go_to_different_names),
    (("storage", "model.path", "data.train", "data.validation", "data.test"), no_secrets),
    (("tune.sampler", "tune.scheduler", "tune.search"), sampler_fits_spaces),
    (("tune.sampler", "tune.trials"), trials_are_counted),
)
