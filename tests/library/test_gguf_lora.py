"""llama.cpp's adapter file: on llama.cpp's weights it is the model that PEFT merged."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexlora_ds.export import main, read_peft_adapter
from flexlora_ds.exports.gguf_lora import ADAPTER_FILE, GgufNames, write_gguf_lora
from tests.helpers.model_logits import apart
from tests.helpers.tiny_gguf import NAMES, write_gguf
from tests.helpers.zoo import write_model

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without biases, which `tests.helpers.tiny_gguf` writes: grouped keys, so that q and k differ."""
    folder = tmp_path_factory.mktemp("llama")
    return write_model(folder, "llama", attention_bias=False, mlp_bias=False)


def write_adapter(base: Path, folder: Path, targets: list[str] = TARGETS) -> Path:
    """Of mixed ranks and scales, by PEFT."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        rank_pattern={"k_proj": 6, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 9},
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def attached(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def exported(base: Path, adapter: Path, out: Path) -> Path:
    words = ["--run", str(adapter), "--to", "gguf-lora", "--base", str(base), "--out", str(out)]
    assert main(words) == 0
    return out / ADAPTER_FILE


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def updates(path: Path) -> dict[str, Any]:
    """alpha / rank · B A by the name of the weight, as llama.cpp's `get_scale` has it."""
    alpha = gguf.GGUFReader(path).get_field("adapter.lora.alpha").contents()
    found = tensors(path)
    names = {name.rpartition(".")[0] for name in found}
    return {
        name: alpha / found[f"{name}.lora_a"].shape[0] * found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        for name in names
    }


def test_llama_cpps_weights_with_it_are_those_of_the_merged_model(llama: Path, tmp_path: Path) -> None:
    """Of a model that another function wrote as GGUF, before and after PEFT merged the adapter."""
    adapter = write_adapter(llama, tmp_path / "adapter")
    path = exported(llama, adapter, tmp_path / "out")
    before = tensors(write_gguf(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "before.gguf"))
    merged = attached(llama, adapter).merge_and_unload()
    after = tensors(write_gguf(merged, tmp_path / "after.gguf"))
    found = updates(path)
    assert set(found) == {name for name in before if not np.array_equal(before[name], after[name])}
    for name, update in found.items():
        assert np.abs(before[name] + update - after[name]).max() <= 1e-5 * np.abs(update).max()
    ranks = {value.shape[0] for name, value in tensors(path).items() if name.endswith("lora_a")}
    assert ranks == {6}, "one rank for all"
    reader = gguf.GGUFReader(path)
    said = ("general.type", "general.architecture", "adapter.type")
    assert [reader.get_field(key).contents() for key in said] == ["adapter", "llama", "lora"]


def test_other_architectures_keep_their_order_of_rows(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter")
    found = updates(exported(base, adapter, tmp_path / "out"))
    model = attached(base, adapter).base_model.model
    seen = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            _, _, layer, *inner = name.split(".")
            update = found[f"blk.{layer}.{NAMES['.'.join(inner)]}.weight"]
            expected = module.get_delta_weight("default").detach().numpy()
            assert np.abs(update - expected).max() <= 1e-5 * np.abs(expected).max()
            seen += 1
    assert seen == len(found) == 8


@pytest.mark.parametrize(
    ("kind", "targets", "words"),
    [
        ("gpt2", ["c_attn"], "--to gguf-lora knows llama, mistral, qwen2, qwen3, and the base is gpt2"),
        ("qwen2", ["lm_head"], "llama.cpp has no weight of its own for lm_head"),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, targets: list[str], words: str
) -> None:
    base = write_model(tmp_path / "base", kind)
    adapter = write_adapter(base, tmp_path / "adapter", targets)
    out = tmp_path / "out"
    line = ["--run", str(adapter), "--to", "gguf-lora", "--base", str(base), "--out", str(out)]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert words in error and "--to merged" in error and not out.exists()


def test_rows_in_another_order_are_noticed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(llama, tmp_path / "adapter")
    monkeypatch.setattr(GgufNames, "stored", lambda self, name, B: B)
    words = ["--run", str(adapter), "--to", "gguf-lora", "--base", str(llama), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "difference of an update read back" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
def test_llama_cpp_gives_pefts_logits(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by llama.cpp itself; at ranks of its own and one alpha, it scales the same adapter wrongly."""
    from llama_cpp import Llama

    adapter = write_adapter(llama, tmp_path / "adapter")
    path = exported(llama, adapter, tmp_path / "out")
    base = write_gguf(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "base.gguf")
    ids = [1, *range(5, 25)]
    expected = _logits(attached(llama, adapter), ids)
    plain = _logits(AutoModelForCausalLM.from_pretrained(llama), ids)

    def by_llama_cpp(**options: Any) -> Tensor:
        model = Llama(str(base), logits_all=True, n_ctx=64, n_threads=1, verbose=False, **options)
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))

    assert apart(by_llama_cpp(), plain) < 1e-3, "the two compute the base alike"
    found = apart(by_llama_cpp(lora_path=str(path)), expected)
    monkeypatch.setattr("flexlora_ds.exports.gguf_lora.padded", lambda adapter: adapter)
    config = AutoModelForCausalLM.from_pretrained(llama).config
    write_gguf_lora(tmp_path / "mixed.gguf", read_peft_adapter(adapter), config)
    wrong = apart(by_llama_cpp(lora_path=str(tmp_path / "mixed.gguf")), expected)
    print(f"apart from PEFT's logits: {found:.1e} padded, {wrong:.1e} with ranks of its own")
    assert found < 1e-3 and wrong > 1e-2
    assert apart(plain, expected) > 1e-2, "the adapter matters"


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    found: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return found
