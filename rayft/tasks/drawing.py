"""How parameters that a checkpoint lacks are drawn: from the seed and their module's name, whole or partitioned."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rayft.tasks.later import torch, transformers


def draw_parameters(network: Any, names: Iterable[str], seed: int) -> tuple[str, ...]:
    """Draws the parameters `names` from (seed, module's name) by the model's own initialisation; returns them sorted.

    Of an outline on the meta device they are only named. Works on partitioned (ZeRO-3) parameters too: they are
    gathered, drawn alike on every rank, and partitioned again.
    """
    wanted: dict[str, set[str]] = {}  # module -> names of its own parameters
    for name in names:
        owner, _, last = name.rpartition(".")
        wanted.setdefault(owner, set()).add(last)
    done: list[str] = []
    for owner, mine in sorted(wanted.items()):
        try:
            module = network.get_submodule(owner)
        except AttributeError:  # a buffer or tied name that this class does not hold
            continue
        drawn = sorted(mine & dict(module.named_parameters(recurse=False)).keys())
        if drawn:
            digest = hashlib.sha256(f"{seed}/{owner}".encode()).digest()
            _draw(network, module, drawn, int.from_bytes(digest[:8], "little") >> 1)
            done.extend(f"{owner}.{name}" if owner else name for name in drawn)
    return tuple(done)


def _draw(network: Any, module: Any, names: Sequence[str], seed: int) -> None:
    """Initialises the parameters `names` of `module` itself; its others stay as they are.

    On the CPU, wherever they lie: a GPU would draw other numbers, and under ZeRO-3 they lie there already. Nor are the
    GPU's own generators seeded, which draw dropout.
    """
    own = dict(module.named_parameters(recurse=False))
    if any(value.is_meta for value in own.values()):
        return  # an outline holds no values
    with gathered(list(own.values())), torch.random.fork_rng(devices=[]), torch.no_grad():
        drawn = {name: torch.nn.Parameter(_on_cpu(value), requires_grad=False) for name, value in own.items()}
        torch.default_generator.manual_seed(seed)
        module._is_hf_initialized = False
        module._parameters.update(drawn)
        try:
            network._init_weights(module)
        finally:
            module._parameters.update(own)
        for name in names:
            own[name].copy_(drawn[name])


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="cpu").copy_(value)


def gathered(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which partitioned parameters are whole and writable; nothing for ordinary ones."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@contextlib.contextmanager
def drawing_one_by_one(seed: int) -> Iterator[None]:
    """Under ZeRO-3 what the weights lack is initialised here while transformers loads, module by module.

    Transformers 5.23 gathers the parameters that are lacking, and then calls the initialisation of modules whose
    parameters are not gathered too, which fails for ResNet, Whisper and wav2vec 2.0.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return

    def initialise(network: Any, is_quantized: bool) -> None:
        named = network.named_parameters()
        draw_parameters(network, [name for name, value in named if not hasattr(value, "_is_hf_initialized")], seed)

    transformers_own: Any = transformers.PreTrainedModel
    before = transformers_own._initialize_missing_keys
    transformers_own._initialize_missing_keys = initialise
    try:
        yield
    finally:
        transformers_own._initialize_missing_keys = before
