"""A GGUF base is a model like any other: it loads, adapts, merges and saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.base_model.loading import load_causal_lm, load_skeleton, load_tokenizer
from flexlora_ds.errors import UserError
from flexlora_ds.export import AdapterFactors, export_merged, read_peft_adapter, write_peft_adapter
from tests.helpers.tiny import tiny_llama
from tests.helpers.tiny_gguf import write_gguf

IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_logits_are_the_original_models(file: Path) -> None:
    model = load_causal_lm(file, dtype=torch.float32)
    with torch.no_grad():
        expected = tiny_llama().eval()(IDS).logits
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    assert {p.dtype for p in load_causal_lm(file, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_tokenizer_comes_with_a_pad_token(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    assert tokenizer.pad_token in ("</s>", "<unk>")
    assert tokenizer.convert_ids_to_tokens([2, 8, 10]) == ["</s>", "▁w5", "▁w7"]


def test_an_adapter_beside_a_gguf_is_refused_in_every_way(file: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and not the file."""
    moved = tmp_path / file.name
    moved.symlink_to(file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    stage_3 = {"zero_optimization": {"stage": 3}}
    for way in (
        lambda: load_causal_lm(moved, dtype=torch.float32),
        lambda: load_causal_lm(moved, dtype=torch.float32, zero3=stage_3),
        lambda: load_skeleton(moved),
        lambda: load_tokenizer(moved),
    ):
        with pytest.raises(UserError, match="holds an adapter beside the model"):
            way()


def test_training_on_a_gguf_merges_into_a_plain_model(file: Path, tmp_path: Path) -> None:
    model = load_causal_lm(file, dtype=torch.float32)
    config = FlexLoRAConfig(rank=2, dropout=0.0)
    inject_adapters(model, config)
    for layer in adapters(model).values():
        layer.lam.data.fill_(0.7)
    with torch.no_grad():
        expected = model(IDS).logits
    matrices = {n: AdapterFactors(m.P.data, m.lam.data, m.Q.data) for n, m in adapters(model).items()}
    write_peft_adapter(tmp_path / "adapter", matrices, config, str(file))
    tensors, _ = export_merged(read_peft_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert tensors.figure <= 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (merged(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == load_tokenizer(file).get_vocab()
