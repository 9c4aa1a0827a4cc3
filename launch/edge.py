"""Where errors leave a training process: one line on stderr, from process 0 alone, and the exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from data_prep.errors import DataError
from flexlora_ds.errors import RunError, UserError

_SMALLEST_SCALE = (
    "loss scale already at minimum"  # DeepSpeed raises a bare Exception (loss_scaler.py, 0.19.8)
)


def guarded(run: Callable[[], None], *, debug: bool) -> int:
    """Run a command's body; the exit code: 0, 2 for what the user must change, 1 for what failed."""
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


def _leave(error: Exception, code: int, debug: bool) -> int:
    if debug:
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
