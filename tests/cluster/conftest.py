"""Clusters for tests: Ray nodes in network namespaces of this machine (`cluster/local.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from cluster.local import Nodes, check_machine

# Ray's own settings let a node be silent for 16 s (killed) to 66 s (cut off), measured on two busy cores.
NOTICE_SOON = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


class MakeNodes(Protocol):
    def __call__(self, count: int, **options: Any) -> Nodes: ...


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    """Fails the test, with the Debian package to install, where nodes of their own can't be made."""
    try:
        check_machine()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def make_nodes(network_namespaces: None) -> Iterator[MakeNodes]:
    """`make_nodes(3, cpus=2)` starts nodes, which end with the test; the options are those of `Nodes`.

    `environment` goes on top of settings by which Ray notices lost nodes within seconds.
    """
    with contextlib.ExitStack() as stack:

        def start(count: int, environment: dict[str, str] | None = None, **options: Any) -> Nodes:
            return stack.enter_context(Nodes(count, environment=NOTICE_SOON | (environment or {}), **options))

        yield start


@pytest.fixture(scope="module")
def nodes(network_namespaces: None) -> Iterator[Nodes]:
    """Three nodes of one CPU, for all tests of a file: each leaves them as it found them, alive."""
    with Nodes(3, environment=NOTICE_SOON) as started:
        yield started
