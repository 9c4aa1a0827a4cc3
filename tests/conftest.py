"""What runs where: `full` checks only on request, `gpu` checks only where there is a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch is imported anywhere: by default it takes all cores, which several test processes share.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.helpers.fuzzing import SEED, choose_seed
from tests.helpers.nursery import Nursery
from tests.helpers.processes import Processes


def pytest_configure() -> None:
    """Choose the fuzzers' seed before a test is collected, and before xdist starts processes that inherit it."""
    choose_seed()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Number packed data instead of spelling it: each process must collect the same names, and gzip writes the time."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the seed that repeats the fuzzers' inputs, the same for all processes; a header would not show with -q."""
    if chosen := choose_seed():
        terminalreporter.write_line(f"fuzzers: {SEED}={chosen}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `full` (unless FLEXLORA_FULL=1 or -m names it) and skip `gpu` without a GPU."""
    if os.environ.get("FLEXLORA_FULL") != "1" and "full" not in config.getoption("markexpr"):
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _gpu_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of the tests leave no tokenised data in the user's own cache."""
    os.environ["FLEXLORA_CACHE"] = str(tmp_path_factory.mktemp("token_cache"))


@pytest.fixture(scope="module", autouse=True)
def no_process_group_left() -> Iterator[None]:
    """A group that a test leaves in this process, and its port, would reach whatever a later test starts."""
    port = os.environ.get("MASTER_PORT")
    yield
    torch = sys.modules.get("torch")
    left = torch is not None and torch.distributed.is_initialized()
    assert not left, "a process group is left in the tests' own process: use one_process"
    assert os.environ.get("MASTER_PORT") == port, (
        "MASTER_PORT is left in the tests' own process: use one_process"
    )


@pytest.fixture(scope="session")
def one_process() -> Iterator[Processes]:
    """One process that stays for the whole session: a world of one rank, without a restart per test."""
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Processes]:
    """Two processes that stay for the whole session; what a test initialises in them stays for the next."""
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """What training processes are forked from that a test stops or kills."""
    found = Nursery()
    yield found
    found.close()


def _gpu_available() -> bool:
    import torch

    return torch.cuda.is_available()
