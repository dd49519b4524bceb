"""Every error that rayft raises on purpose.

RayftError                     told in one sentence; `exit_code` is the command line's
├── RecipeError          2     faults in a recipe, all at once
├── DataError            2     rows or files that can't be trained on, each with its place
├── ModelError           2     a model that can't be loaded, or can't do what the recipe asks
├── StorageError         1     a path that can't be read or written
│   ├── StorageMissing   2     there is no such file or object
│   ├── StorageRefused   2     an address or a setting with which no storage can be reached, or written from the start
│   ├── StorageDenied    2     rights are missing
│   └── StorageDown      1     an outage that outlasted every retry
├── ClusterError         2     the cluster can't place the run
├── RunRefused           2     another process writes this run, or its recipe has changed
├── Superseded           1     another process has taken this run over
├── Stopped            130     a stop was asked for, and the run has stopped
├── SweepStopped       130     a stop was asked for, and the sweep has stopped
├── CheckpointError      1     a checkpoint that can't be used
├── Damaged              1     a file of a checkpoint or a prepared shard that is not as it was written
├── NotFinite            1     a loss or gradient that is NaN or infinite, with its step
└── TrainingError        1     any other failure of the workers, with its cause
    ├── WorkersLost      1     workers or machines went away, or stood still
    └── OutOfMemory      1     a worker asked for more memory than there is

They cross process boundaries, so each survives pickling: the arguments are plain data and `args` holds all of them.
"""

from __future__ import annotations

from dataclasses import dataclass


class RayftError(Exception):
    """Base of all; its text is for the user and complete."""

    exit_code = 1


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a recipe.

    `where` is the dotted path, `what` the sentence, `value` what was given (None: not applicable), `fits` what would
    do, `nearest` the known name that was probably meant, `line` the line in the file (1-based).
    """

    where: str
    what: str
    value: str | None = None
    fits: str | None = None
    nearest: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        text = self.where + (f" (line {self.line})" if self.line else "") + f": {self.what}"
        if self.value is not None:
            text += f", got {self.value}"
        if self.fits:
            text += f"; {self.fits}"
        if self.nearest:
            text += f"; did you mean `{self.nearest}`?"
        return text


class RecipeError(RayftError):
    exit_code = 2

    def __init__(self, source: str, faults: tuple[Fault, ...]):
        super().__init__(source, faults)
        self.source = source
        self.faults = faults

    def __str__(self) -> str:
        head = f"{self.source}: {len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])


class DataError(RayftError):
    exit_code = 2


class ModelError(RayftError):
    exit_code = 2


class StorageError(RayftError):
    exit_code = 1


class StorageMissing(StorageError):
    exit_code = 2


class StorageRefused(StorageError):
    exit_code = 2


class StorageDenied(StorageError):
    exit_code = 2


class StorageDown(StorageError):
    exit_code = 1


class ClusterError(RayftError):
    exit_code = 2


class RunRefused(RayftError):
    exit_code = 2


class Superseded(RayftError):
    """Attempt `attempt` of `run` was claimed by `owner` ("process 7 on host"), so that this one must not write on."""

    exit_code = 1

    def __init__(self, run: str, attempt: int, owner: str):
        super().__init__(run, attempt, owner)
        self.run = run
        self.attempt = attempt
        self.owner = owner

    def __str__(self) -> str:
        return (
            f"{self.run} was taken over by {self.owner} (attempt {self.attempt}); this attempt has stopped, and what "
            "it would still have written is not used"
        )


class Stopped(RayftError):
    """`by` is who asked: Ctrl-C, SIGTERM, a request. `step` is where the run goes on from."""

    exit_code = 130

    def __init__(self, by: str, step: int, late: bool = False):
        super().__init__(by, step, late)
        self.by = by
        self.step = step
        self.late = late

    def __str__(self) -> str:
        why = "; there was no time for a checkpoint within failure.grace_s" if self.late else ""
        return f"stopped by {self.by}{why}; the same command goes on from step {self.step}"


class SweepStopped(RayftError):
    """`by` is who asked; `so_far` says in a few words what the sweep has found."""

    exit_code = 130

    def __init__(self, by: str, so_far: str):
        super().__init__(by, so_far)
        self.by = by
        self.so_far = so_far

    def __str__(self) -> str:
        return f"stopped by {self.by}; {self.so_far}; the same command goes on with the trials that are left"


class CheckpointError(RayftError):
    exit_code = 1


class Damaged(RayftError):
    """`file` is missing or not as it was written (`what` says how); `folder` is what it is needed for."""

    def __init__(self, folder: str, file: str, what: str):
        super().__init__(folder, file, what)
        self.folder = folder
        self.file = file
        self.what = what

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class NotFinite(RayftError):
    """The loss or the gradient norm was NaN or infinite at optimizer step `step` (1-based)."""

    exit_code = 1

    def __init__(self, step: int, what: str, advice: str = ""):
        super().__init__(step, what, advice)
        self.step = step
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"step {self.step}: the {self.what} is not finite (NaN or infinite){advice}"


class TrainingError(RayftError):
    exit_code = 1


class WorkersLost(TrainingError):
    """The run itself may be sound, and worth another try."""


class OutOfMemory(TrainingError):
    """The same recipe would run out of memory again."""
