"""What a run leaves in /dev/shm: nothing, however it ends."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from tests.helpers import training
from tests.helpers.launched import Launched
from tests.helpers.nursery import Nursery
from tests.helpers.processes import rank_environments, scratch_file

SHARED = Path("/dev/shm")


@pytest.mark.parametrize(
    ("world_size", "killed"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.full),
        pytest.param(1, False, marks=pytest.mark.full),
    ],
)
def test_a_run_under_deepspeeds_launcher_leaves_nothing_in_shared_memory(
    world_size: int, killed: bool, tmp_path: Path, nursery: Nursery
) -> None:
    """Its extension would make a buffer for each process, named after the port, and leave it there."""
    place = training.make_place(tmp_path)
    words = place.arguments(tmp_path / "run", max_steps=200 if killed else 2, adjust_size=0)
    launcher = {"LOCAL_SIZE": str(world_size)}  # as `deepspeed` says it
    other = SHARED / "deepspeed_allreduce_buffer_0_another_run_0"
    other.touch()
    with contextlib.ExitStack() as stack:
        stack.callback(other.unlink)
        run = Launched([], [])
        for variables in rank_environments(world_size, launcher):
            output = stack.enter_context(scratch_file())
            child = nursery.start("launch.train", words, variables, output)
            stack.callback(child.kill)
            run.processes.append(child)
            run.outputs.append(output)
        if killed:
            run.wait_for_text("· loss ")
            run.send(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL if killed else 0] * world_size, run.said()
        assert not [path for path in SHARED.iterdir() if variables["MASTER_PORT"] in path.name]
        assert other.exists()
