"""Merging: the logits of the unmerged adapter, also where the adapted weight is another layer's too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eval.model.loading import recorded_date, recorded_prompt
from eval.model.merging import merge_adapter
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.export import export_merged, main, read_peft_adapter
from flexlora_ds.exports.probe import probe_logits
from flexlora_ds.exports.shard_merge import ShardedBase
from tests.helpers.model_logits import apart, logits
from tests.helpers.zoo import make_model, write_model


def write_adapter(base: Path, out: Path, targets: list[str] | str) -> Path:
    """An adapter that PEFT drew at random."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(out)
    return out


def unmerged(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen2", ["q_proj", "lm_head"]),
        ("qwen2", ["q_proj", "embed_tokens"]),
        ("gemma2", ["lm_head"]),
        ("gpt2", ["lm_head", "c_attn"]),
        ("llama", ["lm_head", "down_proj"]),
    ],
)
def test_an_evaluation_merges_into_weights_of_their_own(
    tmp_path: Path, kind: str, targets: list[str]
) -> None:
    base = write_model(tmp_path / "base", kind)
    adapter = write_adapter(base, tmp_path / "adapter", targets)
    expected = logits(unmerged(base, adapter))
    assert apart(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.1
    assert apart(logits(merge_adapter(unmerged(base, adapter))), expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "targets", "untied"),
    [
        ("qwen2", ["q_proj", "lm_head"], True),
        ("gemma2", ["lm_head"], True),
        ("qwen3", ["q_proj"], False),
    ],
)
def test_a_tied_head_is_untied_in_the_exported_model(
    tmp_path: Path, kind: str, targets: list[str], untied: bool
) -> None:
    base = write_model(tmp_path / "base", kind)
    adapter = write_adapter(base, tmp_path / "adapter", targets)
    export_merged(read_peft_adapter(adapter), tmp_path / "merged", base=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert apart(logits(merged), logits(unmerged(base, adapter))) < 1e-5
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) == untied
    assert settings.get("tie_word_embeddings") is (not untied)


@pytest.mark.parametrize("note", [{"prompt": "llm_adapters"}, {"prompt": "chat", "date": "2024-07-26"}])
def test_a_merged_model_is_asked_as_its_adapter_is(tmp_path: Path, note: dict[str, str]) -> None:
    base = write_model(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj"])
    (adapter / "prompt.json").write_text(json.dumps(note))
    merged = tmp_path / "merged"
    export_merged(read_peft_adapter(adapter), merged, base=str(base))
    for trained in map(str, (adapter, merged)):
        assert (recorded_prompt(trained), recorded_date(trained)) == (note["prompt"], note.get("date"))


class Looped(torch.nn.Module):
    """A block that runs one linear layer under two names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.first, self.second = mlp, mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def looped() -> Any:
    model = make_model("qwen2")
    model.model.layers[1].mlp = Looped(model.model.layers[1].mlp)
    return model


def test_a_layer_under_two_names_is_merged_under_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*first\.down_proj", init_lora_weights=False)
    model = get_peft_model(looped(), config)
    expected = logits(model)
    assert apart(logits(merge_adapter(model)), expected) < 1e-5


def test_what_a_saved_model_cannot_hold_apart_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base", "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter", ["k_proj"])

    def shares(*_: Any, **__: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        first, second = model.model.layers
        second.self_attn.k_proj.weight = first.self_attn.k_proj.weight
        return model

    monkeypatch.setattr("flexlora_ds.exports.merged_model.load_causal_lm", shares)
    monkeypatch.setattr(ShardedBase, "of", lambda *_: None)
    with pytest.raises(UserError, match="cannot hold them apart; export it with --to peft"):
        export_merged(read_peft_adapter(adapter), tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_the_logits_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe compares with PEFT's unmerged adapter, so it sees what the file alone does not show."""
    base = write_model(tmp_path / "base", "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj"])
    monkeypatch.setattr("eval.model.merging.untie", lambda *_: None)
    model = unmerged(base, write_adapter(base, tmp_path / "head", ["lm_head"]))
    with pytest.raises(RunError, match="leave --merge out"):
        merge_adapter(model)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    weights = "base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"
    save_file({**tensors, weights: torch.zeros(32, 32)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert (
        main(["--run", str(adapter), "--to", "merged", "--base", str(base), "--out", str(tmp_path / "m")])
        == 1
    )
    assert "logits" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_an_adapter_of_another_kind_is_not_merged(tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(
        make_model("qwen2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(model)


def test_the_probe_reads_the_whole_vocabulary() -> None:
    found = probe_logits(make_model("granite"))
    assert found.shape == (2, 24, 420) and found.dtype == torch.float32
    assert float(found.std(dim=-1).min()) > 0
