"""What a training command adds to `flexlora_ds.terminal.command`: quiet libraries, and Ctrl-C while it imports."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType

from flexlora_ds.terminal.command import is_rank_zero
from flexlora_ds.terminal.plain_text import NO_GLYPH

NOT_BEGUN = "training had not begun, start again"
"""What is said after Ctrl-C before the run listens to signals."""


def quiet_libraries() -> None:
    """Keep other libraries' remarks off the run's own output; before they are imported."""
    # torch.distributed's and transformers' deprecations are not the user's to change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", NO_GLYPH)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # A store that is gone would be said with a page of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process with one line while it imports what a run needs, which takes seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if is_rank_zero():
        print(f"error: interrupted; {NOT_BEGUN}", file=sys.stderr, flush=True)
    os._exit(128 + number)
