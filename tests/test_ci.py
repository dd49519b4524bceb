"""What `.ci/run` asks of a machine before it begins."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "run"
TOOLS = ("make", "python3.11", "g++", "ip", "chromium")


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        ("make", "make"),
        ("g++", "g++"),
        ("python3.11", "python3.11-venv"),
        ("ensurepip", "python3.11-venv"),  # Debian's Python without the package
    ],
)
def test_what_a_machine_lacks_is_named_before_anything_starts(tmp_path: Path, lacking: str, missing: str) -> None:
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash
    assert dirname
    (tmp_path / "dirname").symlink_to(dirname)
    for tool in TOOLS:
        if tool != lacking:
            made = tmp_path / tool
            made.write_text(f"#!{bash}\nexit {int(tool == 'python3.11' and lacking == 'ensurepip')}\n")
            made.chmod(0o755)
    done = subprocess.run([bash, str(SCRIPT)], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"missing Debian packages: {missing}; install them with: apt-get install {missing}\n"
