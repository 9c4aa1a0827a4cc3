"""Where errors leave a training process: one line on stderr, from process 0 alone, and the exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from data_prep.errors import DataError
from flexlora_ds.errors import RunError, UserError


def guarded(run: Callable[[], None], *, debug: bool) -> int:
    """Run a command's body; the exit code: 0, 2 for what the user must change, 1 for what failed."""
    try:
        run()
    except (UserError, DataError) as error:
        return _leave(error, 2, debug)
    except RunError as error:
        return _leave(error, 1, debug)
    except OSError as error:
        return _leave(
            RunError(f"{error.strerror or error} ({error.filename or 'input or output'})"), 1, debug
        )
    return 0


def _leave(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def quiet_libraries() -> None:
    """Keep other libraries' remarks off the run's own output; before they are imported."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch.distributed, transformers: not the user's to mend
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
