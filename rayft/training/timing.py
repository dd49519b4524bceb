"""How long what took: seconds and rates of one attempt, for each step and for result.json."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from rayft.training.engine import collective_seconds
from rayft.training.laps import Laps

SETTLING = 5  # first steps, which rates leave out
RECENT = 20  # steps over which a step's own rates are taken


@dataclass
class Timing:
    """Seconds since the attempt began."""

    first_step: float | None = None  # when it ended, in seconds since 1970
    last_step: float | None = None
    waiting: float = 0.0
    evaluating: float = 0.0
    evaluating_between: float = 0.0  # the part of it before the last step
    saving: float = 0.0
    filling: float = 0.0  # computing the frozen blocks' output
    steady: list[tuple[float, int, int]] = field(default_factory=list)  # of each step: seconds, source rows, tokens
    useful: int = 0  # tokens of rows
    padded: int = 0  # tokens computed
    laps: Laps = field(default_factory=lambda: Laps(collective_seconds))

    def __post_init__(self) -> None:
        """The peak of a GPU's memory counts from here: the process may have run another trial before."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def stepped(self, seconds: float, waited: float, rows: int, tokens: int, padded: int) -> None:
        """A step has ended; for `waited` of its seconds there were no rows."""
        now = time.time()
        self.waiting += 0.0 if self.first_step is None else waited
        self.first_step = self.first_step or now
        self.last_step = now
        self.evaluating_between = self.evaluating
        self.useful += tokens
        self.padded += padded
        self.steady.append((seconds, rows, tokens))

    def recent(self) -> dict[str, float]:
        """Source rows and tokens a second, of the last steps."""
        return _rates(self.steady[SETTLING:][-RECENT:] or self.steady[-1:])

    def figures(self, begun: float, device: torch.device, cache_saved_s: float) -> dict[str, Any]:
        """What result.json holds as `timing`; the time to the first step counts from `begun`, in seconds since 1970."""
        train_s = (self.last_step or 0.0) - (self.first_step or 0.0) - self.evaluating_between
        return {
            "first_step_s": round((self.first_step or time.time()) - begun, 3),
            "train_s": round(train_s, 3),
            **_rates(self.steady[SETTLING:] or self.steady),
            "useful_tokens": round(self.useful / self.padded, 4) if self.padded else None,
            "data_wait": round(self.waiting / train_s, 4) if train_s > 0 else 0.0,
            "save_stall_s": round(self.saving, 3),
            "evaluate_s": round(self.evaluating, 3),
            **self.laps.shares(),
            "peak_memory_gib": round(_peak_memory(device) / 2**30, 3),
            "cache_fill_s": round(self.filling, 3),
            "cache_saved_s": round(cache_saved_s, 3),
        }


def _rates(steps: list[tuple[float, int, int]]) -> dict[str, float]:
    seconds = sum(entry[0] for entry in steps) or 1.0
    return {
        "rows_per_s": round(sum(entry[1] for entry in steps) / seconds, 2),
        "tokens_per_s": round(sum(entry[2] for entry in steps) / seconds, 1),
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: of this rank's tensors on its GPU, else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux gives in KiB
