"""How a training process ends: it has left the others before its interpreter goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import training
from tests.helpers.launched import launched


@pytest.mark.parametrize("wrong", [False, True])
def test_a_finished_program_has_left_the_others(tmp_path: Path, wrong: bool) -> None:
    """What still communicates while the interpreter is torn down can end a finished run by SIGABRT."""
    place = training.make_place(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(LEAVING)
    options = {
        "model": place.model,
        "data": place.data,
        "out": tmp_path / "run",
        "ds": "ds_configs/zero2.json",
    }
    words = [
        f"--{key}={value}"
        for key, value in {**options, **training.SMALL, "max_steps": 2, "adjust_size": 0}.items()
    ]
    if wrong:  # found by both after communication has begun
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "options.yaml").touch()
        words.append("--resume=none")
    with launched(words, 2, script=str(script)) as started:
        assert started.wait() == [2 if wrong else 0] * 2
        for rank in range(2):
            said = started.said(rank)
            assert "communicates False" in said and "torn down" not in said, said


LEAVING = """
import atexit, runpy, sys, torch

class Torn:
    def __del__(self):
        print("the interpreter is torn down", flush=True)

sys.path.insert(0, "")
sys.modules["kept"] = Torn()  # until the interpreter empties its table of modules
atexit.register(lambda: print("communicates", torch.distributed.is_initialized(), flush=True))
runpy.run_path("launch/train.py", run_name="__main__")
"""
