"""What lies in a run's folder: the folders that are its own, so that none of them is taken for another run."""

from __future__ import annotations

INSIDE = frozenset({"attempts", "checkpoints", "export", "pictures", "ray", "tensorboard"})
TRIALS = "trials"  # of a sweep: the folders of its trials, named by their numbers
PREPARED = "prepared"  # beside the runs: the shards


def taken(name: str) -> str:
    """The part of a run's name that is a folder of rayft's own, where no list would find the run; "" if none is.

    `<sweep>/trials/00003` is a trial's.
    """
    parts = name.split("/")
    trial = len(parts) > 2 and parts[-2] == TRIALS and parts[-1].isdigit()
    return next((part for part in parts[: -2 if trial else None] if part in {*INSIDE, PREPARED, TRIALS}), "")
