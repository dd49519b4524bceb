"""Headless Chromium for tests of pages, and what it complained about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; a test that needs one fails where it isn't installed, and says what to install."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.fail(
            "this test needs `chromium` of the Debian package chromium: apt-get install chromium", pytrace=False
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(browser: Any, expected: str = "GL Driver Message", **options: Any) -> Iterator[Any]:
    """A page of its own context; what it logs as an error or warning, and what it can't load, fails the test.

    Unless that holds the text `expected`: what a driver of WebGL says of its own speed is no complaint.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)  # ms; only how long a busy machine may take
    page, complaints = context.new_page(), list[str]()

    def listen(said: Any) -> None:
        if said.type in ("error", "warning") and expected not in said.text:
            complaints.append(said.text)

    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"{request.failure}: {request.url}"))
    yield page
    context.close()
    # Who leaves a page ends what it was asking for.
    left = [complaint for complaint in complaints if "ERR_ABORTED" not in complaint]
    assert not left, left
