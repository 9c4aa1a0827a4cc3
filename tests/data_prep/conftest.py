"""What the tests of builds begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.raw_rows import write_raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with raw rows of every task."""
    return write_raw(tmp_path / "raw")
