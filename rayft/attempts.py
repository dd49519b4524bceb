"""Who writes a run: every worker group claims an attempt, and the newest claim is the only writer.

`<run>/attempts/000003.json` is written once, by whoever claims attempt 3, and lists the checkpoints that it has found.
From then on a checkpoint counts only if it is in that list or is attempt 3's own: what an older attempt commits
afterwards, say from a machine that had lost its network, is never read, whatever the clocks and however late.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass

from rayft import storage
from rayft.errors import Superseded

FOLDER = "attempts"
NAME = re.compile(r"(\d+)\.json$")


@dataclass(frozen=True)
class Attempt:
    """A claim. `accepts` are the names of the checkpoints, of older attempts, that count; `since` is epoch seconds."""

    number: int
    host: str
    pid: int
    since: float
    accepts: tuple[str, ...]
    token: str


def newest(run: str) -> int:
    """The newest claimed attempt; 0 where none was."""
    return max(_numbers(run), default=0)


def accepts(run: str) -> tuple[int, set[str]] | None:
    """The newest attempt and the older checkpoints that it counts; None where no attempt was ever claimed."""
    number = newest(run)
    if number == 0:
        return None
    return number, set(storage.read_json(_path(run, number))["accepts"])


def current(run: str) -> Attempt | None:
    """The newest claim; None where none was ever made."""
    number = newest(run)
    return Attempt(**storage.read_json(_path(run, number))) if number else None


def claim(run: str, found: list[str], after: int) -> int:
    """Claims the attempt that follows `after` (the newest that the claimer knows of) and returns its number.

    `found` are the names of the checkpoints that count now. Superseded where another process has claimed it first.
    """
    mine = Attempt(after + 1, socket.gethostname(), os.getpid(), time.time(), tuple(found), uuid.uuid4().hex)
    text = json.dumps(asdict(mine), indent=2) + "\n"
    if not storage.create(_path(run, mine.number), text.encode()):
        raise Superseded(run, mine.number, _owner(run, mine.number))
    return mine.number


def hold(run: str, attempt: int) -> None:
    """Returns while `attempt` is the newest; raises Superseded once it isn't, or once the run's folder was emptied."""
    now = newest(run)
    if now != attempt:
        raise Superseded(run, now, _owner(run, now) if now else "whoever deleted its folder")


def _owner(run: str, number: int) -> str:
    claimed = storage.read_json(_path(run, number))
    return f"process {claimed['pid']} on {claimed['host']}"


def _path(run: str, number: int) -> str:
    return storage.join(run, FOLDER, f"{number:06d}.json")


def _numbers(run: str) -> list[int]:
    names = (entry.path.rpartition("/")[2] for entry in storage.listing(storage.join(run, FOLDER)))
    return [int(found[1]) for name in names if (found := NAME.search(name))]
