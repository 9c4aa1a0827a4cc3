"""Exports against PEFT itself: the logits of the training model, on the untouched base."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora_ds import FlexLoRAConfig, adapters, inject_adapters
from flexlora_ds.errors import RunError
from flexlora_ds.export import (
    AdapterFactors,
    export_merged,
    export_peft,
    export_uniform,
    main,
    read_peft_adapter,
    server_rank,
    write_peft_adapter,
)
from flexlora_ds.exports.checks import check_adapter
from flexlora_ds.peft_format import lora_of
from tests.helpers.tiny import tiny_llama
from tests.helpers.word_tokenizer import write_tokenizer

LAYERS = 12  # names of layers 1 and 11 must not be taken for each other
CONFIG = FlexLoRAConfig(rank=3, alpha=7.0, dropout=0.1, target_modules=("q_proj", "down_proj"))
IDS = torch.arange(1, 41).view(4, 10)


def save_base(folder: Path, dtype: str = "fp32") -> Path:
    tiny_llama(dtype, layers=LAYERS).save_pretrained(folder)  # type: ignore[operator]
    write_tokenizer(folder, bos_token="<s>", eos_token="</s>")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def train_in_pretence(model: nn.Module) -> dict[str, AdapterFactors]:
    """Give every adapter a rank of its own (1 to 7) and non-zero λ, as training and rank changes would."""
    inject_adapters(model, CONFIG)
    rng = torch.Generator().manual_seed(1)
    for i, layer in enumerate(adapters(model).values()):
        rank = 1 + i % 7
        layer.P.data = torch.randn(layer.out_features, rank, generator=rng) / 6
        layer.lam.data = torch.randn(rank, generator=rng)
        layer.Q.data = torch.randn(rank, layer.in_features, generator=rng) / 6
    return {n: AdapterFactors(m.P.data, m.lam.data, m.Q.data) for n, m in adapters(model).items()}


@pytest.fixture(scope="module")
def trained(base: Path) -> tuple[dict[str, AdapterFactors], Tensor]:
    """The matrices of a trained model, and its logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    matrices = train_in_pretence(model)
    return matrices, logits(model)


@pytest.fixture
def run(tmp_path: Path, base: Path, trained: tuple[dict[str, AdapterFactors], Tensor]) -> Path:
    folder = tmp_path / "run"
    extra = {"made": "in a test"}
    write_peft_adapter(folder / "adapter", trained[0], CONFIG, str(base), extra=extra, prompt="llm_adapters")
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    return result


def through_peft(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_peft_gives_the_training_models_logits(
    base: Path, run: Path, trained: tuple[dict[str, AdapterFactors], Tensor]
) -> None:
    expected = trained[1]
    assert error_of(logits(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.05
    assert error_of(through_peft(base, run / "adapter"), expected) <= 1e-5


def test_peft_takes_exactly_the_adapted_matrices_at_their_ranks(
    base: Path, run: Path, trained: tuple[dict[str, AdapterFactors], Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    found = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == {name: matrix.lam.numel() for name, matrix in trained[0].items()}
    assert not [w for w in recwarn if "missing" in str(w.message) or "unexpected" in str(w.message)]


@pytest.mark.complaint("Soup 803")
def test_pattern_keys_mean_one_module_each(run: Path) -> None:
    """Also where one module's name is the end of another's, as in a model inside a larger one."""
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for name in settings["target_modules"]:
        for other in (name, f"vision.{name}", name.replace(".1.", ".11."), name.replace(".", "x", 1)):
            hits = [k for k in settings["alpha_pattern"] if re.match(rf"(.*\.)?({k})$", other)]
            exists = other in settings["target_modules"]
            assert len(hits) <= 1
            assert not hits or (exists and re.fullmatch(hits[0], other))


def test_reading_back_gives_the_same_update(
    run: Path, trained: tuple[dict[str, AdapterFactors], Tensor]
) -> None:
    adapter = read_peft_adapter(run / "adapter")
    assert list(adapter.matrices) and set(adapter.matrices) == set(trained[0])
    for name, m in trained[0].items():
        expected = (CONFIG.alpha / CONFIG.rank) * (m.P.double() @ torch.diag(m.lam.double()) @ m.Q.double())
        assert torch.allclose(adapter.matrices[name].delta().double(), expected, rtol=1e-5, atol=1e-6)
    assert (adapter.notes["made"], adapter.prompt) == ("in a test", "llm_adapters")
    assert FlexLoRAConfig.from_dict(adapter.notes["config"]) == CONFIG


def test_adapters_that_peft_trained_are_read_with_their_patterns(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"], rank_pattern={"1.self_attn.v_proj": 4},
                   alpha_pattern={r"layers\.1.*": 12}, init_lora_weights=False),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    adapter = read_peft_adapter(tmp_path)
    assert len(adapter.matrices) == LAYERS
    for name, matrix in adapter.matrices.items():
        expected = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert torch.allclose(matrix.delta(), expected, atol=1e-6)


def test_an_interrupted_write_leaves_the_old_adapter(
    run: Path, trained: tuple[dict[str, AdapterFactors], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexlora_ds.peft_format._write_json", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_peft_adapter(run / "adapter", dict(list(trained[0].items())[:2]), CONFIG, "base")
    assert {file.name: file.read_bytes() for file in (run / "adapter").iterdir()} == before
    assert [entry.name for entry in run.iterdir()] == ["adapter"]


def test_uniform_ranks_need_no_pattern(
    base: Path, run: Path, tmp_path: Path, trained: tuple[dict[str, AdapterFactors], Tensor]
) -> None:
    out = tmp_path / "uniform"
    export_uniform(read_peft_adapter(run / "adapter"), out)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    assert settings["r"] == settings["lora_alpha"] == 7
    shapes = {
        tuple(t.shape) for k, t in load_file(out / "adapter_model.safetensors").items() if "lora_A" in k
    }
    assert {shape[0] for shape in shapes} == {7}
    assert error_of(through_peft(base, out), trained[1]) <= 1e-5


def test_merged_model_has_the_logits_and_needs_neither_adapter_nor_base(
    run: Path, tmp_path: Path, trained: tuple[dict[str, AdapterFactors], Tensor]
) -> None:
    tensors, logits_apart = export_merged(read_peft_adapter(run / "adapter"), tmp_path / "merged")
    assert tensors.figure <= 1 and logits_apart.figure <= 1e-5
    assert error_of(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained[1]) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


def test_bf16_merge_is_within_pefts_own_error(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "bf16")
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    matrices = train_in_pretence(exact)
    write_peft_adapter(tmp_path / "adapter", matrices, CONFIG, str(base))
    export_merged(read_peft_adapter(tmp_path / "adapter"), tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, m in matrices.items():
        old = original.get_parameter(f"{name}.weight").double()
        expected = old + (CONFIG.alpha / CONFIG.rank) * (m.P.double() * m.lam.double()) @ m.Q.double()
        our_error = (ours.get_parameter(f"{name}.weight").double() - expected).abs().max()
        their_error = (theirs.get_parameter(f"{name}.weight").double() - expected).abs().max()
        assert our_error <= their_error
    assert error_of(logits(ours.float()), logits(exact)) <= 1.5 * error_of(
        logits(theirs.float()), logits(exact)
    )


def test_damage_after_writing_is_noticed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes_one_number_wrong(tensors: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        key = next(k for k in tensors if "lora_B" in k)
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] += 0.01
        save_file(tensors, path, metadata)

    adapter = read_peft_adapter(run / "adapter")
    monkeypatch.setattr("flexlora_ds.peft_format.save_tensors", writes_one_number_wrong)
    with pytest.raises(RunError, match="relative difference"):
        export_uniform(adapter, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["peft", "peft-uniform", "merged"])
def test_an_adapter_read_wrongly_is_noticed_on_its_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """File and source agree here, for the same reader read both; PEFT reads the source otherwise."""
    export_uniform(read_peft_adapter(run / "adapter"), tmp_path / "uniform")
    monkeypatch.setattr("flexlora_ds.peft_reading.plain.pattern_value", lambda *found: found[2])
    uniform = tmp_path / "uniform" / "adapter_config.json"
    settings = json.loads(uniform.read_text())
    settings["alpha_pattern"] = {"down_proj": 3 * settings["lora_alpha"]}
    uniform.write_text(json.dumps(settings))
    assert main(["--run", str(uniform.parent), "--to", to, "--out", str(tmp_path / "out")]) == 1
    assert "logits" in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "uniform"}


def test_a_checkpoints_matrices_are_compared_with_the_written_file(
    base: Path, trained: tuple[dict[str, AdapterFactors], Tensor], tmp_path: Path
) -> None:
    adapter = lora_of(trained[0], CONFIG, str(base))
    tensors, logits_apart = export_peft(adapter, tmp_path / "out")
    assert tensors.figure <= 1e-6 and logits_apart.figure <= 1e-5
    half = {name: replace(matrix, scale=matrix.scale / 2) for name, matrix in adapter.matrices.items()}
    wrong = check_adapter(replace(adapter, matrices=half), tmp_path / "out", str(base))
    assert wrong.figure > 10 * wrong.limit


def test_an_export_without_its_base_says_how_to_name_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = run / "adapter" / "adapter_config.json"
    moved = {**json.loads(settings.read_text()), "base_model_name_or_path": str(tmp_path / "moved")}
    settings.write_text(json.dumps(moved))
    line = fails(["--run", str(run), "--to", "peft", "--out", str(tmp_path / "out")], capsys, 2)
    assert "moved" in line and "--base" in line and not (tmp_path / "out").exists()


def test_an_adapter_of_another_kind_of_model_is_merged_with_peft(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path / "base")
    settings = run / "adapter" / "adapter_config.json"
    other = {**json.loads(settings.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    settings.write_text(json.dumps(other))
    line = fails(["--run", str(run), "--to", "peft", "--out", str(tmp_path / "out")], capsys, 2)
    assert "of type vit" in line and "merge_and_unload" in line and "--base" not in line


def test_merge_that_changes_another_tensor_is_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base that is held whole; `test_shard_merge.py` has the other way."""
    from flexlora_ds.exports import merged_model

    merge = merged_model.merge

    def merge_and_spoil(model: Any, adapter: Any) -> None:
        merge(model, adapter)
        model.model.norm.weight.data[0] += 1e-3

    monkeypatch.setattr(merged_model, "merge", merge_and_spoil)
    monkeypatch.setattr(merged_model.ShardedBase, "of", lambda *_: None)
    with pytest.raises(RunError):
        export_merged(read_peft_adapter(run / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_command_writes_and_reports_its_check(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("peft", "peft-uniform", "merged"):
        assert main(["--run", str(run), "--to", kind, "--out", str(tmp_path / kind)]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"checked: .*: [\d.e+-]+ \(limit", printed)
        assert ("--max-lora-rank 8" in printed) == (kind == "peft-uniform")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_a_base_of_other_weights_is_said(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy is the same base; the same shapes with other weights may be meant, and are not passed over."""
    shutil.copytree(base, tmp_path / "copy")
    other = save_base(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value + 1e-3 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    for kind in ("peft", "merged"):
        for given, said in ((tmp_path / "copy", False), (other, True)):
            out = tmp_path / f"{kind}-{given.name}"
            words = ["--run", str(run), "--to", kind, "--out", str(out), "--base", str(given)]
            assert main(words) == 0
            warning = f"warning: the adapter was trained on {base}, whose weights are not those of {other}"
            assert (warning in capsys.readouterr().out) == said


@pytest.mark.parametrize("to", ["peft", "peft-uniform", "merged"])
@pytest.mark.parametrize(
    "size", [["--rank_budget", "40"], ["--energy", "0.5"], ["--rank_budget=3", "--min_rank=0"]]
)
def test_a_smaller_adapter_in_every_form(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, size: list[str]
) -> None:
    """Each is checked on the base like a whole one; the kept energy is that of the written update."""
    assert main(["--run", str(run), "--to", to, "--out", str(tmp_path / "out"), *size]) == 0
    printed = capsys.readouterr().out
    kept = re.search(
        r"kept (\d+) of \d+ directions, .* parameters \([\d.]+%\), ([\d.]+)% of the energy", printed
    )
    assert kept is not None and "checked: " in printed
    if to == "peft":
        before, after = (read_peft_adapter(folder).matrices for folder in (run / "adapter", tmp_path / "out"))
        assert sum(matrix.rank for matrix in after.values()) == int(kept[1])
        energies = [sum(float(m.delta().square().sum()) for m in found.values()) for found in (after, before)]
        assert energies[0] / energies[1] == pytest.approx(float(kept[2]) / 100, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--rank_budget", "1"],
            r"1 is below rank 1 in every matrix, which is \d+ \(--rank_budget\); give at least \d+",
        ),
        (["--parameters", "5"], r"5 is below rank 1 in every matrix"),
        (["--energy", "1.5"], "'1.5' is not a number above 0 and at most 1"),
        (["--energy", "nan"], "'nan' is not a number above 0"),
        (["--rank_budget", "9" * 300], "is not a whole number of at most 18 digits"),
        (["--min_rank", "2"], "--min_rank belongs to a smaller adapter"),
        (["--rank_budget", "4", "--energy", "0.5"], "not allowed with argument"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    line = fails(["--run", str(run), "--to", "peft", "--out", str(tmp_path / "out"), *words], capsys, 2)
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_rank_to_allow_in_the_server(rank: int, allowed: int | None) -> None:
    assert server_rank(rank) == allowed


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def arguments(folder: Path, out: Path, kind: str = "peft") -> list[str]:
        return ["--run", str(folder), "--to", kind, "--out", str(out)]

    new = tmp_path / "new"
    assert "holds no adapter" in fails(arguments(tmp_path / "nowhere", new), capsys, 2)
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "config.json").write_text("{}")
    assert "it is a model already" in fails(arguments(tmp_path / "full", new), capsys, 2)
    assert "not empty" in fails(arguments(run, run), capsys, 2)
    words = ["--checkpoint", str(tmp_path), "--to", "peft", "--out", str(new)]
    assert f"not a checkpoint ({tmp_path}); give a folder like" in fails(words, capsys, 2)
    small = save_small(tmp_path / "small")
    capsys.readouterr()
    assert "--base" in fails([*arguments(run, new, "merged"), "--base", str(small)], capsys, 2)
    weights = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, weights)
    assert "not finite" in fails(arguments(run, new), capsys, 1)
    tensors.pop(next(k for k in tensors if "lora_B" in k))
    save_file(tensors, weights)
    assert "has no lora_B" in fails(arguments(run, new), capsys, 2)
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "cannot be read" in fails(arguments(run, new), capsys, 2)
    settings = run / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"LORA"', '"ADALORA"'))
    assert "peft_type 'ADALORA'" in fails(arguments(run, new), capsys, 2)
    assert not new.exists()


def save_small(folder: Path) -> Path:
    tiny_llama(layers=2).save_pretrained(folder)  # type: ignore[operator]
    return folder
