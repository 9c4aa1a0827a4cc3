"""What a run decides before its first weight: nothing is left to `auto`, and one line says all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora_ds.base_model.precision import TORCH_DTYPES
from flexlora_ds.errors import UserError
from flexlora_ds.files import reading
from launch.engine.settled import Settled
from launch.model.attention import Machine
from launch.model.computation import Computation
from launch.options.train_options import TrainOptions, parse_options
from launch.planning import settle as settling
from launch.planning.memory_plan import memory_of
from launch.planning.settle import LEFT_TO_US, settle
from tests.helpers import training
from tests.helpers.processes import ROOT
from tests.helpers.training import Place

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what `auto` is on a CPU")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("settle"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def settled(place: Place, processes: int = 1, **options: Any) -> Settled:
    return settle(parse_options(place.arguments("unused", **{"dtype": None, **options})), processes)


@CPU_ONLY
def test_every_auto_is_decided_and_one_line_says_how(place: Place) -> None:
    found = settled(place, 2)
    assert found.computation == Computation("fp32", "sdpa", True, "none", None, False)
    assert found.line() == (
        "fp32, sdpa, packed, micro-batch 4 × accumulation 1 × processes 2, kernels none, compile none, "
        "activations kept, prompt alpaca"
    )
    assert "auto" not in str(dict(found.ds_config))
    left = {key for key in LEFT_TO_US if getattr(found.options, key) == "auto"}
    assert left == {"attention"}, "which options.yaml keeps as asked"


@CPU_ONLY
def test_what_was_given_is_taken_and_marked(place: Place) -> None:
    given = {"dtype": "bf16", "attention": "eager", "padding_free": False, "micro_batch_size": 2}
    found = settled(place, gradient_checkpointing=True, kernels="none", prompt="llm_adapters", **given)
    assert found.line() == (
        "bf16 (given), eager (given), padded (given), micro-batch 2 × accumulation 4 × processes 1 (given), "
        "kernels none (given), compile none, activations recomputed (given), prompt llm_adapters"
    )


def test_a_repetition_elsewhere_decides_again_what_depends_on_the_machine(place: Place) -> None:
    found = settled(place)
    again = TrainOptions.from_yaml(found.repeatable.to_yaml())
    for key in ("micro_batch_size", "kernels", "padding_free", "attention"):
        assert getattr(again, key) == "auto", key
    assert again.dtype == found.computation.dtype
    assert again.gradient_checkpointing is False


@CPU_ONLY
def test_compiled_layers_that_are_not_applied_are_named(place: Place) -> None:
    """Under sdpa the compiled layers do not take packed examples: each layer runs as it is."""
    line = settled(place, compile="blocks").line()
    assert "compile blocks, which is NOT APPLIED: " in line and "try padding_free false" in line
    assert "NOT APPLIED" not in settled(place, compile="blocks", padding_free=False).line()
    on_a_gpu = Computation("bf16", "varlen", True, "none", "blocks", False)
    assert not any("NOT APPLIED" in words for words in on_a_gpu.words(()))
    assert any("not flash" in words for words in replace(on_a_gpu, attention="flash").words(()))


@CPU_ONLY
def test_layers_are_not_replayed_without_a_gpu(place: Place) -> None:
    with pytest.raises(UserError, match="cuda_graphs true replays compiled layers"):
        settled(place, compile="blocks", cuda_graphs=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new GPU with flash-attn, Liger, torch's variable-length attention and a compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    properties = type("Properties", (), {"total_memory": 2**40})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    machine = Machine(gpu=True, capability=(9, 0), flash=True, varlen=True)
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
    monkeypatch.setattr(settling, "torch_varlen", lambda dtype: object())
    monkeypatch.setattr(settling, "liger_installed", lambda: True)
    monkeypatch.setenv("CXX", "sh")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("varlen", True, "none", "blocks")),
        ({"compile": "blocks"}, ("varlen", True, "none", "blocks")),
        ({"compile": False}, ("flash", True, "liger", None)),
        ({"compile": "pieces"}, ("flash", True, "none", "pieces")),
        ({"kernels": "liger"}, ("flash", True, "liger", None)),
        ({"attention": "flash"}, ("flash", True, "liger", None)),
        ({"padding_free": False}, ("flash", False, "liger", None)),
        ({"padding_free": False, "attention": "sdpa"}, ("sdpa", False, "none", "blocks")),
        ({"ds": "ds_configs/zero3.json"}, ("flash", True, "liger", None)),
        ({"method": "lora"}, ("flash", True, "liger", None)),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_layers_are_compiled_where_that_was_proven(
    place: Place, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    found = settled(place, **options)
    computation = found.computation
    made = (computation.attention, computation.packed, computation.kernels, computation.compiled)
    assert made == expected
    assert found.repeatable.compile == options.get("compile", "auto")
    assert memory_of(found).compiled_layers is (computation.compiled == "blocks")


@pytest.mark.usefixtures("gpu")
def test_layers_are_replayed_where_that_is_asked_for_and_can_be(place: Place) -> None:
    asked = {"compile": "blocks", "attention": "varlen", "cuda_graphs": True}
    found = settled(place, **asked)
    assert found.computation.cuda_graphs and "replayed as CUDA graphs" in found.line()
    assert not settled(place, compile="blocks", attention="varlen").computation.cuda_graphs
    unfit = (
        {"padding_free": False},
        {"compile": False},
        {"gradient_checkpointing": True},
        {"orth_form": "norm"},
    )
    for others in unfit:
        with pytest.raises(UserError, match="leave it false, or choose compile blocks"):
            settled(place, **{**asked, **others})


@pytest.mark.usefixtures("gpu")
def test_compiled_layers_that_are_not_applied_are_planned_as_they_are(place: Place) -> None:
    """They take more memory than compiled ones."""
    others = {"attention": "sdpa", "padding_free": True, "kernels": "none"}
    asked, plain = (memory_of(settled(place, compile=c, **others)) for c in ("blocks", False))
    assert asked.at(8).total == plain.at(8).total > memory_of(settled(place)).at(8).total


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bf16"), (False, "fp16")])
def test_a_run_takes_the_precision_that_an_evaluation_takes(
    place: Place, monkeypatch: pytest.MonkeyPatch, bf16: bool, dtype: str
) -> None:
    """As `tests/library/test_precision.py` holds for the evaluation, on GPUs with bf16 and without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    properties = type("Properties", (), {"total_memory": 2**40})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(settling, "require_dtype", lambda dtype, place: None)
    found = settled(place)
    assert found.computation.dtype == dtype
    assert found.ds_config[dtype]["enabled"] is True
    assert found.computation.dtype in TORCH_DTYPES


def test_the_deepspeed_json_is_read_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}')
    read = reading.open_ordinary
    reads: list[Path] = []

    def counting(file: Path, *others: Any) -> Any:
        reads.append(file)
        return read(file, *others)

    monkeypatch.setattr(reading, "open_ordinary", counting)
    found = settled(place, ds=path)
    assert found.adam.betas == (0.8, 0.9) and "optimizer" not in found.ds_config
    assert reads.count(path) == 1
