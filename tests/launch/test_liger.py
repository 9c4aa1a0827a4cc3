"""Which kernels the base's element-wise pieces get, and what is said where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest

from flexlora_ds.errors import UserError
from launch.model.liger import settle_kernels
from launch.model.torch_compile import require_compiler, require_stage
from launch.options.train_options import TrainOptions


def config(kind: str = "llama", **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **options)


@pytest.mark.parametrize(
    ("kind", "here", "reason"),
    [
        ("llama", {"gpu": False, "installed": True}, "needs a GPU"),
        ("llama", {"gpu": True, "installed": False}, "needs the package liger-kernel"),
        ("gemma", {"gpu": True, "installed": True}, "knows no models of type gemma"),
    ],
)
def test_where_liger_cannot_run_auto_does_without_and_liger_is_refused(
    kind: str, here: dict[str, bool], reason: str
) -> None:
    assert settle_kernels(TrainOptions(), config(kind), **here) == "none"
    with pytest.raises(UserError, match=rf"^kernels liger {reason}.*\(key kernels\); choose auto or none$"):
        settle_kernels(TrainOptions(kernels="liger"), config(kind), **here)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_where_liger_runs_it_is_the_choice_unless_none_is_asked_for(kind: str) -> None:
    for wanted, found in (("auto", "liger"), ("liger", "liger"), ("none", "none")):
        options = TrainOptions(kernels=wanted)  # type: ignore[arg-type]
        assert settle_kernels(options, config(kind), gpu=True, installed=True) == found


def test_another_activation_or_compiled_pieces_leave_liger_out() -> None:
    here = {"gpu": True, "installed": True}
    assert settle_kernels(TrainOptions(), config(hidden_act="gelu"), **here) == "none"
    assert settle_kernels(TrainOptions(compile=True), config(), **here) == "none"
    with pytest.raises(UserError, match="kernels liger replaces what compile true would compile"):
        settle_kernels(TrainOptions(kernels="liger", compile=True), config(), **here)


def test_whole_layers_are_not_compiled_where_zero_3_gathers_inside_them() -> None:
    options, zero = TrainOptions(compile="blocks"), {"zero_optimization": {"stage": 3}}
    require_stage(TrainOptions(compile="pieces"), zero)
    require_stage(options, {"zero_optimization": {"stage": 2}})
    with pytest.raises(
        UserError, match=r"^compile blocks needs ZeRO-0, 1 or 2.*\(key compile\); choose pieces$"
    ):
        require_stage(options, zero)


def test_compile_needs_a_compiler_and_a_model_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler(TrainOptions(), config("gemma"))
    with pytest.raises(UserError, match=r"compile true knows no models of type gemma.*\(key compile\)"):
        require_compiler(TrainOptions(compile=True), config("gemma"))
    with pytest.raises(UserError, match="compile true knows the activation silu, not gelu"):
        require_compiler(TrainOptions(compile=True), config(hidden_act="gelu"))
    with pytest.raises(UserError, match=r"compile blocks knows FlexLoRA's adapters only \(key compile\)"):
        require_compiler(TrainOptions(compile="blocks", method="lora"), config())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        require_compiler(TrainOptions(compile=True), config())
    monkeypatch.setenv("CXX", "sh")
    require_compiler(TrainOptions(compile=True), config())
