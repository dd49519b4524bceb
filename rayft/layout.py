"""What lies in a run's folder: the folders that are its own, so that none of them is taken for another run."""

from __future__ import annotations

INSIDE = frozenset({"attempts", "checkpoints", "export", "pictures", "ray", "tensorboard"})
TRIALS = "trials"  # of a sweep: the folders of its trials, named by their numbers
PREPARED = "prepared"  # beside the runs: the shards
