"""The frozen prefix: blocks below the freezing depth, whose output for a row never changes, replaced by that output.

Their first block gives what was stored, the others pass it on; embeddings, masks and positions are computed as always,
so that no architecture needs code of its own. Whether a model stands that is tried on its first batch. `states.py`
keeps what was computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rayft import storage
from rayft.data.prepared import Prepared
from rayft.data.read import first_row, strided
from rayft.errors import ModelError
from rayft.recipe import Recipe
from rayft.tasks.stacked import Blocks
from rayft.training.evaluate import Network, sharded
from rayft.training.standin import Enough, Prefix, captured
from rayft.training.states import Part, States, Writer, commit, found, new_attempt, states_folder
from rayft.training.together import together
from rayft.training.watch import Watch

# What a machine does per second: enough to tell whether storing is worth it, and the same on every machine.
WRITE_BYTES_S = 200e6
# Of one worker. Measured on two busy cores, the file in memory: 0.6 GB the first time, with checksums; then over 4 GB.
READ_BYTES_S = 400e6
CPU_FLOPS = 2e10
# Of an H100 (SXM), whose data sheet says 67e12 in float32 and 989e12, dense, in 16 bits: 0.6 of the one, and 0.4 of the
# other, which training of Llama 3 reached on it (Dubey et al. 2024, section 3.3: 38 to 43 %).
GPU_FLOPS = {"float32": 4e13, "bfloat16": 4e14, "float16": 4e14}
FREE_SHARE = 0.5  # of the free space, at most so much is used
TOLERANCE = 1e-4  # relative: how far the loss may lie from the whole model's on the first batch
TRIED_ROWS = 64


def impossible(recipe: Recipe, depth: int) -> str | None:
    """Why the output of the frozen blocks can't be stored, or None. `depth` blocks are frozen."""
    if recipe.model.cache_frozen == "off":
        return "model.cache_frozen is off"
    if depth == 0:
        return "no block is frozen"
    if recipe.model.unfreeze_every:
        return "model.unfreeze_every changes what is frozen"
    if not recipe.task.steady(depth):
        return "rows differ from epoch to epoch"
    if not recipe.task.one_pass:
        return "a row passes through the model more than once"
    if recipe.model.compile:
        return "model.compile compiles anew for what is stored"
    return None


@dataclass(frozen=True)
class Cost:
    """What storing would cost and save: `rows` to be passed through the prefix once, `passes` rows that then need not.

    `seconds` and `bytes` are a row's; `free` bytes are left where the states would be stored (None: without limit).
    """

    rows: int
    passes: float
    seconds: float
    bytes: float
    free: int | None

    @property
    def needed(self) -> float:
        return self.rows * self.bytes

    def too_dear(self) -> str | None:
        """Why the states had better not be stored, or None."""
        if self.free is not None and self.needed > FREE_SHARE * self.free:
            return f"their {_size(self.needed)} are more than half of the {_size(self.free)} that storage has left"
        spent = self.rows * self.seconds + self.needed / WRITE_BYTES_S + self.passes * self.bytes / READ_BYTES_S
        if spent >= self.passes * self.seconds:
            return (
                f"storing and reading {_size(self.needed)} would take {spent:.1f} s, and computing them anew "
                f"{self.passes * self.seconds:.1f} s"
            )
        return None


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@dataclass(frozen=True)
class Source:
    """What the states come from: a network in evaluation mode, the module inside it, and its blocks."""

    network: Network
    module: Any
    blocks: Blocks

    def loss(self, batch: Any) -> float:
        """The loss of one forward pass."""
        task = self.network.task
        return float(task.loss(task.forward(self.network.model, batch), batch).detach())


@dataclass(frozen=True)
class Trial:
    """What one batch showed: why the prefix can't be replaced in this model (None: it can); of a row, about, the bytes
    of its states and the operations to compute them."""

    why_not: str | None
    bytes: float = 0.0
    operations: float = 0.0

    def cost(self, rows: dict[str, int], passes: dict[str, float], missing: Collection[str], recipe: Recipe) -> Cost:
        """Of the splits, with so many `rows` each, where the recipe trains, in its dtype.

        What is missing is spent for, and all of them save: an earlier start that was killed between two splits must not
        change what is worth it, or losses would differ in the last bit.
        """
        speed = GPU_FLOPS[recipe.model.dtype] if recipe.cluster.gpus_per_worker else CPU_FLOPS
        spent, saved = sum(rows[split] for split in missing), sum(rows[split] * passes[split] for split in rows)
        return Cost(spent, saved, self.operations / speed, self.bytes, storage.free(recipe.storage))


def trial(source: Source, prefix: Prefix, prepared: Prepared, batch_size: int) -> Trial:
    """Runs one batch with and without its states given, as they would be stored. Every rank has to call it.

    What is frozen has to be so already.
    """
    shards = prepared.manifest.shards
    table = next(strided(prepared.folder, shards, rank=0, world=1, batch_size=min(batch_size, TRIED_ROWS)))
    batch, rows = source.network.batch(table), table.num_rows
    above = len(source.blocks.blocks)
    watched = sorted({prefix.depth, source.blocks.chained(above), above})
    with captured(source.module, source.blocks, [prefix.depth]) as caught:
        prefix.offer(None)
        source.loss(batch)
        states = caught.get(prefix.depth)
        if isinstance(states, torch.Tensor) and states.requires_grad:
            return Trial("something that learns is used below or within the frozen blocks")
    with torch.no_grad(), captured(source.module, source.blocks, watched) as caught:
        whole, plain = source.loss(batch), dict(caught)
        states = plain.get(prefix.depth)
        if not isinstance(states, torch.Tensor) or states.shape[:1] != (rows,):
            return Trial("its blocks don't give one tensor that begins with the rows")
        if prefix.first_computes and prefix.depth == 1:
            return Trial("the only frozen block hands on more than its states, which has to be computed for each batch")
        prefix.offer(_kept(states, table))
        try:
            again = source.loss(batch)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            return Trial(f"it does not work on stored states ({type(error).__name__}: {str(error).splitlines()[0]})")
        finally:
            prefix.offer(None)
    if states.shape[1:2] == (rows,) and rows > 1:  # which of the two were the rows?
        return trial(source, prefix, prepared, rows - 1)
    if not abs(again - whole) <= TOLERANCE * abs(whole):
        return Trial(f"with stored states the loss is {again:g} instead of {whole:g}")
    if not all(_same(plain.get(depth), caught.get(depth), table) for depth in watched):
        return Trial("with stored states the blocks above them give something else")
    known = prepared.manifest  # the rows that were tried are among the shortest
    positions = known.tokens / max(1, known.rows) if _by_length(states, table) else float(states.shape[1])
    weights = sum(
        getattr(parameter, "ds_numel", parameter.numel()) for block in prefix.blocks for parameter in block.parameters()
    )
    # A convolution's weights are used at each place of its output: (rows, channels, height, width).
    uses = float(states.shape[2:].numel()) if states.dim() == 4 else positions
    return Trial(None, positions * states[0, 0].numel() * states.element_size(), 2.0 * weights * uses)


def _kept(states: torch.Tensor, table: Any) -> torch.Tensor:
    """The states as they come back from storage: zeros behind each row's last token, where they have its positions."""
    if not _by_length(states, table):
        return states
    kept = states.clone()
    for place, length in enumerate(table.column("length").to_pylist()):
        kept[place, length:] = 0
    return kept


def _same(one: Any, other: Any, table: Any) -> bool:
    """Are two outputs of a block equal within TOLERANCE, up to each row's last token?"""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is None and other is None
    if one.shape != other.shape:
        return False
    one, other = _kept(one, table).float(), _kept(other, table).float()
    room = TOLERANCE * float(one.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=room, equal_nan=True)


def _by_length(states: torch.Tensor, table: Any) -> bool:
    """Do the states have a position for each token, so that those behind a row's last one are padding?"""
    return states.dim() >= 3 and states.shape[1] == max(table.column("length").to_pylist())


def compute(
    source: Source,
    prepared: Prepared,
    writers: dict[int, Writer],
    *,
    rank: int,
    world: int,
    batch_size: int,
    watch: Watch,
    told: Callable[[int], None] = lambda rows: None,
) -> dict[int, Part]:
    """Writes what the blocks give for the rows `rank`, `rank + world`, … of a split, at each depth of `writers`.

    Collective where weights are sharded: all ranks make as many forward passes. `told` is called with the rows done.
    """
    network, done, spent = source.network, 0, dict.fromkeys(writers, 0.0)
    shards = prepared.manifest.shards
    try:
        # Sharded weights are gathered block by block, and given back by those above.
        ending = not sharded(source.module)
        at: dict[int, float] = {}
        with torch.no_grad(), captured(source.module, source.blocks, list(writers), ending, at) as caught:
            for table in strided(prepared.folder, shards, rank=rank, world=world, batch_size=batch_size):
                own = table if table.num_rows else first_row(prepared.folder, shards)
                begun = time.perf_counter()
                with suppress(Enough):
                    network.task.forward(network.model, network.batch(own))
                spent = {depth: seconds + at[depth] - begun for depth, seconds in spent.items()}
                if table.num_rows:
                    for depth, writer in writers.items():
                        _write(writer, table, caught[depth])
                done += table.num_rows
                told(done)
        with watch.busy("storing the frozen blocks"):
            return {depth: writer.close(spent[depth]) for depth, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise


def _write(writer: Writer, table: Any, states: torch.Tensor) -> None:
    lengths = table.column("length").to_pylist() if _by_length(states, table) else [states.shape[1]] * table.num_rows
    host = states.cpu()
    for number, state, length in zip(table.column("position").to_pylist(), host, lengths, strict=True):
        writer.add(number, state[:length])


def fill(
    recipe: Recipe,
    source: Source,
    prefix: Prefix,
    prepared: dict[str, Prepared],
    passes: dict[str, float] | None,
    *,
    identity: str,
    emit: Callable[[dict[str, Any]], None],
    watch: Watch,
) -> Prefix | None:
    """Opens the stored states of every split, after they were computed where they are missing; collective.

    `passes` says how often each split will be passed through; None: they are wanted whatever they cost. None is given
    where storing would cost more than it saves, or does not work with this model; the reason is told.
    """
    stage = int(recipe.deepspeed.zero_stage)
    folders = {
        split: states_folder(data.folder, recipe, identity, prefix.depth, stage, prefix.first)
        for split, data in prepared.items()
    }
    missing: list[str] = _said([split for split, folder in folders.items() if found(folder) is None])
    if missing:
        size = 2 * recipe.train.micro_batch_size
        tried = trial(source, prefix, next(iter(prepared.values())), size)
        dear = None
        if passes is not None and recipe.model.cache_frozen == "auto":
            rows = {split: data.manifest.rows for split, data in prepared.items()}
            dear = tried.cost(rows, passes, missing, recipe).too_dear()
        why: str | None = _said(tried.why_not or dear)
        if why is not None:
            if recipe.model.cache_frozen == "on":
                raise ModelError(f"model.cache_frozen: impossible with this model: {why}; auto or off fits")
            emit({"event": "note", "text": f"the output of the frozen blocks is not stored: {why}"})
            return None
        for split in missing:
            _compute_all(source, prefix.depth, prepared[split], folders[split], size, emit, watch)
    else:
        _acquaint(source, prepared["train"])
    with watch.busy("fetching the frozen blocks"):
        for split, folder in folders.items():
            prefix.stores[split] = States(folder)
        together()
    return prefix


def _acquaint(source: Source, prepared: Prepared) -> None:
    """One pass of one row, in which the stand-ins see what their blocks give beside the states; collective."""
    network = source.network
    with torch.no_grad():
        network.task.forward(network.model, network.batch(first_row(prepared.folder, prepared.manifest.shards)))


def _said(value: Any) -> Any:
    """What rank 0 says, on every rank."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _compute_all(
    source: Source,
    depth: int,
    prepared: Prepared,
    folder: str,
    size: int,
    emit: Callable[[dict[str, Any]], None],
    watch: Watch,
) -> None:
    """Computes and commits the states of a split; each rank a part."""
    rank, world, rows = dist.get_rank(), dist.get_world_size(), prepared.manifest.rows

    def told(done: int) -> None:
        watch.at("computing the frozen blocks")
        emit({"event": "stage", "name": "computing the frozen blocks", "done": min(done * world, rows), "total": rows})

    writers = {depth: Writer(folder, _said(new_attempt()), rank)}
    part = compute(source, prepared, writers, rank=rank, world=world, batch_size=size, watch=watch, told=told)[depth]
    together()  # whoever uploads more slowly is not waited for in a collective
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, part)
    if rank == 0:
        commit(folder, parts)
    dist.barrier()
