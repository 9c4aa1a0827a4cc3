"""`dtype auto`: training and evaluation load a model in the same precision, on new GPUs, old ones and CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.model import loading
from eval.options import Options
from flexlora_ds.base_model.precision import TORCH_DTYPES, resolve_dtype
from launch.options.train_options import TrainOptions

MACHINES = [(False, False, "fp32"), (True, True, "bf16"), (True, False, "fp16")]


@pytest.mark.parametrize(("gpu", "bf16", "settled"), MACHINES)
def test_auto_is_the_same_in_training_and_evaluation(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, bf16: bool, settled: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    asked: list[torch.dtype] = []

    def load(*_: Any, dtype: torch.dtype, **__: Any) -> Any:
        asked.append(dtype)
        raise InterruptedError

    monkeypatch.setattr(loading, "load_causal_lm", load)
    monkeypatch.setattr(loading, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(loading, "load_skeleton", lambda model: torch.nn.Identity())
    with pytest.raises(InterruptedError):
        loading.load(Options(model="any"), torch.device("cuda" if gpu else "cpu"))
    assert asked == [TORCH_DTYPES[settled]]
    assert resolve_dtype(TrainOptions().dtype, gpu=torch.cuda.is_available()) == settled


@pytest.mark.parametrize("asked", TORCH_DTYPES)
@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_asked_is_taken(asked: str, gpu: bool) -> None:
    assert resolve_dtype(asked, gpu=gpu) == asked
