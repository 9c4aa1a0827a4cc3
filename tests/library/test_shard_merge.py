"""A model merged through its base's files is the one merged whole, and takes no more memory than a few shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexlora_ds.errors import RunError
from flexlora_ds.export import export_merged
from flexlora_ds.exports import merged_model, streamed_model
from flexlora_ds.exports.shard_merge import ShardedBase
from flexlora_ds.files import tensor_stream
from flexlora_ds.files.tensor_stream import TensorFile
from flexlora_ds.peft_reading.plain import read_peft_adapter
from tests.helpers.model_logits import apart, logits
from tests.helpers.processes import ROOT
from tests.helpers.word_tokenizer import write_tokenizer
from tests.helpers.zoo import make_model


def write_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """In several files, where the model is large enough."""
    make_model(kind).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    write_tokenizer(folder, bos_token="<s>", eos_token="</s>")
    return folder


def write_adapter(base: Path, folder: Path, targets: list[str]) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the base is not to be held whole")


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("qwen2", ["k_proj"]),  # tied
        ("gpt2", ["c_attn", "c_proj"]),  # Conv1D: weights stored as [in, out]
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_it_is_the_model_that_was_merged_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, targets: list[str], stored: torch.dtype
) -> None:
    base = write_base(tmp_path / "base", kind, stored)
    folder = write_adapter(base, tmp_path / "adapter", targets)
    adapter = read_peft_adapter(folder)
    with monkeypatch.context() as whole:
        whole.setattr(ShardedBase, "of", lambda *_: None)
        export_merged(adapter, tmp_path / "whole", base=str(base))
    monkeypatch.setattr(merged_model, "load_causal_lm", never)
    monkeypatch.setattr(tensor_stream, "_PIECE", 100)  # a weight in many pieces
    tensors, found = export_merged(adapter, tmp_path / "streamed", base=str(base))
    assert tensors.figure <= 1 and found.figure <= found.limit
    expected, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("whole", "streamed")
    )
    assert model.config.to_dict() == expected.config.to_dict() | {"_name_or_path": model.config._name_or_path}
    assert json.loads((tmp_path / "streamed" / "config.json").read_text()) == json.loads(
        (tmp_path / "whole" / "config.json").read_text()
    )
    for name, value in expected.state_dict().items():
        limit = 2 * torch.finfo(stored).eps * value.abs().max()
        assert (model.state_dict()[name] - value).abs().max() <= limit, name
    if stored == torch.float32:
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert apart(logits(model), logits(PeftModel.from_pretrained(plain, folder))) < 1e-5
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.full)])
def test_experts_that_are_stacked_while_they_load_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The base is held whole for the logits only; its files keep their names."""
    base = write_base(tmp_path / "base", kind)
    folder = write_adapter(base, tmp_path / "adapter", ["q_proj"])
    monkeypatch.setattr(merged_model, "merge", never)
    monkeypatch.setattr(merged_model, "_merge_whole", never)
    tensors, found = export_merged(read_peft_adapter(folder), tmp_path / "out", base=str(base))
    assert tensors.figure <= 1 and found.figure < 1e-5
    names = [
        {name for path in where.glob("*.safetensors") for name in load_file(path)}
        for where in (base, tmp_path / "out")
    ]
    assert names[0] == names[1] and any(".experts.0." in name for name in names[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert apart(logits(model), logits(PeftModel.from_pretrained(plain, folder))) < 1e-5


def test_another_dtype_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = read_peft_adapter(write_adapter(base, tmp_path / "adapter", ["q_proj"]))
    monkeypatch.setattr(merged_model, "load_causal_lm", never)
    export_merged(adapter, tmp_path / "out", base=str(base), dtype=torch.float16)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


@pytest.mark.parametrize("damage", ["adapted", "another", "missing"])
def test_a_file_that_is_not_what_was_merged_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = read_peft_adapter(write_adapter(base, tmp_path / "adapter", ["q_proj"]))
    merge = ShardedBase.merge

    def spoil(self: ShardedBase, folder: Path, dtype: torch.dtype) -> None:
        merge(self, folder, dtype)
        part = "q_proj.weight" if damage == "adapted" else "norm.weight"
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for name in [name for name in tensors if name.endswith(part)]:
                if damage == "missing":
                    del tensors[name]
                else:
                    tensors[name].view(-1)[0] += 1e-3
            save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(ShardedBase, "merge", spoil)
    with pytest.raises(RunError, match="error of a merged weight"):
        export_merged(adapter, tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_layers_that_read_each_others_weights_are_checked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a weight is NaN while it is not its own layer's turn."""
    base = write_base(tmp_path / "base", "llama")
    adapter = read_peft_adapter(write_adapter(base, tmp_path / "adapter", ["q_proj"]))
    original = streamed_model._stream

    def without_hooks_of_norms(module: Any, places: Any, dtype: torch.dtype) -> None:
        original(module, places, dtype)
        if "Norm" in type(module).__name__:
            module._forward_pre_hooks.clear()

    monkeypatch.setattr(streamed_model, "_stream", without_hooks_of_norms)
    tensors, found = export_merged(adapter, tmp_path / "out", base=str(base))
    assert tensors.figure <= 1 and found.figure <= found.limit
    monkeypatch.setattr(merged_model, "load_causal_lm", never)
    with pytest.raises(AssertionError, match="held whole"):
        export_merged(adapter, tmp_path / "again", base=str(base))


def test_what_is_not_written_is_no_file(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (2,)), "c": (torch.int64, ())}
    values = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    with TensorFile(tmp_path / "file", layout) as file:
        for value in values.values():
            for piece in value.view(-1).split(2):
                file.write(piece)
    found = load_file(tmp_path / "file")
    assert {n: (v.dtype, v.tolist()) for n, v in found.items()} == {
        n: (v.dtype, v.tolist()) for n, v in values.items()
    }
    with pytest.raises(AssertionError, match="not written"), TensorFile(tmp_path / "short", layout) as file:
        file.write(values["a"])


LIMITED = """
import resource, sys
for name in ("triton", "sklearn", "scipy"):  # 120 MB of the limit, where transformers and torch find them
    sys.modules[name] = None
from flexlora_ds.export import main
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
code = main(sys.argv[2:])
# Of this program alone: a process that is started keeps its starter's peak in ru_maxrss.
print(*[int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")])
sys.exit(code)
"""


def write_large(folder: Path, shard: int, layers: int) -> None:
    """A Llama of small numbers, layer by layer, its files of at most `shard` bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 1024
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype=torch.float32,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).state_dict().items()}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        held = sum(4 * torch.Size(s).numel() for s in files[-1].values())
        if held + 4 * torch.Size(shape).numel() > shard:
            files.append({})
        files[-1][name] = shape
    index = {}
    for number, wanted in enumerate(files):
        path = folder / f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        with TensorFile(path, {n: (torch.float32, s) for n, s in wanted.items()}) as file:
            for shape in wanted.values():
                file.write(torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / 40)
        index |= dict.fromkeys(wanted, path.name)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.full
def test_two_gigabytes_in_shards_of_a_hundred_megabytes_are_merged_in_700(tmp_path: Path) -> None:
    """Libraries take 300 MB of the limit. Held whole, the same model does not fit."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    torch.manual_seed(0)
    write_large(base, 100 << 20, layers=30)
    write_tokenizer(base, bos_token="<s>", eos_token="</s>")
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert sum(sizes) >= 2_000_000_000 and max(sizes) <= 101 << 20
    adapter.mkdir()
    tensors = {}
    for layer in range(30):
        for part, width in (("self_attn.q_proj", 1024), ("mlp.up_proj", 4096)):
            name = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 1024) / 32
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, 8) / 32
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(base)}
    targets = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | targets))
    command = [sys.executable, "-c", LIMITED, "700", "--run", str(adapter), "--to", "merged", "--out"]
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"peak resident memory {peak} MB for a base of {sum(sizes) >> 20} MB")
    assert "checked: the largest difference of logits" in done.stdout
    with safe_open(next(out.glob("model-00002-*")), framework="pt") as file:
        assert len(list(file.keys())) > 1
    code = LIMITED.replace(
        "code =", "from flexlora_ds.exports.shard_merge import ShardedBase as S; ", 1
    ).replace("S; ", "S; S.of = lambda *_: None; code =", 1)
    whole = subprocess.run(
        [sys.executable, "-c", code, *command[3:], str(tmp_path / "whole")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert whole.returncode != 0, "the limit is one"
