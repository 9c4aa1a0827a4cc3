"""What a model's folder may hold: the rest is one line in every way of loading, and no code of its own is run."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora_ds.base_model.loading import load_causal_lm, load_skeleton, load_tokenizer
from flexlora_ds.errors import UserError
from tests.helpers.shell import run_in_shell
from tests.helpers.tiny import tiny_llama
from tests.helpers.word_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama().save_pretrained(folder)  # type: ignore[operator]
    write_tokenizer(folder, bos_token="<s>", eos_token="</s>")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def whole(folder: Path) -> Any:
    return load_causal_lm(folder, dtype=torch.float32)


def partitioned(folder: Path) -> Any:
    """Ends before DeepSpeed is asked for anything."""
    return load_causal_lm(folder, dtype=torch.float32, zero3={"zero_optimization": {"stage": 3}})


WAYS = (whole, partitioned, load_skeleton)


def refusals(folder: Path, ways: tuple[Callable[[Path], Any], ...] = WAYS) -> set[str]:
    """The one line of every way of loading."""
    found = set()
    for way in ways:
        with pytest.raises(UserError) as caught:
            way(folder)
        found.add(str(caught.value))
    assert all("\n" not in line and len(line) < 1200 for line in found)
    return found


def test_an_adapter_beside_the_model_is_refused_in_every_way(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (line,) = refusals(folder, (*WAYS, load_tokenizer))
    assert "holds an adapter beside the model" in line and "--adapter" in line and "--to merged" in line


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd.safetensors", "a/../../outside.safetensors", "m.bin", 7, ".."],
)
def test_an_index_reads_safetensors_inside_the_folder_only(folder: Path, name: Any) -> None:
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder.parent / "outside.safetensors")
    names = list(load_file(weights))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = refusals(folder)
    assert repr(str(name)) in line and "inside the model's folder" in line and "index.json" in line


def test_weights_of_a_folder_inside_or_behind_a_link_are_read(folder: Path) -> None:
    """As the hub's cache keeps them: links to files elsewhere."""
    expected = whole(folder).state_dict()
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    shutil.move(folder / "model.safetensors", blobs / "0a1b")
    (folder / "parts").mkdir()
    (folder / "parts" / "one.safetensors").symlink_to(blobs / "0a1b")
    index = {"metadata": {}, "weight_map": dict.fromkeys(expected, "parts/one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = whole(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[1]", "a list where an object is expected"),
        ('{"metadata": {}}', "no object 'weight_map'"),
        ('{"weight_map": {"a": "b.safetensors"}}', "no object 'metadata'"),
        ('{"metadata": {}, "weight_map": {}}', "names no file"),
        ('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "b.safetensors, which is not there"),
        ('{"metadata": {}', "not valid JSON"),
    ],
)
def test_an_index_that_cannot_be_followed_is_named(folder: Path, index: str, words: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    (line,) = refusals(folder)
    assert words in line and "model.safetensors.index.json" in line


def test_weights_named_in_the_configuration_stay_inside(folder: Path) -> None:
    configure(folder, transformers_weights="adapter_model.bin")
    assert "only safetensors inside the model's folder" in refusals(folder).pop()
    configure(folder, transformers_weights="../model/model.safetensors")
    assert "only safetensors inside the model's folder" in refusals(folder).pop()


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    folder: Path, tmp_path: Path
) -> None:
    folder = folder.rename(tmp_path / 'it\'s $(touch ran) "mine"')
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    (line,) = refusals(folder)
    assert "pickled weights" in line and "pytorch_model.bin" in line
    run_in_shell(line.partition("convert them once: ")[2], tmp_path)
    found = whole(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


CODE = "open('ran', 'w').write('code of the model ran')\n"
OWN_CODE = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.Own",
    "AutoTokenizer": ["modeling_own.OwnTokenizer", None],
}


def test_code_beside_a_model_is_never_asked_for_and_never_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where somebody says yes on standard input."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    (folder / "modeling_own.py").write_text(CODE)
    configure(folder, model_type="own", architectures=["Own"], auto_map=OWN_CODE)
    settings = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": OWN_CODE}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    for line in refusals(folder, (*WAYS, load_tokenizer)):
        assert "code" in line and "never run" in line and "trust_remote_code" not in line
    assert not (folder / "ran").exists()


def test_a_known_architecture_is_loaded_without_the_code_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    expected = whole(folder).state_dict()
    (folder / "modeling_own.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    configure(folder, auto_map=OWN_CODE)
    found = whole(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert load_skeleton(folder).config.model_type == "llama"
    assert not (folder / "ran").exists()


ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 100_000},
    {"hidden_size": 10**12},
    {"vocab_size": -4},
    {"hidden_size": "wide"},
    {"num_attention_heads": 0},
    {"intermediate_size": 10**6},
]
MORE_ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 1_900},
    {"num_hidden_layers": 10**300},
    {"num_hidden_layers": [2]},
    {"vocab_size": 10**9},
    {"hidden_size": 10**5, "head_dim": 8},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": -2},
    {"hidden_act": "no such act"},
    {"hidden_act": ["silu"]},
    {"rope_parameters": {"rope_type": "no such rope"}},
    {"rope_parameters": 3},
    {"head_dim": 2**40},
    {"torch_dtype": "no such dtype", "dtype": "no such dtype"},
    {"model_type": 3},
    {"model_type": None},
    {"vocab_size": None},
    {"num_hidden_layers": 10**9, "num_attention_heads": 1},
    {"max_position_embeddings": "long"},
    {"layer_types": ["no such layer"] * 2},
    {"tie_word_embeddings": "perhaps"},
    {"rms_norm_eps": "small"},
    {"quantization_config": 3},
]


@pytest.mark.parametrize(
    "changes", [*ABSURD, *(pytest.param(changes, marks=pytest.mark.full) for changes in MORE_ABSURD)]
)
def test_a_configuration_of_absurd_values_is_one_line(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    assert all(str(folder) in line for line in refusals(folder))


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 4096, "block_ff_dim": 12288},  # GPT-like, LFM2
        {
            "shared_expert_intermediate_size": 20480,
            "moe_shared_expert_intermediate_size": 7688,
        },  # Qwen2-MoE, Nemotron
        {"vocab_size_per_layer_input": 262144, "hidden_size_per_layer": 4096},  # Gemma 3n
        {"num_experts": 16384},  # Doge
    ],
)
def test_a_size_is_no_count_of_modules(folder: Path, sizes: dict[str, int]) -> None:
    configure(folder, **sizes)
    for way in (whole, load_skeleton, load_tokenizer):
        way(folder)


def test_a_value_that_no_part_of_a_model_takes_is_one_line_of_the_tokenizer_too(folder: Path) -> None:
    """An evaluation asks for the tokenizer first."""
    configure(folder, tie_word_embeddings=None)
    assert all("tie_word_embeddings" in line for line in refusals(folder, (*WAYS, load_tokenizer)))
    configure(folder, tie_word_embeddings=False, output_attentions=True)
    with pytest.raises(UserError, match=r"output_attentions.*eager"):
        load_causal_lm(folder, dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 5000, '{"hidden_size": ' + "9" * 5000 + "}", "\udc80", "null"]
)
def test_a_configuration_that_is_no_object_is_one_line(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert all("config.json" in line for line in refusals(folder, (*WAYS, load_tokenizer)))


def test_damaged_weights_are_one_line_in_every_way(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert all("config.json describes" in line for line in refusals(folder))
