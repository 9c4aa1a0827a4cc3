"""Where errors leave a training process: one line on stderr, from process 0 alone, and the exit code."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import yaml

from data_prep.errors import DataError
from flexlora_ds.errors import RunError, UserError
from launch.options.sources import find_recipe

_SMALLEST_SCALE = (
    "loss scale already at minimum"  # DeepSpeed raises a bare Exception (loss_scaler.py, 0.19.8)
)


def guarded(run: Callable[[], None], *, debug: Callable[[], bool]) -> int:
    """Run a command's body; the exit code: 0, 2 for what the user must change, 1 for what failed.

    `debug` says, once there is an error, whether its traceback is wanted: then it is raised.
    """
    try:
        run()
    except (UserError, DataError) as error:
        return _leave(error, 2, debug)
    except RunError as error:
        return _leave(error, 1, debug)
    except KeyboardInterrupt:
        return _leave(RunError("interrupted before training began; start again"), 130, debug)
    except OSError as error:
        return _leave(
            RunError(f"{error.strerror or error} ({error.filename or 'input or output'})"), 1, debug
        )
    except Exception as error:
        if _SMALLEST_SCALE not in str(error):
            raise
        text = "fp16 gradients overflow at the smallest loss scale (dtype); use bf16 or fp32, or a lower lr"
        return _leave(RunError(text), 1, debug)
    return 0


def debug_wanted(arguments: Sequence[str], default_recipe: str) -> bool:
    """Whether the command line or else the recipe says `debug: true`, even where other options are wrong."""
    words = [word for pair in arguments for word in pair.split("=", 1)]
    given = dict(itertools.pairwise(words))
    if "--debug" in given:
        return given["--debug"].lower() == "true"
    with contextlib.suppress(UserError, OSError, ValueError, yaml.YAMLError):
        recipe = yaml.safe_load(
            find_recipe(given.get("--recipe", default_recipe)).read_text(encoding="utf-8")
        )
        return isinstance(recipe, dict) and recipe.get("debug") in (True, "true")
    return False


def _leave(error: Exception, code: int, debug: Callable[[], bool]) -> int:
    if debug():
        raise error
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def quiet_libraries() -> None:
    """Keep other libraries' remarks off the run's own output; before they are imported."""
    # torch.distributed's and transformers' deprecations are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
