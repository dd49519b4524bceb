"""Checkpoints: written by any number of workers at any ZeRO stage, read by any other; and what is refused."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from group import run_group
from rayft import storage
from rayft.errors import CheckpointError, Damaged
from rayft.training import checkpoint, checkpoints
from runs import losses_of, order_of_loading, plain, unfrozen_gradually
from test_loop import STEPS, plain_loop

Place = tuple[int, int]  # (workers, ZeRO stage)
SAVED, UNTIL = 4, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "frozen": {"model__freeze": 1, "train__layer_lr_decay": 0.9},
    "lora": {"model__lora": "{r: 3}"},
    "unfreezing": {"model__freeze": "all", "model__unfreeze_every": 1},
    "dropout": {"model__dropout": 0.1},
}
STEPS_PER_EPOCH = {"unfreezing": 3}  # saved in the middle of the second epoch, and another depth before and after it
SOME: list[Place] = [(1, 0), (2, 1), (2, 2), (3, 3)]
WRITERS = {variant: [*SOME, (2, 0), (2, 3), (3, 1)] if variant == "whole" else SOME for variant in VARIANTS}
FEW: list[tuple[Place, Place]] = [((2, 2), (1, 0)), ((3, 3), (2, 1)), ((2, 2), (3, 3)), ((1, 0), (2, 2))]
MORE: list[tuple[Place, Place]] = [
    ((2, 3), (1, 0)), ((3, 1), (2, 3)), ((1, 0), (3, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 0)), ((2, 2), (3, 1)),
    ((2, 0), (3, 3)), ((2, 1), (2, 2)),
]  # fmt: skip
CHANGES = {"whole": [*FEW, *MORE], "frozen": FEW, "lora": FEW, "unfreezing": FEW, "dropout": []}


class Runs:
    """Losses of runs that were left alone, by (variant, place), and of runs that went on, by (variant, from, to)."""

    def __init__(self, folder: Path, bert: str) -> None:
        self.folder, self.bert = folder, bert
        self.untouched: dict[tuple[str, Place], list[float]] = {}
        self.resumed: dict[tuple[str, Place, Place], list[float]] = {}

    def group(self, workers: int) -> None:
        """In one worker group: writes what is not yet written there, then goes on from whatever is there to be read."""
        writes = [
            (v, p) for v, places in WRITERS.items() for p in places if p[0] == workers and (v, p) not in self.untouched
        ]
        there = {*self.untouched, *writes}
        pairs = [(v, w, r) for v in VARIANTS for w, r in [*CHANGES[v], *((p, p) for p in WRITERS[v])]]
        reads = [
            (v, w, r) for v, w, r in pairs if r[0] == workers and (v, w) in there and (v, w, r) not in self.resumed
        ]
        cases = [{**self.case(v, p), "save": {SAVED: self.run(v, p)}} for v, p in writes]
        cases += [{**self.case(v, r), "start": self.saved(v, w)} for v, w, r in reads]
        found = [case["losses"] for case in run_group(losses_of, workers, self.bert, cases)[0]]
        self.untouched |= dict(zip(writes, found[: len(writes)], strict=True))
        self.resumed |= dict(zip(reads, found[len(writes) :], strict=True))

    def case(self, variant: str, place: Place) -> dict[str, Any]:
        return {
            "recipe": self.recipe(variant, place),
            "until": UNTIL,
            "steps_per_epoch": STEPS_PER_EPOCH.get(variant, STEPS),
            "between": str(self.folder / "between" / f"{len(self.untouched)}-{variant}-{place[0]}-{place[1]}"),
        }

    def recipe(self, variant: str, place: Place) -> dict[str, Any]:
        return plain(deepspeed__zero_stage=place[1], **VARIANTS[variant])

    def run(self, variant: str, place: Place) -> str:
        return str(self.folder / f"{variant}-{place[0]}-{place[1]}")

    def saved(self, variant: str, place: Place) -> str:
        return storage.join(self.run(variant, place), "checkpoints", checkpoints.folder_name(SAVED, 1))


@pytest.fixture(scope="module")
def runs(bert: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"), bert)
    for workers in (2, 1, 3, 2):
        made.group(workers)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["whole", "frozen", "lora", "unfreezing"])
def test_losses_depend_neither_on_workers_nor_on_the_stage(runs: Runs, variant: str) -> None:
    alone = runs.untouched[variant, (1, 0)]
    assert len(alone) == UNTIL
    for place in WRITERS[variant]:
        assert runs.untouched[variant, place] == pytest.approx(alone, rel=1e-5), place


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["whole", "frozen", "lora", "unfreezing"])
def test_a_run_goes_on_at_another_number_of_workers_and_stage(runs: Runs, variant: str) -> None:
    for writer, reader in CHANGES[variant]:
        expected = runs.untouched[variant, writer][SAVED:]
        assert runs.resumed[variant, writer, reader] == pytest.approx(expected, rel=1e-5), (writer, reader)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_bit_equal_at_the_same_place(runs: Runs, variant: str) -> None:
    for place in WRITERS[variant]:
        assert runs.resumed[variant, place, place] == runs.untouched[variant, place][SAVED:], place


@pytest.mark.slow
def test_only_what_learns_is_stored_in_float32(runs: Runs) -> None:
    with checkpoint.Checkpoint(runs.saved("frozen", (2, 2))) as saved:
        assert not any(name.startswith(("bert.embeddings", "bert.encoder.layer.0.")) for name in saved.names)
        assert any(name.startswith("bert.encoder.layer.1.") for name in saved.names)
        assert {saved.step_of(name) for name in saved.names} == {SAVED}
        assert saved.read("classifier.weight", "exp_avg", 0, 96).dtype == torch.float32
    with checkpoint.Checkpoint(runs.saved("lora", (3, 3))) as saved:
        assert all("lora_" in name or "modules_to_save" in name for name in saved.names)


@pytest.mark.slow
def test_without_the_moments_the_losses_would_differ(runs: Runs, tmp_path: Path) -> None:
    """Of what the tests above would not see otherwise: that 1e-5 tells a resumed optimizer from a new one."""
    alone = runs.untouched["whole", (1, 0)]
    case = {
        "recipe": runs.recipe("whole", (1, 0)),
        "until": UNTIL,
        "start": runs.saved("whole", (2, 2)),
        "forget": True,
    }
    found = run_group(losses_of, 1, runs.bert, [case])[0][0]["losses"]
    assert found[0] == pytest.approx(alone[SAVED], rel=1e-5)
    assert max(abs(a / b - 1) for a, b in zip(found, alone[SAVED:], strict=True)) > 1e-4


# --- gradual unfreezing


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stages"), [(2, [0, 1, 2, 3]), (3, [0, 3])])
def test_gradual_unfreezing_is_the_same_as_in_one_process_of_torch(
    bert: str, tmp_path: Path, workers: int, stages: list[int]
) -> None:
    """AdamW starts a parameter's moments and step counter with its first gradient, as a new cohort does here."""
    epoch, fields = 4, {"model__freeze": "all", "model__unfreeze_every": 1}
    cases = [{"recipe": plain(deepspeed__zero_stage=stage, **fields), "steps_per_epoch": epoch} for stage in stages]
    reference = plain_loop(bert, learns=lambda name, step: block_of(name) >= 2 - step // epoch or step // epoch >= 2)
    for results in run_group(unfrozen_gradually, workers, bert, str(tmp_path), cases):
        for stage, found in zip(stages, results, strict=True):
            assert found["losses"] == pytest.approx(reference, rel=1e-5), stage
            for name, counter in found["counters"].items():
                began = {2: 0, 1: 1, 0: 2, -1: 2}[block_of(name)] * epoch
                assert counter == STEPS - began, (stage, name)


def block_of(name: str) -> int:
    if "encoder.layer." in name:
        return int(name.split("encoder.layer.")[1][0])
    return -1 if "embeddings" in name else 2


# --- files that are not as they should be


class Small(torch.nn.Module):
    """Parameters that can't be cut evenly, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(5, 3)
        self.second = torch.nn.Linear(3, 1)
        self.frozen = torch.nn.Linear(3, 2)
        self.frozen.requires_grad_(False)


def stepped(network: Small) -> Any:
    """What looks like a stage 0 engine after one step."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network.second(network.first(torch.ones(2, 5))).sum().backward()
    optimizer.step()
    return SimpleNamespace(module=network, optimizer=optimizer, zero_optimization_stage=lambda: 0)


def write(
    folder: Path,
    network: Small,
    step: int = 7,
    attempt: int = 1,
    ranks: int = 2,
    commit: bool = True,
    best: str | None = None,
) -> Path:
    path = folder / "checkpoints" / checkpoints.folder_name(step, attempt)
    path.mkdir(parents=True)
    engine = stepped(network)
    for rank in range(ranks):
        tensors: dict[str, torch.Tensor] = {}
        index = checkpoint.snapshot(engine, {}, rank, ranks, tensors)
        checkpoint.write(str(path), rank, index, tensors)
    shapes = {name: list(p.shape) for name, p in network.named_parameters() if p.requires_grad}
    storage.write_json(str(path / "state.json"), {"step": step, "world": ranks, "shapes": shapes})
    if commit:
        storage.commit(str(path), {"step": step, "world": ranks, "best": best})
    return path


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_any_range_is_read_across_the_pieces(tmp_path: Path, ranks: int) -> None:
    network = Small()
    path = write(tmp_path, network, ranks=ranks)
    moments = stepped(Small()).optimizer.state
    with checkpoint.Checkpoint(str(path)) as saved:
        assert saved.names == {"first.weight", "first.bias", "second.weight", "second.bias"}
        whole = network.first.weight.detach().flatten()
        for start, length in [(0, 15), (0, 1), (6, 4), (7, 8), (14, 1)]:
            assert torch.equal(saved.read("first.weight", "master", start, length), whole[start : start + length])
        squares = next(iter(moments.values()))["exp_avg_sq"].flatten()
        assert torch.equal(saved.read("first.weight", "exp_avg_sq", 3, 9), squares[3:12])
        other = Small()
        torch.nn.init.zeros_(other.first.weight)
        saved.load_weights(other)
        assert torch.equal(other.first.weight, network.first.weight)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("rank-00001.safetensors", Path.unlink, "is missing"),
        ("rank-00001.safetensors", cut, "is not as it was written"),
        ("rank-00000.safetensors", flip, "is not as it was written"),
        ("rank-00001.json", Path.unlink, "is missing"),
        ("rank-00000.json", cut, "is not as it was written"),
        ("state.json", Path.unlink, "is missing"),
        ("state.json", cut, "is not as it was written"),
    ],
)
def test_a_harmed_file_is_named(tmp_path: Path, name: str, harm: Callable[[Path], None], says: str) -> None:
    path = write(tmp_path, Small())
    harm(path / name)
    with pytest.raises(Damaged, match=f"{path / name}: {says}") as found, checkpoint.Checkpoint(str(path)) as saved:
        saved.load_weights(Small())
    assert found.value.folder == str(path)


def test_gathered_indexes_are_read_in_place_of_the_ranks_own(tmp_path: Path) -> None:
    network = Small()
    path = write(tmp_path, network, ranks=5)
    with checkpoint.Checkpoint(str(path)) as saved:
        before = {name: saved.read(name, "exp_avg", 0, 1) for name in saved.names}
    checkpoint.gather(str(path), 5)
    for rank in range(5):
        (path / f"rank-{rank:05d}.json").unlink()
    with checkpoint.Checkpoint(str(path)) as saved:
        assert {name: saved.read(name, "exp_avg", 0, 1) for name in saved.names} == before
        assert {saved.step_of(name) for name in saved.names} == {1}
        other = Small()
        torch.nn.init.zeros_(other.first.weight)
        saved.load_weights(other)
        assert torch.equal(other.first.weight, network.first.weight)
    flip(path / "rank-00003.safetensors")
    with (
        checkpoint.Checkpoint(str(path)) as saved,
        pytest.raises(Damaged, match=r"rank-00003\.safetensors: is not as it was written"),
    ):
        saved.load_weights(Small())
    cut(path / "index.json")
    with checkpoint.Checkpoint(str(path)) as saved, pytest.raises(Damaged, match=r"index\.json: is not as"):
        saved.load_weights(Small())


def test_the_state_is_read_without_the_ranks_files(tmp_path: Path) -> None:
    path = write(tmp_path, Small(), ranks=3)
    for file in path.glob("rank-*"):
        file.unlink()
    with checkpoint.Checkpoint(str(path)) as saved:
        assert saved.state["step"] == 7


def test_a_piece_that_no_rank_wrote_is_missed(tmp_path: Path) -> None:
    path = write(tmp_path, Small())
    index = json.loads((path / "rank-00001.json").read_text())
    index["pieces"] = [entry for entry in index["pieces"] if entry["name"] != "first.weight"]
    (path / "rank-00001.json").write_text(json.dumps(index))
    with (
        checkpoint.Checkpoint(str(path)) as saved,
        pytest.raises(Damaged, match=r"first\.weight lacks 8 of 15"),
    ):
        saved.load_weights(Small())


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, Small())
    wider, renamed = Small(), Small()
    wider.second = torch.nn.Linear(4, 1)
    renamed.third = renamed.second
    del renamed.second
    with checkpoint.Checkpoint(str(path)) as saved:
        with pytest.raises(CheckpointError, match=r"second\.weight has shape \[1, 3\], the model \[1, 4\]"):
            saved.load_weights(wider)
        with pytest.raises(CheckpointError, match=r"holds second\.bias and 1 more that the model lacks"):
            saved.load_weights(renamed)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files from object storage lie while they are read."""
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "borrowed"


def remote(path: Path, s3: str, name: str) -> str:
    """The checkpoint in object storage, below `name`."""
    url = f"{s3}/{name}/checkpoints/{path.name}"
    storage.upload(str(path), url)
    return url


def test_a_remote_checkpoint_is_read_and_checked(tmp_path: Path, s3: str, copies: Path) -> None:
    network = Small()
    path = write(tmp_path, network)
    url = remote(path, s3, "checkpoint-tests")
    with checkpoint.Checkpoint(url) as saved:
        assert torch.equal(saved.read("first.bias", "master", 0, 3), network.first.bias.detach())
        assert any(copies.iterdir())
    assert not any(copies.iterdir())
    storage.write_bytes(f"{url}/rank-00000.safetensors", (path / "rank-00000.safetensors").read_bytes()[:-9])
    with (
        checkpoint.Checkpoint(url) as saved,
        pytest.raises(Damaged, match=f"{url}/rank-00000.safetensors: is not as"),
    ):
        saved.load_weights(Small())
    assert not any(copies.iterdir())
    storage.delete(f"{url}/rank-00000.safetensors")
    with checkpoint.Checkpoint(url) as saved, pytest.raises(Damaged, match=r"rank-00000\.safetensors: is missing"):
        saved.load_weights(Small())


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the names of files that are copied, and "checked" for each whose content is compared."""
    seen: list[str] = []
    fetch, checksum = storage.fetch, checkpoint._sha256
    monkeypatch.setattr(storage, "fetch", lambda url, file: (seen.append(Path(url).name), fetch(url, file)))
    monkeypatch.setattr(checkpoint, "_sha256", lambda file: (seen.append("checked"), checksum(file))[1])
    return seen


def test_ranks_of_a_machine_copy_and_check_a_remote_checkpoint_once(
    tmp_path: Path, s3: str, copies: Path, looked_at: list[str]
) -> None:
    network, others = Small(), [Small(), Small(), Small()]
    url = remote(write(tmp_path, network), s3, "copied-once")
    looked_at.clear()
    with contextlib.ExitStack() as stack:
        for other in others:
            torch.nn.init.zeros_(other.first.weight)
            stack.enter_context(checkpoint.Checkpoint(url)).load_weights(other)
    assert sorted(looked_at) == ["checked", "checked", "rank-00000.safetensors", "rank-00001.safetensors"]
    for other in others:
        assert torch.equal(other.first.weight, network.first.weight)
    assert not any(copies.iterdir())


@pytest.mark.parametrize(("rank", "files"), [(0, 2), (1, 0)])
def test_what_is_fetched_is_what_this_rank_reads_of_sharded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str], rank: int, files: int
) -> None:
    """Within the collectives nothing is copied or checked any more."""
    path = write(tmp_path, Small())
    looked_at.clear()
    network = Small()
    for parameter in network.parameters():
        parameter.ds_id = 0
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(checkpoint, "_whole", lambda parameter: contextlib.nullcontext(checkpoint._writes(parameter)))
    with checkpoint.Checkpoint(str(path)) as saved:
        saved.fetch(network)
        assert looked_at == files * ["checked"]
        saved.load_weights(network)
    assert looked_at == files * ["checked"]


@pytest.mark.slow
def test_a_run_goes_on_once_every_rank_has_what_it_reads(bert: str, tmp_path: Path) -> None:
    given = plain(deepspeed__zero_stage=3)
    first, second = run_group(order_of_loading, 2, bert, str(tmp_path / "run"), given)
    assert first == ["fetch", "check", "check", "together", "load_weights", "together", "load_moments", "together"]
    assert second == ["fetch", "together", "load_weights", "together", "load_moments", "check", "together"]
