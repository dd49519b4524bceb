"""What is known of a job and what can be asked for, whoever runs it: a Ray cluster's job server, or Kubernetes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rayft.errors import ClusterError

TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
PATIENCE_S = 120.0  # how long a server that had answered may be silent: one that starts anew takes that long


@dataclass(frozen=True)
class Job:
    """A job of rayft. `status` is Ray's word for its state; `started` and `ended` are in seconds since 1970.

    `recipe` is the recipe's name, `recipe_hash` tells its content from another's, and `run` is its folder. `exit_code`
    is that of the command, once it has ended and where it is known.
    """

    id: str
    status: str
    recipe: str | None = None
    recipe_hash: str | None = None
    run: str | None = None
    grace_s: float = 0.0
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    message: str | None = None


class Server(Protocol):
    """Who runs jobs. Each question is answered, or a RayftError says in one sentence why not."""

    address: str
    options: str  # what `rayft jobs` has to be told to ask here, with a space before it

    def jobs(self) -> list[Job]:
        """Every job of rayft, the newest first."""

    def job(self, job: str) -> Job | None:
        """What is known of a job, None where there is none."""

    def waits(self, job: str) -> str | None:
        """What keeps a job that has not started from it, where more is known than its message says."""

    def logs(self, job: str) -> str:
        """What a job has printed."""

    def follow(self, job: str, write: Callable[[str], None]) -> Job:
        """Passes on what a job prints until it has ended, also over dropped connections; the job as it ended."""

    def last_try(self, job: str) -> None:
        """Whatever a job's command ends with, it is not started again."""

    def stop(self, job: str) -> None:
        """Ends a job's processes; it may take a while until they have."""


class Unreachable(ClusterError):
    """Nobody answers at the address."""
