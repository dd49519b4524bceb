"""The failure policy as a table: what happened, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
import ray.exceptions
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rayft.errors import (
    CheckpointError,
    ClusterError,
    Damaged,
    DataError,
    ModelError,
    NotFinite,
    OutOfMemory,
    RayftError,
    RunRefused,
    StorageDenied,
    StorageDown,
    StorageError,
    StorageMissing,
    Superseded,
    TrainingError,
    WorkersLost,
)
from rayft.launch.board import Place
from rayft.launch.failure import Decision, Left, advice, cause, decide
from rayft.recipe import Recipe

LOST = WorkersLost("rank 1 on 10.0.0.3 (process 7) was lost at step 9")
DOWN = StorageDown("s3://b/x: writing failed after 9 attempts in 75 s")
HARMED = Damaged("runs/a/checkpoints/step-000004-a1", "rank-00001.safetensors", "is missing")


@pytest.mark.parametrize(
    ("what", "again"),
    [
        (LOST, True),
        (DOWN, True),
        (HARMED, True),
        (Left("preemption", "10.0.0.3 is about to leave"), True),
        (Left("room", "there is room for more than 2 workers"), True),
        (Left("stop", "SIGTERM asks to stop"), False),
        (DataError("rows.csv, row 3: no label"), False),
        (ModelError("no such model"), False),
        (ClusterError("no room"), False),
        (RunRefused("another recipe"), False),
        (NotFinite(7, "loss"), False),
        (OutOfMemory("a worker ran out of memory"), False),
        (Superseded("runs/a", 3, "process 9 on b"), False),
        (StorageDenied("s3://b: access is denied"), False),
        (StorageMissing("s3://b/x does not exist"), False),
        (StorageError("/full: writing failed, the disk of /full is full"), False),
        (CheckpointError("another model"), False),
        (TrainingError("a worker failed: ValueError: a bug"), False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else "",
)
def test_what_is_tried_again(what: RayftError | Left, again: bool) -> None:
    assert decide(what, 0, False, 3).again is again


@pytest.mark.parametrize(
    ("what", "retries", "progress", "most", "expected"),
    [
        (LOST, 0, False, 3, (True, 1, "; retry 1 of 3 (failure.max_retries)")),
        (LOST, 2, False, 3, (True, 3, "; retry 3 of 3 (failure.max_retries)")),
        (LOST, 3, False, 3, (False, 3, "; 3 retries brought no progress (failure.max_retries), so the run was given up")),  # noqa: E501
        (LOST, 3, True, 3, (True, 1, "; retry 1 of 3 (failure.max_retries)")),
        (LOST, 0, False, 0, (False, 0, "; no retries are allowed (failure.max_retries), so the run was given up")),
        (LOST, 0, True, 0, (False, 0, "; no retries are allowed (failure.max_retries), so the run was given up")),
    ],
)  # fmt: skip
def test_tries_count_since_the_last_progress(
    what: RayftError, retries: int, progress: bool, most: int, expected: tuple[bool, int, str]
) -> None:
    again, counted, tail = expected
    assert decide(what, retries, progress, most) == Decision(again, counted, f"{what}{tail}")


def test_machines_that_come_and_go_use_up_no_tries() -> None:
    for why in ("preemption", "room"):
        assert decide(Left(why, "moving"), 2, False, 3) == Decision(True, 2, "moving")
        assert decide(Left(why, "moving"), 2, True, 0) == Decision(True, 0, "moving")


class Wrapped(Exception):
    """As Ray Train wraps what workers raised."""

    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("worker group error")
        self.worker_failures = failures


class User(Exception):
    def __init__(self, inner: BaseException) -> None:
        super().__init__("user exception")
        self._base_exc = inner


def died() -> BaseException:
    return ray.exceptions.ActorDiedError()


PEER = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234")
LATE = RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 660000ms for recv operation")
PLACES = [
    Place(rank, f"10.0.0.{rank}", f"n{rank}", 70 + rank, 9, "updating the weights", 5, 0.1, 0.1) for rank in (0, 1)
]


def recipe(**fields: Any) -> Recipe:
    plain = {
        "name": "a",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "rows.csv"},
        "train": {"epochs": 1, "micro_batch_size": 8},
    }
    return Recipe.parse({**plain, **fields})


@pytest.mark.parametrize(
    ("failures", "kind", "says"),
    [
        ({0: User(PEER), 1: died()}, WorkersLost, "rank 1 on 10.0.0.1 (process 71) was lost at step 9: "),
        ({0: User(PEER), 1: WorkerHealthCheckFailedError("failed", died())}, WorkersLost,
         "rank 1 on 10.0.0.1 (process 71) was lost at step 9: The actor died unexpectedly"),
        ({0: User(PEER), 1: User(PEER)}, WorkersLost, "rank 0 on 10.0.0.0 (process 70) was lost at step 9: "),
        ({0: User(LATE), 1: User(PEER)}, WorkersLost, "was lost at step 9: "),
        ({0: User(PEER), 1: User(NotFinite(9, "loss"))}, NotFinite, "step 9: the loss"),
        ({0: User(HARMED), 1: died()}, Damaged, "rank-00001.safetensors: is missing"),
        ({0: User(PEER), 1: User(ValueError("a bug\nin two lines"))}, TrainingError,
         "a worker failed (rank 1 on 10.0.0.1 (process 71), at step 9): ValueError: in two lines"),
        ({0: User(PEER), 1: User(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))}, OutOfMemory,
         "a worker ran out of memory; try train.micro_batch_size=4 (same model), or "),
        ({0: User(PEER), 1: User(MemoryError())}, OutOfMemory, "a worker ran out of memory; try "),
        ({0: ray.exceptions.OutOfMemoryError("killed, the node is running low on memory")}, OutOfMemory, "try "),
        ({5: died()}, WorkersLost, "a worker was lost: The actor died unexpectedly"),
    ],
)  # fmt: skip
def test_the_cause_among_what_workers_raised(
    failures: dict[int, BaseException], kind: type[RayftError], says: str
) -> None:
    found = cause(Wrapped(failures), PLACES, recipe())
    assert type(found) is kind
    assert says in str(found)


@pytest.mark.parametrize(
    "error",
    [ray.exceptions.OutOfMemoryError("killed, the node is running low on memory"), User(MemoryError())],
    ids=["killed", "refused"],
)
def test_a_machine_with_gpus_that_is_short_of_its_own_memory_is_not_told_to_spare_that_of_gpus(
    error: BaseException,
) -> None:
    fields = {"cluster": {"gpus_per_worker": 1}, "deepspeed": {"offload": "optimizer", "zero_stage": 2}}
    told = str(cause(Wrapped({0: User(PEER), 1: error}), PLACES, recipe(**fields)))
    assert told == (
        "a worker's machine ran out of its own memory, not of its GPUs'; try deepspeed.offload=none (same model), or "
        "deepspeed.zero_stage=3 (same model; one worker alone reads it whole), or machines with more of it, or with "
        "fewer workers each"
    )
    compiled = recipe(cluster={"gpus_per_worker": 1}, model={"path": "m", "compile": True})
    assert "; try machines with more of it" in str(cause(Wrapped({0: error}), PLACES, compiled))
    of_gpus = Wrapped({0: error, 1: User(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))})
    assert "a worker ran out of memory; try train.micro_batch_size=" in str(cause(of_gpus, PLACES, recipe(**fields)))


def broken(text: str, kind: type[Exception] = torch.distributed.DistBackendError) -> BaseException:
    return User(kind(text))


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("NCCL communicator was aborted on rank 1.", WorkersLost),
        (f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details)\nncclSystemError: a call", WorkersLost),
        (f"{NCCL}internal error\nncclInternalError: Internal check failed.", WorkersLost),
        (f"{NCCL}remote process exited or there was a network error\nncclRemoteError: A call failed", WorkersLost),
        ("[3] is setting up NCCL communicator: Connection closed by remote peer 10.0.0.2", WorkersLost),
        ("CUDA error: uncorrectable ECC error encountered", WorkersLost),
        ("Unable to determine the device handle: GPU has fallen off the bus", WorkersLost),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", WorkersLost),
        ("CUDA error: unspecified launch failure", WorkersLost),
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", OutOfMemory),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OutOfMemory),
        (f"{NCCL}unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", OutOfMemory),
        ("CUDA error: device-side assert triggered", TrainingError),
        ("CUDA error: an illegal memory access was encountered", TrainingError),
    ],
)
def test_what_errors_of_gpus_and_their_network_mean(text: str, kind: type[RayftError]) -> None:
    for failures in ({0: broken(text, RuntimeError)}, {0: User(PEER), 1: broken(text, RuntimeError)}):
        assert type(cause(Wrapped(failures), PLACES, recipe())) is kind


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (broken("whatever NCCL says next year"), WorkersLost),
        (broken("The client socket has failed", torch.distributed.DistNetworkError), WorkersLost),
        (broken("wait timeout after 600000ms", torch.distributed.DistStoreError), WorkersLost),
        (broken(f"{NCCL}ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0"), TrainingError),
    ],
)
def test_what_torch_says_of_a_broken_group_passes_unless_it_is_misused(
    failure: BaseException, kind: type[RayftError]
) -> None:
    assert type(cause(Wrapped({0: failure}), PLACES, recipe())) is kind


def test_where_a_rank_died_what_others_say_of_their_collectives_is_not_the_cause() -> None:
    for text in ("NCCL Error 3: of a new kind", "[gloo] another text"):
        assert type(cause(Wrapped({0: broken(text, RuntimeError)}), PLACES, recipe())) is TrainingError
        found = cause(Wrapped({0: broken(text, RuntimeError), 1: died()}), PLACES, recipe())
        assert type(found) is WorkersLost
        assert str(found).startswith("rank 1 on 10.0.0.1 (process 71) was lost at step 9: The actor died")
    bug = Wrapped({0: User(ValueError("a bug")), 1: died()})
    assert type(cause(bug, PLACES, recipe())) is TrainingError


def test_the_rank_whose_gpu_failed_is_named_before_those_that_waited_for_it() -> None:
    failures = {0: User(PEER), 1: broken("CUDA error: uncorrectable ECC error encountered", RuntimeError)}
    assert str(cause(Wrapped(failures), PLACES, recipe())).startswith("rank 1 on 10.0.0.1")


def test_an_error_of_no_worker_is_told_too() -> None:
    assert str(cause(ValueError("of Ray Train"), [], recipe())) == "a worker failed: ValueError: of Ray Train"


def test_advice_names_only_what_the_recipe_does_not_do_yet() -> None:
    assert advice(recipe()).startswith(
        "try train.micro_batch_size=4 (same model), or model.gradient_checkpointing=true"
    )
    done = recipe(
        train={"epochs": 1, "micro_batch_size": 1},
        model={"path": "m", "gradient_checkpointing": True, "lora": {"r": 4}},
        deepspeed={"zero_stage": 3, "offload": "optimizer"},
    )
    assert advice(done) == "more or larger workers are what is left"
    assert "deepspeed.zero_stage=2" in advice(recipe(deepspeed={"zero_stage": 1}))
