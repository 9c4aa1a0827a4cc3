"""A headless Chromium, where there is one: the system's, or one that playwright has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A playwright browser; skips the test where there is no playwright or no Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = str(own) if own.exists() else next(filter(None, map(shutil.which, _NAMES)), None)
        if found is None:
            pytest.skip(
                "needs a Chromium: apt-get install chromium-headless-shell, or playwright install chromium"
            )
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()
