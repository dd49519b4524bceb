"""What tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

# Before torch comes: small models are slower on several threads, above all beside each other. Workers set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden; look at the difference")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are there only where one is."""
    need = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not need:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=need)
        items[:] = [item for item in items if item not in need]


@pytest.fixture
def debian_package() -> Callable[[str, str], str]:
    """`debian_package("iproute2", "ip")` gives the path of command `ip`, or fails the test naming what to install."""

    def find(name: str, command: str) -> str:
        path = shutil.which(command)
        if path is None:
            pytest.fail(
                f"this test needs `{command}` of the Debian package {name}: apt-get install {name}", pytrace=False
            )
        return path

    return find


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on an S3 server on a free local port; the environment leads every S3 client there.

    It is one bucket for the whole session: a test works below a prefix of its own. A Ray cluster knows the environment
    only if it starts after this fixture.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="rayft-tests")
        yield "s3://rayft-tests"
    server.stop()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray cluster of this process, shared by all tests that ask for it."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
