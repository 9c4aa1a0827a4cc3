"""Loading a base model: what arrives equals what was saved; what is missing is one clear line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flexlora_ds.base_model.loading import load_causal_lm, load_tokenizer
from flexlora_ds.errors import UserError
from tests.helpers.word_tokenizer import write_tokenizer

IDS = torch.tensor([[1, 5, 9, 2, 30, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="10KB")
    return path


def test_weights_dtype_and_logits_are_those_that_were_saved(folder: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(folder).eval()
    model = load_causal_lm(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
    half = load_causal_lm(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not model.training


@pytest.mark.parametrize(
    ("name", "words"),
    [("./nowhere", "does not exist"), ("x/y/z", "does not exist"), ("some/weights.gguf", "does not exist")],
)
def test_missing_path_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_causal_lm(name, dtype=torch.float32)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_unreachable_hub_says_how_to_get_a_gated_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (lambda name: load_causal_lm(name, dtype=torch.float32), load_tokenizer):
        with pytest.raises(UserError) as caught:
            load("meta-llama/Meta-Llama-3-8B")
        message = str(caught.value)
        assert "meta-llama/Meta-Llama-3-8B" in message and "\n" not in message
        for mend in ("licence", "HF_TOKEN", "hf auth login", "hf download"):
            assert mend in message
    assert capfd.readouterr().err == ""


def test_gated_model_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    client = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")

    def refuse(*_: object, **__: object) -> None:
        request = client.Request("GET", "https://huggingface.co")
        raise GatedRepoError("403 Client Error", response=client.Response(403, request=request))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("flexlora_ds.base_model.source._hub_reachable", lambda: True)
    with pytest.raises(UserError, match=r"gated.*licence.*HF_TOKEN.*hf auth login"):
        load_causal_lm("meta-llama/Meta-Llama-3-8B", dtype=torch.float32)


def test_folder_without_config_names_the_gguf_inside(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"no config.json; give the file itself: .*tiny\.gguf"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_gguf_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("flexlora_ds.base_model.source._GGUF_PACKAGES", ("no_such_gguf_reader",))
    with pytest.raises(UserError, match="pip install no_such_gguf_reader"):
        load_causal_lm(tmp_path / "tiny.gguf", dtype=torch.float32)


def test_broken_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"tiny\.gguf cannot be loaded") as caught:
        load_causal_lm(tmp_path / "tiny.gguf", dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_missing_weight_is_an_error_and_not_a_random_one(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_cut_short_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(LlamaForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(tmp_path, dtype=torch.float32)


def test_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    with pytest.raises(UserError, match="no_such_architecture") as caught:
        load_causal_lm(tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_pad_token_is_kept_when_special_and_is_never_a_word(tmp_path: Path) -> None:
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, given, expected in [
        ("own", {**ends, "pad_token": "<pad>"}, "<pad>"),
        ("none", ends, "</s>"),
        ("set_aside", {**ends, "additional_special_tokens": ["<pad>"]}, "<pad>"),
    ]:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        write_tokenizer(path, **given)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(path)
        assert tokenizer.pad_token == expected
        assert tokenizer.pad_token_id not in tokenizer("! a b", add_special_tokens=False)["input_ids"]


def test_tokenizer_without_any_special_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no pad, end or unknown token"):
        load_tokenizer(tmp_path)


def test_import_brings_neither_transformers_nor_deepspeed() -> None:
    code = (
        "import sys, flexlora_ds.base_model.loading, flexlora_ds.base_model.source\n"
        "assert not {'transformers', 'deepspeed', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
