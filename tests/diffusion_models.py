"""A small diffusion pipeline that nobody trained, with weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rayft.tasks.task import Pretrained

TINY = Path(__file__).resolve().parents[1] / "jobs" / "models" / "tiny_diffusion"


def make_pipeline_folder(folder: str, **schedule: Any) -> None:
    """The pipeline of jobs/models, drawn from a seed; `schedule` are fields of its scheduler that differ."""
    from rayft.tasks.text_to_image.network import load_diffusion
    from rayft.tasks.text_to_image.processor import load_prompter

    source = Pretrained(str(TINY), seed=3)
    processor = load_prompter(source, None)
    processor.schedule.update(schedule)
    load_diffusion(source, processor, None).save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.rmtree(os.path.join(folder, "tokenizer"))
    shutil.copytree(TINY / "tokenizer", os.path.join(folder, "tokenizer"))
