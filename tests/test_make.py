"""What `make install` does with an environment that it finds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parent.parent / "Makefile"
# Stands in for Python: makes an environment whose Python has pip, and says so.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    echo "$@" >> made
    mkdir -p .venv/bin && printf '#!/bin/sh\\n' > .venv/bin/python && chmod +x .venv/bin/python
fi
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("there", "made"), [("none", 1), ("half", 1), ("whole", 0)])
def test_an_interrupted_installation_goes_on(tmp_path: Path, there: str, made: int, linked: bool) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "cluster").mkdir()
    for name in ("cluster/requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    script(tmp_path / "python", PYTHON)
    if linked:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / ".venv").symlink_to("elsewhere")
    if there != "none":  # Python comes first, and pip as the last thing
        script(tmp_path / ".venv/bin/python", f"#!/bin/sh\nexit {int(there == 'half')}\n")
    for _ in range(2):  # the second time there is nothing to do
        done = subprocess.run(
            ["make", "install", f"PYTHON={tmp_path}/python"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    log = tmp_path / "made"
    assert (log.read_text().splitlines() if log.exists() else []) == ["-m venv .venv"] * made
    assert (tmp_path / ".venv" / ".installed").exists()
    assert (tmp_path / ".venv").is_symlink() == linked
