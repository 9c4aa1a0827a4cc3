"""Which kernels the base's element-wise pieces get, and what is said where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexlora_ds.errors import UserError
from launch.model.liger import resolve_kernels
from launch.model.torch_compile import require_compiler, require_stage, resolve_compile, wants_blocks


def config(kind: str = "llama", **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **options)


def kernels(
    asked: Any, model: Any, compiled: Any = False, *, gpu: bool = True, installed: bool = True
) -> str:
    return resolve_kernels(
        asked, compiled=compiled, config=model, gpu=gpu, installed=installed, place="key kernels"
    )


def compiler(asked: Any, model: Any, method: Any = "flexlora") -> None:
    require_compiler(asked, method=method, config=model, place="key compile")


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
    assert kernels("auto", config(kind), **here) == "none"
    with pytest.raises(UserError, match=rf"^kernels liger {reason}.*\(key kernels\); choose auto or none$"):
        kernels("liger", config(kind), **here)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_where_liger_runs_it_is_the_choice_unless_none_is_asked_for(kind: str) -> None:
    for wanted, found in (("auto", "liger"), ("liger", "liger"), ("none", "none")):
        assert kernels(wanted, config(kind)) == found


def test_another_activation_or_compiled_pieces_leave_liger_out() -> None:
    assert kernels("auto", config(hidden_act="gelu")) == "none"
    assert kernels("auto", config(), compiled=True) == "none"
    with pytest.raises(UserError, match="kernels liger replaces what compile true would compile"):
        kernels("liger", config(), compiled=True)


def test_whole_layers_are_not_compiled_where_zero_3_gathers_inside_them() -> None:
    require_stage("pieces", stage=3, place="key compile")
    require_stage("blocks", stage=2, place="key compile")
    with pytest.raises(
        UserError, match=r"^compile blocks needs ZeRO-0, 1 or 2.*\(key compile\); choose pieces$"
    ):
        require_stage("blocks", stage=3, place="key compile")


def test_true_means_pieces_and_auto_blocks_where_they_can_be() -> None:
    found = {
        asked: resolve_compile(asked, blocks=False) for asked in (True, "pieces", "blocks", False, "auto")
    }
    assert found == {True: "pieces", "pieces": "pieces", "blocks": "blocks", False: None, "auto": None}
    assert resolve_compile("auto", blocks=True) == "blocks"


WANTED: dict[str, Any] = {
    "method": "flexlora",
    "stage": 2,
    "dtype": "bf16",
    "kernels": "auto",
    "gpu": True,
}


@pytest.mark.parametrize(
    "other",
    [
        {"method": "lora"},
        {"method": "adalora"},
        {"stage": 3},
        {"dtype": "fp32"},
        {"dtype": "fp16"},
        {"kernels": "liger"},
        {"gpu": False},
        {"config": "gemma"},
        {"CXX": "no-such-compiler"},
        {"torch": "2.10.1+cu126"},
    ],
)
def test_auto_compiles_nothing_where_something_is_in_the_way(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", other.get("CXX", "sh"))
    monkeypatch.setattr(torch, "__version__", other.get("torch", "2.11.0+cu130"))
    model = config(other.get("config", "llama"))
    changed = {key: value for key, value in other.items() if key in WANTED}
    assert not wants_blocks("auto", config=model, **{**WANTED, **changed})


def test_auto_compiles_whole_layers_where_nothing_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")
    assert all(wants_blocks("auto", config=config(), **{**WANTED, "stage": stage}) for stage in (0, 1, 2))
    assert not any(wants_blocks(asked, config=config(), **WANTED) for asked in (True, "pieces", "blocks"))


def test_compile_needs_a_compiler_and_a_model_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(False, config("gemma"))
    with pytest.raises(UserError, match=r"compile true knows no models of type gemma.*\(key compile\)"):
        compiler(True, config("gemma"))
    with pytest.raises(UserError, match="compile true knows the activation silu, not gelu"):
        compiler(True, config(hidden_act="gelu"))
    with pytest.raises(UserError, match=r"compile blocks knows FlexLoRA's adapters only \(key compile\)"):
        compiler("blocks", config(), method="lora")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        compiler(True, config())
    monkeypatch.setenv("CXX", "sh")
    compiler(True, config())
