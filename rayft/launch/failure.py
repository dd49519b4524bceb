"""What follows when a worker group ends without a result: what its errors mean, and whether it is worth another try.

`cause` turns what Ray and torch raise into one of rayft's errors; `decide` is a pure function of that error. Its table:

what happened                                       another try    counted    what the user is told
a machine or worker was lost, a rank stood still    yes            yes        who, where, at which step, which try
a GPU failed, or is held by another process still   yes            yes        the same
storage did not answer through all its retries      yes            yes        the path and what was tried
a checkpoint or prepared shard is damaged           yes            yes        the file; the one before, or prepared anew
a preemption notice; machines came                  yes            no         the number of workers it goes on with
a fault in recipe, data, model or cluster           no                        the fault
NaN or infinity                                     no                        the step and what to change
out of memory                                       no                        what to change
the disk is full, rights are missing                no                        the path
another process took the run over                   no                        who
a stop was asked for                                no                        that the same command goes on from there

A try counts since the last progress: a run that has committed a newer checkpoint since its last failure starts to count
anew, so that a month of preemptible machines does not use up `failure.max_retries`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rayft.errors import Damaged, NotFinite, OutOfMemory, RayftError, StorageDown, TrainingError, WorkersLost
from rayft.launch.board import Place
from rayft.recipe import Recipe

AGAIN = (WorkersLost, StorageDown, Damaged)
SURE = (NotFinite, OutOfMemory)  # not tried again, and other machines of the same size would not mend it either

# How errors of Ray, torch, gloo and NCCL read in processes that only saw another one end, or waited for it in vain.
_GONE = (
    "Connection closed by peer", "Connection closed by remote peer", "Connection reset by peer", "Broken pipe",
    "actor died", "worker died", "Socket Timeout", "recvValue failed", "remote process exited",
    "connectFullMesh failed", "failed to connect", "is no longer alive", "Network is unreachable", "No route to host",
    "NCCL communicator was aborted", "unhandled system error", "ncclSystemError", "ncclInternalError",
    "ncclRemoteError",
)  # fmt: skip
_WAITED = ("Timed out waiting", "timed out", "Watchdog caught collective operation timeout")
_BROKEN = ("DistBackendError", "DistNetworkError", "DistStoreError")  # torch's types
_MISUSED = ("ncclInvalidUsage", "ncclInvalidArgument", "Duplicate GPU")  # which those are too, and stay
_COLLECTIVE = ("NCCL", "nccl", "gloo")
# A GPU that failed, or that another process still holds: elsewhere, or a moment later, the same may go well.
_FAILED = (
    "uncorrectable ECC error", "fallen off the bus", "CUDA-capable device(s) is/are busy or unavailable",
    "unspecified launch failure",
)  # fmt: skip
_MEMORY = (
    "CUDA out of memory", "CUDA error: out of memory", "'out of memory'",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
_OWN_MEMORY = ("can't allocate memory", "running low on memory", "std::bad_alloc")  # that of the machine


@dataclass(frozen=True)
class Left:
    """A worker group that wrote a checkpoint and returned, because it was asked to: `why`, and `by` whom for a stop.

    `late`: it did not manage within `failure.grace_s`.
    """

    why: Literal["stop", "preemption", "room"]
    text: str
    late: bool = False


@dataclass(frozen=True)
class Decision:
    """`again`: start another worker group; `retries`: those counted since the last progress, this one too."""

    again: bool
    retries: int
    text: str


def decide(what: RayftError | Left, retries: int, progress: bool, max_retries: int) -> Decision:
    """What follows, after `retries` counted tries; `progress`: a newer checkpoint than at the last failure."""
    if isinstance(what, Left):
        return Decision(what.why != "stop", 0 if progress else retries, what.text)
    error = what
    if not isinstance(error, AGAIN):
        return Decision(False, retries, str(error))
    before = 0 if progress else retries
    if before >= max_retries:
        allowed = "no retries are allowed" if max_retries == 0 else f"{max_retries} retries brought no progress"
        return Decision(False, before, f"{error}; {allowed} (failure.max_retries), so the run was given up")
    return Decision(True, before + 1, f"{error}; retry {before + 1} of {max_retries} (failure.max_retries)")


def cause(error: BaseException, places: list[Place], recipe: Recipe) -> RayftError:
    """The error to tell of a failed worker group: rayft's own where a worker raised one, else a TrainingError.

    `places` are where the ranks stood when they were last heard of. Among several workers' errors, one that is not the
    consequence of another's end is the cause. Where one has died, whatever the others say of a collective is.
    """
    failures: dict[Any, BaseException] = getattr(error, "worker_failures", None) or {None: error}
    causes = {rank: _root(failure) for rank, failure in failures.items()}
    own = [one for one in causes.values() if isinstance(one, RayftError)]
    if own:
        return own[0]
    short = [one for one in causes.values() if _out_of_memory(one)]
    if short and recipe.cluster.gpus_per_worker and all(_of_the_machine(one) for one in short):
        return OutOfMemory(f"a worker's machine ran out of its own memory, not of its GPUs'; {_machine_advice(recipe)}")
    if short:
        return OutOfMemory(f"a worker ran out of memory; {advice(recipe)}")
    who = {place.rank: place for place in places}
    passing = _WAITED + (_COLLECTIVE if any(_died(one) for one in causes.values()) else ())
    plain = {rank: one for rank, one in causes.items() if not _lost(one) and not _says(one, passing)}
    if plain:
        rank, one = next(iter(plain.items()))
        lines = str(one).strip().splitlines() or [""]
        at = f" ({who[rank]}, {who[rank].last})" if rank in who else ""
        return TrainingError(f"a worker failed{at}: {type(one).__name__}: {lines[-1] if len(lines) > 1 else lines[0]}")
    # Who died, or whose GPU failed, before who merely heard of it.
    rank, one = min(causes.items(), key=lambda entry: (not _died(entry[1]), not _says(entry[1], _FAILED)))
    told = f"{who[rank]} was lost {who[rank].last}" if rank in who else "a worker was lost"
    return WorkersLost(f"{told}: {_first_line(one)}")


def advice(recipe: Recipe) -> str:
    """What would need less memory, of what the recipe does not do yet."""
    train, model = recipe.train, recipe.model
    stage, half = recipe.deepspeed.zero_stage, train.micro_batch_size // 2
    means = [
        (half >= recipe.coupled, f"train.micro_batch_size={half} (same model)"),
        (not model.gradient_checkpointing, "model.gradient_checkpointing=true (same model, about a third slower)"),
        (stage != 3, f"deepspeed.zero_stage={3 if stage in ('auto', 2) else 2} (same model)"),
        (recipe.deepspeed.offload == "none", "deepspeed.offload=optimizer (same model)"),
        (model.lora is None, "model.lora={r: 16}"),
    ]
    offers = [text for missing, text in means if missing][:3]
    return "try " + ", or ".join(offers) if offers else "more or larger workers are what is left"


def _machine_advice(recipe: Recipe) -> str:
    """What would need less memory of a machine with GPUs: there lie weights on their way, and what is offloaded."""
    deepspeed, whole = recipe.deepspeed, recipe.model.compile or recipe.model.quantize
    means = [
        (deepspeed.offload != "none", "deepspeed.offload=none (same model)"),
        (
            deepspeed.zero_stage != 3 and not whole,
            "deepspeed.zero_stage=3 (same model; one worker alone reads it whole)",
        ),
        (True, "machines with more of it, or with fewer workers each"),
    ]
    return "try " + ", or ".join(text for missing, text in means if missing)


def _root(error: BaseException) -> BaseException:
    """The exception that the worker raised, below Ray's wrappers."""
    for name in ("_base_exc", "cause", "_original", "failure", "health_check_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error


def _died(error: BaseException) -> bool:
    import ray.exceptions as known

    return isinstance(error, known.RayActorError | known.NodeDiedError | known.WorkerCrashedError)


def _lost(error: BaseException) -> bool:
    kind = type(error).__name__
    never_started = kind in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
    broken = kind in _BROKEN and not _says(error, _MISUSED)
    unhealthy = kind.startswith("WorkerHealthCheck")
    return _died(error) or never_started or broken or unhealthy or _says(error, _GONE + _FAILED)


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or _of_the_machine(error) or _says(error, _MEMORY)


def _of_the_machine(error: BaseException) -> bool:
    import ray.exceptions as known

    return isinstance(error, known.OutOfMemoryError | MemoryError) or _says(error, _OWN_MEMORY)


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    return any(sign in str(error) for sign in signs)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
