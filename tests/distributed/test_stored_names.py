"""Checkpoints whose names are not one to one the model's: the same model under ZeRO-3 as transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora_ds.base_model.loading import load_causal_lm
from flexlora_ds.errors import UserError
from tests.helpers.processes import Processes
from tests.helpers.tiny import DTYPES, ds_config, start

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
HEAD, WORDS, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, Tensor]


def save_tied(folder: Path, kind: str = "llama", **changes: Any) -> Weights:
    """A small model whose configuration ties its head; its stored tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "tie_word_embeddings": True, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def store(folder: Path, *shards: Weights) -> None:
    """Write a checkpoint of one file, or of several with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, weights in enumerate(shards):
        name = f"model-{number}.safetensors"
        save_file(weights, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def own_head(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, {**weights, HEAD: -weights[WORDS] * 0.7})


def copied_head(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, weights, {HEAD: weights[WORDS].clone()})


def head_alone(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, {HEAD: weights.pop(WORDS), **weights})


def rounded_alike(folder: Path) -> None:
    """Heads that differ by less than bf16 shows: equal once they are loaded."""
    weights = save_tied(folder)
    words = weights[WORDS].bfloat16().float()
    store(folder, {**weights, WORDS: words, HEAD: words * (1 + 1e-5)})


def head_not_in_config(folder: Path) -> None:
    """What the configuration does not say, its class does."""
    weights = save_tied(folder, "gemma", head_dim=8)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(settings))
    store(folder, {**weights, HEAD: weights[WORDS] + 0.1})


def old_buffers(folder: Path) -> None:
    weights = save_tied(folder)
    rest = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    store(folder, {**weights, **rest, "a.name.of.nothing": torch.ones(3)})


def bare_names(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, {name.removeprefix("model."): value for name, value in weights.items()})


def both_names(folder: Path) -> None:
    """A tensor under its full name and under its bare one."""
    weights = save_tied(folder)
    store(folder, weights, {UP.removeprefix("model."): weights[UP] + 1})


def twice(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, weights, {UP: weights[UP] + 1})


def twice_last_first(folder: Path) -> None:
    weights = save_tied(folder)
    store(folder, {UP: weights[UP] + 1, "a.name.of.nothing": torch.ones(3)}, weights)


def experts(folder: Path) -> None:
    """Stored expert by expert, held as one tensor."""
    weights = save_tied(folder, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert any(".experts.3.w2" in name for name in weights)


def experts_own_head(folder: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    weights = save_tied(folder, "qwen3_moe", **sizes)
    store(folder, {**weights, HEAD: weights[WORDS] * 0.5})


def named_in_config(folder: Path) -> None:
    weights = save_tied(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": "other.safetensors"}))
    save_file({**weights, HEAD: weights[WORDS] * 2}, folder / "other.safetensors", metadata={"format": "pt"})


def fp32_in_bf16(folder: Path) -> None:
    """A buffer that transformers keeps in fp32 whatever the model is loaded in."""
    sizes = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "num_key_value_heads": 4,
    }  # fmt: skip
    weights = save_tied(folder, "deepseek_v3", **sizes)
    bias = next(name for name in weights if name.endswith("e_score_correction_bias"))
    store(folder, {**weights, bias: torch.tensor([0.1, 1e-4, 0.3, 0.7])})


TIED, UNTIED, DIRECTLY = True, False, True
CASES: list[tuple[Callable[[Path], None], str, bool, bool]] = [
    (own_head, "fp32", UNTIED, DIRECTLY),
    (copied_head, "fp32", TIED, DIRECTLY),
    (head_alone, "fp32", TIED, DIRECTLY),
    (both_names, "fp32", TIED, not DIRECTLY),
    (twice, "fp32", TIED, not DIRECTLY),
    (experts_own_head, "bf16", UNTIED, not DIRECTLY),
]
MORE: list[tuple[Callable[[Path], None], str, bool, bool]] = [
    (rounded_alike, "bf16", TIED, DIRECTLY),
    (rounded_alike, "fp32", UNTIED, DIRECTLY),
    (head_not_in_config, "fp32", UNTIED, DIRECTLY),
    (old_buffers, "fp32", TIED, DIRECTLY),
    (bare_names, "fp32", TIED, DIRECTLY),
    (twice_last_first, "fp32", TIED, not DIRECTLY),
    (experts, "fp32", TIED, not DIRECTLY),
    (named_in_config, "fp32", UNTIED, DIRECTLY),
    (fp32_in_bf16, "bf16", TIED, not DIRECTLY),
]


def compare(folder: str, dtype: str) -> dict[str, Any]:
    """Both ways of loading in each process: what differs, whether the head is tied, and how it was read."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    _, world = start()
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation="eager"
    ).eval()
    with patch(
        "flexlora_ds.base_model.loading._load_whole", wraps=_whole("flexlora_ds.base_model.loading")
    ) as whole:
        model = load_causal_lm(
            folder, dtype=DTYPES[dtype], attention="eager", zero3=ds_config(3, dtype, world)
        )
    theirs, ours = dict(expected.named_parameters()), dict(model.named_parameters())
    differing = sorted(set(theirs) ^ set(ours))
    for name in sorted(set(theirs) & set(ours)):  # gathered by both processes in one order
        with deepspeed.zero.GatheredParameters([ours[name]]):
            if not torch.equal(ours[name], theirs[name]):
                differing.append(name)
    for name, buffer in expected.named_buffers():
        if model.get_buffer(name).dtype != buffer.dtype or not torch.equal(model.get_buffer(name), buffer):
            differing.append(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {"differing": differing, "tied": tied, "directly": not whole.called}


def _whole(module: str) -> Any:
    import importlib

    return importlib.import_module(module)._load_whole


@pytest.mark.parametrize(
    ("make", "dtype", "tied", "directly"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)],
)
def test_partitions_hold_what_transformers_loads(
    two_processes: Processes,
    tmp_path: Path,
    make: Callable[[Path], None],
    dtype: str,
    tied: bool,
    directly: bool,
) -> None:
    make(tmp_path)
    for found in two_processes.run(compare, str(tmp_path), dtype):
        assert found == {"differing": [], "tied": tied, "directly": directly}


def loading_error(folder: str) -> str:
    _, world = start()
    with pytest.raises(UserError) as caught:
        load_causal_lm(folder, dtype=torch.float32, zero3=ds_config(3, "fp32", world))
    return str(caught.value)


@pytest.mark.parametrize("missing", [[HEAD, WORDS], [UP]])
def test_what_neither_way_finds_is_named(
    two_processes: Processes, tmp_path: Path, missing: list[str]
) -> None:
    weights = save_tied(tmp_path)
    store(tmp_path, {name: value for name, value in weights.items() if name not in missing})
    with pytest.raises(UserError) as caught:
        load_causal_lm(tmp_path, dtype=torch.float32)
    assert "of its weights" in str(caught.value) and missing[-1] in str(caught.value)
    assert two_processes.run(loading_error, str(tmp_path)) == [str(caught.value)] * 2
