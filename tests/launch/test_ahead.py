"""What begins before it is needed: imports, without anybody having asked yet, and none where a recipe is only read."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rayft import tasks
from rayft.launch import ahead


def test_imports_pass_in_a_thread_and_what_is_missing_is_left_to_whoever_needs_it() -> None:
    with ahead.importing("colorsys", "no_such_module_anywhere", "chunk_of_nothing"):
        pass
    assert "colorsys" in sys.modules
    assert "no_such_module_anywhere" not in sys.modules


def test_garbage_is_collected_again_afterwards_also_where_an_import_fails() -> None:
    with ahead.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), ahead.uncollected():
        raise ImportError
    assert gc.isenabled()


def test_garbage_of_before_is_collected_where_nothing_was_imported() -> None:
    before = gc.get_freeze_count()
    with ahead.uncollected():
        pass
    assert gc.get_freeze_count() == before


def test_reading_a_recipe_of_any_task_imports_neither_torch_nor_transformers() -> None:
    names = [f"tasks.find({name!r})" for name in tasks.names()]
    heavy = ("torch", "transformers", "sklearn", "scipy", "diffusers", "ray", "PIL", "matplotlib")
    told = f"print([name for name in {heavy} if name in sys.modules])"
    text = "; ".join(["import sys", "from rayft import recipe, tasks", *names, told])
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"
