"""The DeepSpeed engine: its configuration as a pure function, its construction, the pieces of state each rank holds.

Gradient accumulation, loss scaling by item counts and the schedule are the loop's; the engine shards, reduces, clips
and steps.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rayft.recipe import Recipe
from rayft.training import dropout, loss_scale, shared
from rayft.training.loss_scale import gradient_scaler

BUCKET = 500_000_000  # elements that DeepSpeed reduces at once, unless told otherwise


def deepspeed_config(recipe: Recipe, stage: int) -> dict[str, Any]:
    """The engine's configuration. The micro-batch and accumulation keys are formal: the loop cuts batches itself."""
    zero: dict[str, Any] = {"stage": stage}
    gpu = recipe.cluster.gpus_per_worker > 0
    if stage in (1, 2):
        # One flat reduction per bucket is faster than scattering it on gloo. On NCCL scattering sends no less:
        # DeepSpeed 0.19 reduces to all ranks even so, and copies once more. At stage 1 a reduction beside the backward
        # pass would leave out what had no part in the last micro-batch.
        zero |= {"reduce_scatter": False, "overlap_comm": gpu and stage == 2, "contiguous_gradients": True}
    if stage == 3:
        # Tensors below this size stay whole on every rank: sharding biases and norms costs more than it saves.
        zero |= {"overlap_comm": gpu, "stage3_param_persistence_threshold": 10_000}
    host = {"device": "cpu", "pin_memory": True} if gpu else {"device": "cpu"}
    if recipe.deepspeed.offload != "none" and stage >= 1:
        zero["offload_optimizer"] = host
    if recipe.deepspeed.offload == "parameters":
        zero["offload_param"] = dict(host)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # At stage 0 the loop clips: the engine would not say what the norm was.
        "gradient_clipping": recipe.train.max_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the GPU at each forward pass and each step.
        "timers": {"throughput": {"enabled": False}},
    }
    if recipe.model.dtype != "float32":
        config["torch_autocast"] = {"enabled": True, "dtype": recipe.model.dtype, "lower_precision_safe_modules": []}
    return _merged(config, recipe.deepspeed.extra)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def prepare_process(cpus: int, local_world: int, gpu: bool) -> None:
    """What DeepSpeed has to be told before it is imported, and the group of all ranks that it is to use.

    Without `gpu` that is the CPU accelerator, whose extensions are not compiled: what the recipe asks for decides,
    since a worker without GPUs may still see those of its machine.
    """
    torch.set_num_threads(max(1, cpus))
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    os.environ["LOCAL_SIZE"] = str(local_world)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.utils import logger

    _import_uncompiled("deepspeed.runtime.zero.muon.original_muon")
    logger.setLevel("ERROR")
    if not gpu:
        dropout.install()
        # Its shared-memory reduction would be compiled at first use, which takes a compiler and a minute.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    _give_group(torch.device("cuda" if gpu else "cpu"))
    if not gpu and local_world == torch.distributed.get_world_size() > 1:
        _share_memory()
    gc.freeze()  # what was imported is never garbage: looking through it takes a third of a second each time


def _give_group(device: torch.device) -> None:
    """DeepSpeed's group of all ranks, as patient as ours; collective. Its own would wait ten minutes on NCCL."""
    from deepspeed.utils import groups

    whole: Any = torch.distributed.group.WORLD
    groups._WORLD_GROUP = torch.distributed.new_group(timeout=whole._get_backend(device).options._timeout)


_shared: shared.SharedMemory | None = None  # of this process's group, where its ranks are on one machine


def _share_memory() -> None:
    import deepspeed.comm.comm

    global _shared  # noqa: PLW0603 # as the process group is
    _shared = shared.opened()
    if _shared is not None:
        shared.install(deepspeed.comm.comm.cdb, _shared)


def _import_uncompiled(module: str) -> None:
    """Imports a module without the compiler that its decorators load.

    DeepSpeed's engine needs this one for an optimizer that no run here has; the compiler would take a second.
    """
    compiler = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module(module)
    finally:
        torch.compile = compiler


def build(network: torch.nn.Module, groups: list[dict[str, Any]], config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `network` with AdamW (Loshchilov and Hutter 2019) over `groups`, its moments zero.

    The learning rate is 0 until the loop sets it: some stages take a step while they initialise.
    """
    import deepspeed

    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    config = _safely_overlapped(config, network)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    here = _shared is not None or torch.distributed.get_world_size() == 1
    if engine.zero_optimization_stage() == 0 and here and engine.communication_data_type == torch.float32:
        # It would copy every gradient to and fro; `reduce_gradients` does without. Nor does that make them narrower.
        engine.enable_backward_allreduce = False
    loss_scale.install(engine)
    reset_moments(engine)
    return engine


def _safely_overlapped(config: dict[str, Any], network: torch.nn.Module) -> dict[str, Any]:
    """The configuration without reductions beside the backward pass where those of stage 2 would go wrong.

    DeepSpeed 0.19 frees the gradient of a parameter that is larger than a bucket while it is still being reduced.
    """
    zero = config.get("zero_optimization", {})
    largest = max((parameter.numel() for parameter in network.parameters() if parameter.requires_grad), default=0)
    if zero.get("stage") == 3 or not zero.get("overlap_comm") or largest <= zero.get("reduce_bucket_size", BUCKET):
        return config
    return {**config, "zero_optimization": {**zero, "overlap_comm": False}}


@dataclass(frozen=True)
class Piece:
    """A run of one trainable parameter that this rank holds: elements [start, start + length) of the flattened tensor.

    `master` is a float32 view of it, `flat` the tensor that the inner optimizer knows and `offset` where in it this run
    begins. `lp` is the view of the working copy, where it is another tensor.
    """

    name: str
    start: int
    length: int
    master: torch.Tensor
    flat: torch.Tensor
    offset: int

    def moment(self, engine: Any, key: str) -> torch.Tensor:
        """The run's view of the optimizer's `exp_avg` or `exp_avg_sq`."""
        return inner_optimizer(engine).state[self.flat][key].view(-1).narrow(0, self.offset, self.length)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below whatever DeepSpeed wrapped around it."""
    wrapped = engine.optimizer
    return wrapped.optimizer if hasattr(wrapped, "optimizer") else wrapped


def pieces(engine: Any) -> Iterator[Piece]:
    """The runs of trainable parameters that this rank holds; at stage 0 that is every parameter whole."""
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            yield Piece(name, 0, parameter.numel(), parameter.data.view(-1), parameter, 0)
        elif stage == 3:
            yield from _stage3_piece(engine, name, parameter)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            inside, flat_at = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Piece(name, inside.start, inside.numel, mapping.hp_fragment, flat, flat_at.start)


def _stage3_piece(engine: Any, name: str, parameter: Any) -> Iterator[Piece]:
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * torch.distributed.get_rank()
    length = min(size, parameter.ds_numel - start)  # the last rank's run ends in padding
    if length > 0:
        flat = optimizer.fp32_partitioned_groups_flat[group]
        yield Piece(name, start, length, flat.data.narrow(0, offset, length), flat, offset)


def reset_moments(engine: Any) -> None:
    """Zero moments and step counters for every tensor of the inner optimizer, as before a first step."""
    inner = inner_optimizer(engine)
    flats = [flat for group in inner.param_groups for flat in group["params"]]
    if engine.zero_optimization_stage() == 3:  # hands its tensors to the inner optimizer for the time of a step only
        flats = list(engine.optimizer.fp32_partitioned_groups_flat)
    for flat in flats:
        inner.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole shape of a parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gradient_scale(engine: Any) -> int:
    """What the ranks' gradients are divided by when they are reduced: the engine averages, `reduce_gradients` sums."""
    return torch.distributed.get_world_size() if engine.enable_backward_allreduce else 1


def reduce_gradients(engine: Any) -> None:
    """After the last backward pass of a step: the sums over the ranks, where the engine has not reduced them itself.

    A parameter that had no part in the loss has a gradient of zero then, on one worker as on several.
    """
    if engine.enable_backward_allreduce:
        return
    learning = trainable(engine)
    if _shared is not None:
        shared.sum_gradients(_shared, learning)
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """Replaces the tensor (contiguous) by the sum of all ranks'."""
    if _shared is not None and tensor.device.type == "cpu":
        _shared.reduce(tensor)
    else:
        torch.distributed.all_reduce(tensor)


def collective_seconds() -> float:
    """Seconds that exchanges between ranks of one machine have taken this process so far, DeepSpeed's included."""
    return _shared.seconds if _shared is not None else 0.0


def trainable(engine: Any) -> list[torch.Tensor]:
    """The parameters that learn, in the model's order."""
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def grad_norm(engine: Any, max_norm: float) -> float:
    """Has the next step clip to `max_norm`; the global gradient norm at stage 0, and 0.0 at others, which take it then.

    It is that of the gradients without a loss scale. They are divided within the optimizer's step, which reads them
    anyway; with a loss scale, whose scaler does the same with its own number, before it.
    """
    if engine.zero_optimization_stage() > 0:
        loss_scale.before_step(engine, max_norm)
        return 0.0
    gradients = [parameter.grad for parameter in trainable(engine) if parameter.grad is not None]
    scaler = gradient_scaler(engine)
    norm = torch.nn.utils.get_total_norm(gradients) / (1.0 if scaler is None else scaler.get_scale())
    clips = 0 < max_norm < float(norm) < math.inf
    divisor = (norm + 1e-6) / max_norm if clips else None  # as torch.nn.utils.clip_grad_norm_ has it
    if scaler is None:
        inner_optimizer(engine).grad_scale = divisor  # type: ignore[attr-defined] # its fused step looks for it
    elif divisor is not None:
        torch._foreach_div_(gradients, divisor)
    return float(norm)


def update(engine: Any) -> None:
    """The optimizer's step, after `grad_norm`."""
    engine.step()
    loss_scale.after_step(engine)


def destroy(engine: Any) -> None:
    """Frees the engine's state: DeepSpeed's own `destroy` leaves the model and the optimizer referenced."""
    inner, parameters = inner_optimizer(engine), list(engine.module.parameters())
    engine.destroy()
    for parameter in parameters:
        parameter.data = torch.empty(0)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = torch.empty(0)
    inner.state.clear()
    for group in inner.param_groups:
        group["params"] = []
    if engine.optimizer is not None and engine.optimizer is not inner:
        engine.optimizer.__dict__.clear()
    engine.__dict__.clear()
    from deepspeed.runtime import torch_autocast

    # A global of DeepSpeed's: the next engine would take this one's precision and gradient scaler for its own.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
