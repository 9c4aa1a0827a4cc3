"""Whole runs on bases with something of their own: the loss depends on neither stage nor division of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.model.loading import load
from eval.options import Options
from flexlora_ds.errors import UserError
from flexlora_ds.export import read_peft_adapter
from tests.helpers import training
from tests.helpers.processes import Processes
from tests.helpers.training import Place
from tests.helpers.zoo import write_model

TWO_STEPS: dict[str, Any] = {
    "target_modules": "all-linear", "max_steps": 2, "adjust_size": 0, "val_size": 4, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return training.make_place(tmp_path_factory.mktemp("bases"))


def run(processes: Processes, place: Place, out: Path, stage: int, **options: Any) -> str:
    """What a run says, which must succeed."""
    words = place.arguments(out, stage, **{**TWO_STEPS, **options})
    for found in processes.run(training.command, words):
        assert found["code"] == 0, found["stderr"]
    return str(found["stderr"])


def test_the_bases_dropout_is_off_and_said_to_be(
    one_process: Processes, place: Place, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "opt", dropout=0.4, attention_dropout=0.3, layerdrop=0.4)
    for size in (2, 4):
        said = run(one_process, place, tmp_path / f"{size}", 0, model=base, micro_batch_size=size)
        assert "the base's own dropout is off" in said
        assert all(rate in said for rate in ("dropout 0.4", "attention_dropout 0.3", "layerdrop 0.4"))
    assert training.losses(tmp_path / "2") == pytest.approx(training.losses(tmp_path / "4"), rel=1e-6)


def test_a_head_of_its_own_gives_the_same_losses_at_every_stage(
    one_process: Processes, two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    """The configuration says that head and embeddings are one, the checkpoint stores two."""
    base = write_model(tmp_path / "base", "qwen2")
    weights = load_file(base / "model.safetensors")
    words = weights["model.embed_tokens.weight"]
    save_file(
        {**weights, "lm_head.weight": words.flip(0).contiguous()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    run(one_process, place, tmp_path / "whole", 0, model=base)
    run(two_processes, place, tmp_path / "parted", 3, model=base)
    first, *_ = expected = training.losses(tmp_path / "whole")
    assert training.losses(tmp_path / "parted") == pytest.approx(expected, rel=1e-5)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    run(one_process, place, tmp_path / "tied", 0, model=base)
    assert abs(training.losses(tmp_path / "tied")[0] - first) > 0.1


_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 420, "max_position_embeddings": 512, "initializer_range": 0.15,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_EYE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "vision_config": {**_EYE, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "image_token_index": 419, "boi_token_index": 418, "eoi_token_index": 417,
    },
    "fuyu": {
        **_SIZES, "text_config": {**_SIZES, "model_type": "persimmon"}, "image_size": 28, "patch_size": 14,
    },
    "got_ocr2": {
        "text_config": {**_GROUPED, "model_type": "qwen2"},
        "vision_config": {
            **_EYE, "image_size": 64, "patch_size": 16, "mlp_dim": 16, "output_channels": 8,
            "global_attn_indexes": [0], "window_size": 2,
        },
        "image_token_index": 419,
    },
}  # fmt: skip
"""Models that take images too; their configuration of text stands inside another."""


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "gemma3" else pytest.mark.full) for k in WRAPPERS]
)
def test_of_a_model_of_more_than_text_the_decoder_of_text_is_trained(
    kind: str, one_process: Processes, two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", kind, **WRAPPERS[kind])
    changing = {"max_steps": 6, "adjust_size": 2, "adjust_start": 1, "adjust_freeze": 1, "adjust_interval": 2}
    run(one_process, place, tmp_path / "whole", 0, model=base, lr=2e-2, **changing)
    run(two_processes, place, tmp_path / "parted", 3, model=base, lr=2e-2, **changing)
    expected = training.losses(tmp_path / "whole")
    assert training.losses(tmp_path / "parted") == pytest.approx(expected, rel=1e-5)
    ranks = training.ranks(tmp_path / "whole")[-1]
    assert ranks and all(name.startswith("model.language_model.") for name in ranks)
    adapter = tmp_path / "whole" / "adapter"
    assert read_peft_adapter(adapter).matrices.keys() == ranks.keys()
    evaluated = load(Options(str(base), str(adapter), dtype="fp32"), torch.device("cpu"))
    plain = load(Options(str(base), dtype="fp32"), torch.device("cpu"))
    ids = torch.arange(12).view(1, 12) + 5
    with torch.no_grad():
        assert not torch.allclose(evaluated.model(ids).logits, plain.model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gptj", marks=pytest.mark.full)])
def test_attention_auto_ends_in_what_the_model_has(
    kind: str, one_process: Processes, place: Place, tmp_path: Path
) -> None:
    """These have no sdpa."""
    changes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4} if kind == "gptj" else {}
    base = write_model(tmp_path / "base", kind, **changes)
    assert "fp32 (given), eager, padded" in run(one_process, place, tmp_path / "auto", 0, model=base)
    run(one_process, place, tmp_path / "eager", 0, model=base, attention="eager")
    assert training.losses(tmp_path / "auto") == training.losses(tmp_path / "eager")
    (found,) = one_process.run(
        training.command, place.arguments(tmp_path / "sdpa", 0, **TWO_STEPS, model=base, attention="sdpa")
    )
    assert found["code"] == 2 and "this model has no attention sdpa" in found["stderr"]
    assert found["stderr"].count("error:") == 1 and "choose auto or eager" in found["stderr"]
    lm = load(Options(str(base), dtype="fp32"), torch.device("cpu"))
    assert lm.config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"no attention sdpa \(--attention\)"):
        load(Options(str(base), attention="sdpa"), torch.device("cpu"))
