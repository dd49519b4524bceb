"""What the workers get is exactly what `Order` says, through real Ray Data and Ray Train."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayft import storage
from rayft.data import feed, read
from rayft.data.feed import Feed, Shares, Windows, train_dataset
from rayft.data.order import Chunk, Order, Position
from rayft.data.read import first_row, strided
from rayft.data.window import Cutter, Share, local_shares, order_of, windows_at_once
from rayft.errors import Damaged, TrainingError
from rayft.tasks.task import Columns, Task

ROWS = (1, 3, 517, 1037)


class Noise(Task):
    """Adds a random number to each row's only token."""

    type: Literal["noise"] = "noise"

    @property
    def varies(self) -> bool:
        return True

    def arrow_schema(self, evaluation: bool) -> pa.Schema:
        return pa.schema({"tokens": pa.list_(pa.int32())})

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        return {"tokens": [[int(rng.integers(1_000_000)) for _ in tokens] for tokens in features["tokens"]]}


class Logged(Noise):
    """Leaves a file for each window of 64 rows that is read."""

    type: Literal["logged"] = "logged"  # type: ignore[assignment]
    folder: str

    def vary(self, features: Columns, rng: np.random.Generator) -> Columns:
        Path(self.folder, str(features["tokens"][0][0] // 64)).touch()
        return features


class Blocks:
    """Blocks by hand, where a test is about what they hold and not about their way."""

    def __init__(self, blocks: list[pa.Table]):
        self._blocks = blocks

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        yield from self._blocks


def prepare(folder: Path, rows: int, group: int = 64, width: int = 3) -> list[dict[str, Any]]:
    """Writes a prepared split of shards of three row groups each, and returns the manifest's `shards`."""
    shards = []
    for first in range(0, rows, 3 * group):
        ids = np.arange(first, min(rows, first + 3 * group), dtype=np.int64)
        lengths = 1 + (ids * 7919) % 37
        tokens = pa.array([[int(i)] * width for i in ids], pa.list_(pa.int32()))
        table = pa.table({"tokens": tokens, "row_id": ids, "length": lengths.astype(np.int32)})
        path = f"shard-{len(shards):05d}.parquet"
        pq.write_table(table, folder / path, row_group_size=group)
        groups = [min(group, len(ids) - begin) for begin in range(0, len(ids), group)]
        shards.append({"path": path, "rows": len(ids), "row_groups": groups, "bytes": table.nbytes})
    return shards


def order(shards: list[dict[str, Any]], size: int, shuffle: bool = True, window_rows: int = 128) -> Order:
    chunks = [Chunk(i, group, rows) for i, s in enumerate(shards) for group, rows in enumerate(s["row_groups"])]
    return Order(chunks, size, seed=5, shuffle=shuffle, window_rows=window_rows)


def by_hand(
    folder: Path, shards: list[dict[str, Any]], own: Order, total: int, world: int, **options: Any
) -> list[list[Share]]:
    """The shares of every rank, from reading tasks called here."""
    start = options.get("start", Position())
    source = Windows(str(folder), shards, own, start, total, world, options.get("task"))
    windows = [list(task()) for task in source.get_read_tasks()]
    return [
        list(Shares(Blocks([blocks[rank] for blocks in windows]), own, start, world, rank, options.get("micro", 4)))
        for rank in range(world)
    ]


def ids(table: pa.Table) -> list[int]:
    return table["row_id"].to_pylist()


def global_batches(shares: list[list[Share]]) -> list[list[int]]:
    """The sorted rows of each step's global batch; checks that the ranks are at the same step."""
    batches = []
    for step in zip(*shares, strict=True):
        assert len({(s.epoch, s.step, s.rows_total, len(s.micro)) for s in step}) == 1
        batches.append(sorted(row for s in step for row in ids(s.rows)))
        assert len(batches[-1]) == step[0].rows_total
    return batches


@pytest.mark.parametrize(("rows", "size"), [*itertools.product(ROWS, (8, 32))])
def test_each_row_comes_once_in_the_same_batches_on_any_number_of_ranks(tmp_path: Path, rows: int, size: int) -> None:
    shards = prepare(tmp_path, rows)
    own = order(shards, size)
    alone = global_batches(by_hand(tmp_path, shards, own, 2 * own.steps_per_epoch, 1))
    for epoch in (0, 1):
        part = alone[epoch * own.steps_per_epoch : (epoch + 1) * own.steps_per_epoch]
        assert sorted(itertools.chain(*part)) == list(range(rows))
    for world in (2, 3, 4):
        assert global_batches(by_hand(tmp_path, shards, own, 2 * own.steps_per_epoch, world)) == alone


def test_shares_hold_the_rows_of_the_order_and_their_micro_batches(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 517)
    own = order(shards, 8)
    for shares in by_hand(tmp_path, shards, own, own.steps_per_epoch + 5, 3, micro=2):
        assert [share.step for share in shares] == list(range(own.steps_per_epoch + 5))
        for share in shares:
            assert share.rows["tokens"].to_pylist() == [[i] * 3 for i in ids(share.rows)]
            assert [row for table in share.micro for row in ids(table)] == ids(share.rows)
            assert all(table.num_rows <= 2 for table in share.micro)
            assert share.spare.num_rows == 1


def test_a_rank_without_rows_gets_as_many_empty_micro_batches_and_a_spare_row(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 3)
    shares = by_hand(tmp_path, shards, order(shards, 8), 1, 4)
    assert [[table.num_rows for table in share.micro] for (share,) in shares] == [[1], [1], [1], [0]]
    last = shares[3][0]
    assert last.spare.schema == last.micro[0].schema
    assert last.spare.num_rows == 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_from_any_position_is_the_tail_of_the_untouched_run(tmp_path: Path, shuffle: bool) -> None:
    shards = prepare(tmp_path, 517)
    own = order(shards, 8, shuffle)
    total = 3 * own.steps_per_epoch - 7
    whole = by_hand(tmp_path, shards, own, total, 2)
    for step in np.random.default_rng(0).integers(0, total, 12):
        tail = by_hand(tmp_path, shards, own, total, 2, start=own.position(int(step)))
        for rank in (0, 1):
            assert [(s.step, ids(s.rows)) for s in tail[rank]] == [(s.step, ids(s.rows)) for s in whole[rank][step:]]


def test_resume_reads_nothing_before_its_window(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 1037)
    own = order(shards, 8, shuffle=False)
    for shard in shards[:3]:
        (tmp_path / shard["path"]).unlink()
    start = Position(0, 80)  # row 640, the first of the sixth window, in the fourth shard
    assert global_batches(by_hand(tmp_path, shards, own, own.steps_per_epoch, 2, start=start))[0] == list(
        range(640, 648)
    )


@pytest.mark.parametrize("world", [1, 3, 20])
def test_workers_that_read_themselves_get_the_same(tmp_path: Path, world: int) -> None:
    shards = prepare(tmp_path, 1037)
    own = order(shards, 32)
    total, start = 2 * own.steps_per_epoch, own.position(5)
    streamed = by_hand(tmp_path, shards, own, total, 1, start=start)[0]
    found = [
        list(local_shares(str(tmp_path), shards, Cutter(own, world, rank, 4), start, total, None))
        for rank in range(world)
    ]
    assert global_batches(found) == global_batches([streamed])
    assert [share.step for share in found[0]] == list(range(5, total))
    if world == 3:
        for mine, theirs in zip(found, by_hand(tmp_path, shards, own, total, 3, start=start), strict=True):
            assert [ids(share.rows) for share in mine] == [ids(share.rows) for share in theirs]


@pytest.mark.parametrize(
    ("wanted", "size", "varies", "streamed"),
    [
        ("auto", 2**20, False, False),
        ("auto", 2**20, True, True),
        ("auto", 2**30, False, True),
        ("on", 1, False, True),
        ("off", 2**30, True, False),
    ],
)
def test_who_reads_for_the_workers(wanted: Any, size: int, varies: bool, streamed: bool) -> None:
    assert feed.streams(wanted, [{"bytes": size / 2}] * 2, varies) is streamed


def test_a_lost_shard_is_told_in_a_sentence(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 517)
    (tmp_path / shards[1]["path"]).unlink()
    with pytest.raises(Damaged, match=r"shard-00001\.parquet: is missing$"):
        by_hand(tmp_path, shards, order(shards, 8), 65, 2)


def test_a_harmed_shard_is_noticed_wherever_the_harm_is(tmp_path: Path) -> None:
    """Every bit counts: what is read is what was written, or Damaged says which file of which preparation it is."""
    table = pa.table({"row_id": list(range(4000)), "tokens": [[i % 7] * (i % 40) for i in range(4000)]})
    path, rng = tmp_path / "key" / "attempt" / "00000.parquet", random.Random(5)
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, row_group_size=1000, compression="zstd", write_page_checksum=True)
    content, noticed = path.read_bytes(), []
    for _ in range(60):
        harmed = bytearray(content)
        harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
        path.write_bytes(harmed)
        try:
            with read._parquet(str(path)) as file:
                assert pa.concat_tables([file.read_row_group(group) for group in range(4)]).equals(table)
        except Damaged as error:
            noticed.append((error.folder, error.file))
    assert set(noticed) == {(str(tmp_path / "key"), str(path))}
    assert len(noticed) > 45  # the rest fell on what nobody reads, such as the writer's name


def test_rows_vary_by_epoch_and_not_by_the_number_of_ranks(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 70)
    own = order(shards, 8)

    def values(world: int, start: Position = Position()) -> dict[tuple[int, int], list[int]]:  # noqa: B008
        total = 2 * own.steps_per_epoch
        shares = by_hand(tmp_path, shards, own, total, world, start=start, task=Noise())
        return {
            (share.epoch, row): tokens
            for share in itertools.chain(*shares)
            for row, tokens in zip(ids(share.rows), share.rows["tokens"].to_pylist(), strict=True)
        }

    alone = values(1)
    assert len(alone) == 140
    assert len({tuple(tokens) for tokens in alone.values()}) == 140
    assert values(3) == alone
    resumed = values(2, Position(0, 4))
    assert resumed == {key: alone[key] for key in resumed}


def test_a_block_that_was_not_to_come_is_an_error_and_no_wrong_training(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 517)
    own = order(shards, 8)
    blocks = list(Windows(str(tmp_path), shards, own, Position(), 40, 2, None).get_read_tasks()[0]())
    for given, start, rank in ((1, Position(), 0), (0, Position(0, 1), 0), (0, Position(1, 0), 0)):
        with pytest.raises(TrainingError, match=rf"rank {rank} of 2 .* epoch {start.epoch}, step {start.step}"):
            list(Shares(Blocks([blocks[given]]), own, start, 2, rank, 4))


def test_a_reading_task_is_small_to_send(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 5000)
    source = Windows(str(tmp_path), shards, order(shards, 8), Position(), 10_000, 2, Noise())
    assert max(len(ray.cloudpickle.dumps(task)) for task in source.tasks) < 6_000


@pytest.mark.parametrize(("rows", "world"), [*itertools.product(ROWS, (1, 2, 3, 4))])
def test_evaluation_sees_each_row_once_and_ranks_keep_step(tmp_path: Path, rows: int, world: int) -> None:
    shards = prepare(tmp_path, rows)
    ranks = [list(strided(str(tmp_path), shards, rank, world, 4)) for rank in range(world)]
    assert len({len(tables) for tables in ranks}) == 1
    assert all(table.num_rows <= 4 for tables in ranks for table in tables)
    for rank, tables in enumerate(ranks):
        seen = list(itertools.chain(*map(ids, tables)))
        assert sorted(seen) == list(range(rank, rows, world))
        assert all(table.schema == tables[0].schema for table in tables)
    assert first_row(str(tmp_path), shards)["row_id"].to_pylist() == [0]


def test_evaluation_wastes_little_padding(tmp_path: Path) -> None:
    shards = prepare(tmp_path, 1024)
    tables = list(strided(str(tmp_path), shards, 0, 1, 8))
    padded = sum(table.num_rows * max(table["length"].to_pylist()) for table in tables)
    assert sum(sum(table["length"].to_pylist()) for table in tables) / padded > 0.96


@pytest.mark.parametrize(
    ("world", "window_bytes", "windows"),
    [(1, 2**20, 1), (15, 2**20, 1), (16, 2**20, 2), (64, 2**20, 8), (4096, 2**20, 64), (4096, 2**26, 1), (64, 0, 8)],
)
def test_many_ranks_get_several_windows_at_once_where_these_are_small(
    world: int, window_bytes: float, windows: int
) -> None:
    assert windows_at_once(world, window_bytes) == windows


@pytest.mark.parametrize("start", [Position(), Position(0, 5), Position(1, 9)])
def test_several_windows_at_once_are_the_same_batches(tmp_path: Path, start: Position) -> None:
    shards = prepare(tmp_path, 1037)
    own = order(shards, 48, window_rows=96)
    total = 2 * own.steps_per_epoch
    alone = global_batches(by_hand(tmp_path, shards, own, total, 1, start=start))
    together = by_hand(tmp_path, shards, own, total, 24, start=start)
    assert global_batches(together) == alone
    assert [share.step for share in together[23]] == list(range(own.step(start), total))
    few, many = (Windows(str(tmp_path), shards, own, start, total, world, None).tasks for world in (24, 1))
    assert len(few) < 0.5 * len(many)


def test_an_order_is_made_from_a_manifest(tmp_path: Path) -> None:
    own = order_of(prepare(tmp_path, 517), 32, 0, True)
    assert (own.rows, own.steps_per_epoch, own.windows_per_epoch) == (517, 17, 1)


def test_object_storage_feeds_the_same(tmp_path: Path, s3: str) -> None:
    shards = prepare(tmp_path, 517)
    own = order(shards, 8)
    storage.upload(str(tmp_path), f"{s3}/feed")
    source = Windows(f"{s3}/feed", shards, own, Position(), 65, 2, None)
    local = Windows(str(tmp_path), shards, own, Position(), 65, 2, None)
    assert [list(task()) for task in source.tasks] == [list(task()) for task in local.tasks]
    assert list(strided(f"{s3}/feed", shards, 1, 2, 8)) == list(strided(str(tmp_path), shards, 1, 2, 8))


# Through Ray


def through_ray(dataset: ray.data.Dataset, own: Order, start: Position, world: int) -> list[list[Share]]:
    """Every rank's shares, where rank 0 takes one and then none until all other ranks have taken all of theirs."""
    splits = dataset.streaming_split(world, equal=False)
    shares: list[list[Share]] = [[] for _ in range(world)]
    others = threading.Barrier(world)

    def consume(rank: int) -> None:
        for share in Shares(splits[rank], own, start, world, rank, 4):
            shares[rank].append(share)
            if rank == 0 and len(shares[0]) == 1:
                others.wait(timeout=120)
        if rank or not shares[0]:
            others.wait(timeout=120)

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=180)
    return shares


@pytest.mark.parametrize(
    ("rows", "world", "done"),
    [
        pytest.param(1037, 1, 0, marks=pytest.mark.slow),
        pytest.param(1037, 2, 55, marks=pytest.mark.slow),
        (1037, 3, 20),
        pytest.param(517, 4, 64, marks=pytest.mark.slow),
        pytest.param(3, 4, 0, marks=pytest.mark.slow),
        pytest.param(517, 2, 130, marks=pytest.mark.slow),  # nothing is left to do
    ],
)
def test_the_split_is_exact_at_any_speed_of_the_consumers(
    ray_local: None, tmp_path: Path, rows: int, world: int, done: int
) -> None:
    shards = prepare(tmp_path, rows)
    own = order(shards, 8, window_rows=64)
    total = 2 * own.steps_per_epoch
    start = own.position(done)
    dataset = train_dataset(str(tmp_path), shards, own, start=start, total_steps=total, world=world)
    shares = through_ray(dataset, own, start, world)
    expected = by_hand(tmp_path, shards, own, total, world, start=start)
    for rank in range(world):
        assert [(s.step, ids(s.rows)) for s in shares[rank]] == [(s.step, ids(s.rows)) for s in expected[rank]]


@pytest.mark.slow
def test_a_worker_learns_which_file_failed(ray_local: None, tmp_path: Path) -> None:
    shards = prepare(tmp_path, 517)
    own = order(shards, 8)
    (tmp_path / shards[1]["path"]).unlink()
    dataset = train_dataset(str(tmp_path), shards, own, start=Position(), total_steps=65, world=1)
    with pytest.raises(Damaged, match=r"shard-00001\.parquet: is missing"):
        list(Shares(dataset.streaming_split(1)[0], own, Position(), 1, 0, 4))


@pytest.mark.slow
def test_reading_stays_a_few_windows_ahead(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "AHEAD_BYTES", 2**18)
    shards = prepare(tmp_path, 3072, width=256)
    own = order(shards, 8, shuffle=False, window_rows=64)  # 48 windows of 64 KiB: with two being read, 6 fit
    total, log = own.steps_per_epoch, tmp_path / "log"
    log.mkdir()
    dataset = train_dataset(
        str(tmp_path), shards, own, start=Position(), total_steps=total, world=1, task=Logged(folder=str(log))
    )
    ahead = []
    for share in Shares(dataset.streaming_split(1)[0], own, Position(), 1, 0, 4):
        if share.step == 0:
            threading.Event().wait(3.0)  # nothing tells that no more will be read; without a limit all is by now
        ahead.append(len(list(log.iterdir())) - share.step // own.steps_per_window)
    assert len(ahead) == total
    assert 2 <= max(ahead) <= 12


def committed_position(path: str) -> Callable[[], Position]:
    return lambda: Position(*json.loads(Path(path).read_text())) if os.path.exists(path) else Position()


def work(config: dict[str, Any]) -> None:
    """Logs each step's rows; commits after step 20 and dies after step 30 of the first attempt."""
    from ray.train.collective import barrier

    context = ray.train.get_context()
    rank, world, own = context.get_world_rank(), context.get_world_size(), config["order"]
    commit = Path(config["commit"])
    start = committed_position(config["commit"])()
    split = ray.train.get_dataset_shard(Feed.NAME)
    with Path(config["log"], f"rank{rank}-from{own.step(start)}.jsonl").open("w") as log:
        shares = Shares(split, own, start, world, rank, 4)
        for share in shares:
            log.write(json.dumps([share.step, ids(share.rows)]) + "\n")
            log.flush()
            barrier()
            if rank == 0 and share.step + 1 == 20 and not commit.exists():
                position = own.position(share.step + 1)
                commit.write_text(json.dumps([position.epoch, position.step]))
            if own.step(start) == 0 and share.step + 1 == 30:
                raise RuntimeError("killed on purpose")
        log.write(json.dumps(["waited", shares.waited]))


@pytest.mark.slow
def test_ray_train_gets_the_order_and_goes_on_from_the_last_commit(ray_local: None, tmp_path: Path) -> None:
    data, log = tmp_path / "data", tmp_path / "log"
    data.mkdir()
    log.mkdir()
    shards = prepare(data, 517)
    own = order(shards, 8)
    total = own.steps_per_epoch + 9
    commit = str(tmp_path / "position.json")
    trainer = TorchTrainer(
        work,
        train_loop_config={"order": own, "commit": commit, "log": str(log)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 3}),  # all there are
        run_config=RunConfig(
            name="feed", storage_path=str(tmp_path / "runs"), failure_config=FailureConfig(max_failures=1)
        ),
        datasets=Feed.datasets(),
        dataset_config=Feed(str(data), shards, own, total, committed_position(commit)),
    )
    trainer.fit()
    expected = by_hand(data, shards, own, total, 2)
    for rank in (0, 1):
        rows = [[share.step, ids(share.rows)] for share in expected[rank]]
        first = [json.loads(line) for line in (log / f"rank{rank}-from0.jsonl").read_text().splitlines()]
        second = [json.loads(line) for line in (log / f"rank{rank}-from20.jsonl").read_text().splitlines()]
        assert first == rows[:30]
        assert second[:-1] == rows[20:]
        assert second[-1][0] == "waited"
        assert second[-1][1] > 0


@ray.remote(num_cpus=0)
class Consumer:
    """A worker that takes its shares and watches its own memory."""

    def consume(self, iterator: Any, own: Order, world: int, rank: int) -> tuple[int, int]:
        """Rows taken, and the peak of this process's own memory in bytes."""
        import psutil

        rows, peak, process = 0, 0, psutil.Process()
        for share in Shares(iterator, own, Position(), world, rank, 64):
            rows += share.rows.num_rows
            if share.step % 10 == 0:
                peak = max(peak, process.memory_full_info().uss)
        return rows, peak


@pytest.mark.slow
def test_memory_of_driver_and_workers_does_not_grow_with_the_rows(ray_local: None, tmp_path: Path) -> None:
    import psutil

    driver, peaks = [], []
    for rows in (10_000, 200_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        shards = prepare(folder, rows, group=512, width=100)
        own = order_of(shards, 128, seed=0, shuffle=True)
        steps = own.steps_per_epoch
        dataset = train_dataset(str(folder), shards, own, start=Position(), total_steps=steps, world=2)
        workers = [Consumer.remote() for _ in range(2)]
        splits = dataset.streaming_split(2, equal=False)
        taken = ray.get([worker.consume.remote(splits[rank], own, 2, rank) for rank, worker in enumerate(workers)])
        assert sum(count for count, _ in taken) == rows
        driver.append(psutil.Process().memory_full_info().uss >> 20)
        peaks.append(max(peak for _, peak in taken) >> 20)
        for worker in workers:
            ray.kill(worker)
    assert peaks[1] - peaks[0] < 40, peaks  # a window is 2 MB; an epoch of 200,000 rows is 80 MB
    assert driver[1] - driver[0] < 60, driver
