"""`flexlora_ds.dropout.mask.dropped` on a CPU, from `kernel.c`: compiled at first use, in a quarter of a second.

Nothing is kept between processes: a stored library could meet another processor in a cluster's shared folder. It is
plain C behind a pointer call, so torch's headers and version do not matter to it, and its threads are those of the
OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from flexlora_ds.errors import RunError

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
ELEMENTS_PER_THREAD = 32768
"""Fewer are not worth waking a thread for (torch's own limit, at::internal::GRAIN_SIZE)."""


class HostKernel:
    """`dropped` as one pass over contiguous values of 2, 4 or 8 bytes an element.

    Raises:
        RunError, OSError: the C compiler (`CC`, or `cc`) fails or is not there, or its result cannot be loaded.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory(prefix="flexlora-") as folder:
            library = ctypes.CDLL(str(_compiled(Path(folder))))  # stays mapped when the file is gone
        self._functions = {width: getattr(library, f"dropped_{width}") for width in (2, 4, 8)}
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        for function in self._functions.values():
            function.argtypes = [pointer, pointer, pointer, long, long, long, integer, integer, integer]

    def __call__(
        self,
        values: Tensor,
        row_keys: Tensor,
        matrix_key: Tensor,
        whole: int,
        part: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """`values` [rows, features] where they are kept, else 0: in `out`, which may be `values`, or a new tensor.

        The other arguments are those of `dropped`.
        """
        if out is None or not out.is_contiguous():
            out = torch.empty_like(values, memory_format=torch.contiguous_format)
        values, row_keys = values.contiguous(), row_keys.contiguous()
        rows, features = values.shape
        threads = max(1, min(torch.get_num_threads(), values.numel() // ELEMENTS_PER_THREAD))
        places = (tensor.data_ptr() for tensor in (values, out, row_keys))
        function = self._functions[values.element_size()]
        if function(*places, int(matrix_key), rows, features, whole, part, threads):
            raise MemoryError(f"dropout: no memory for the hashes of {features} features")
        return out


def _compiled(folder: Path) -> Path:
    library = folder / "dropped.so"
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"{compiler[0]} is not on PATH; install a C compiler or set CC")
    done = subprocess.run(
        [*compiler, *FLAGS, "-o", str(library), str(SOURCE)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{compiler[0]}: {lines[0]}")
    return library
