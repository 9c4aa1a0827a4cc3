"""Adapters that PEFT made: what we read means what PEFT trained, or one line names the key that makes it more."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexlora_ds.errors import UserError
from flexlora_ds.export import main, read_peft_adapter
from flexlora_ds.exports.checks import source_logits
from flexlora_ds.exports.probe import probe_logits
from flexlora_ds.peft_reading.attach import attach_adapter, doubts_of
from flexlora_ds.peft_reading.config import HARMLESS, pattern_value, require_plain, require_types
from flexlora_ds.peft_reading.idle import idle_keys
from tests.helpers.model_logits import apart
from tests.helpers.zoo import write_model

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
full = pytest.mark.full


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of the zoo, written once."""
    folder = tmp_path_factory.mktemp("bases")
    return lambda kind: folder / kind if (folder / kind).exists() else write_model(folder / kind, kind)


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def train_in_pretence(base: Path, out: Path, targets: list[str] | str, **options: Any) -> Tensor:
    """An adapter by PEFT whose every trained number moved from where it began; the model's logits."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
        model = get_peft_model(load(base), config)
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=rng))
        model.save_pretrained(out)
        return probe_logits(model)


@pytest.mark.parametrize(
    ("kind", "targets", "options"),
    [
        ("gpt2", r".*attn\.c_proj", {}),
        (
            "llama",
            ["q_proj", "v_proj"],
            {
                "use_rslora": True,
                "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3},
                "alpha_pattern": {"v_proj": 3, "0.self_attn.q_proj": 5},
            },
        ),
        ("llama", ["q_proj"], {"init_lora_weights": "orthogonal", "exclude_modules": r".*\.1\..*"}),
        pytest.param("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}, marks=full),
        pytest.param("qwen2", ["lm_head", "q_proj"], {}, marks=full),
        pytest.param("llama", ["q_proj"], {"init_lora_weights": "mica"}, marks=full),
        pytest.param("llama", ["q_proj"], {"init_lora_weights": "eva"}, marks=full),
        pytest.param(
            "llama", ["q_proj"], {"init_lora_weights": False, "layers_to_transform": [1]}, marks=full
        ),
        pytest.param("llama", "all-linear", {"init_lora_weights": "gaussian"}, marks=full),
    ],
)
def test_a_plain_lora_is_read_as_it_was_trained(
    bases: Callable[[str], Path], tmp_path: Path, kind: str, targets: list[str] | str, options: dict[str, Any]
) -> None:
    """Both by PEFT and by our own arithmetic on the matrices that we read."""
    expected = train_in_pretence(bases(kind), tmp_path, targets, **options)
    assert apart(probe_logits(load(bases(kind))), expected) > 0.05
    assert apart(probe_logits(attach_adapter(load(bases(kind)), str(tmp_path))), expected) < 1e-5
    ours = replace(read_peft_adapter(tmp_path), folder=None)
    assert apart(source_logits(load(bases(kind)), ours), expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "targets", "options", "named"),
    [
        ("llama", ["q_proj", "v_proj"], {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ("llama", ["q_proj"], {"use_dora": True}, "use_dora True"),
        ("llama", ["q_proj"], {"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        pytest.param("gpt2", ["c_attn"], {"init_lora_weights": "pissa"}, "init_lora_weights", marks=full),
        pytest.param("llama", ["q_proj"], {"bias": "all"}, "bias 'all'", marks=full),
        pytest.param("llama", ["q_proj"], {"bias": "lora_only"}, "bias 'lora_only'", marks=full),
        pytest.param("llama", ["q_proj"], {"lora_bias": True}, "lora_bias True", marks=full),
        pytest.param("llama", ["q_proj"], {"modules_to_save": ["lm_head"]}, "modules_to_save", marks=full),
        pytest.param("llama", ["q_proj"], {"layer_replication": [[0, 2], [1, 2]]}, "layer_repl", marks=full),
        pytest.param("llama", ["q_proj"], {"trainable_token_indices": [3, 5]}, "trainable_token", marks=full),
        pytest.param("llama", ["embed_tokens", "q_proj"], {}, "lora_embedding_A", marks=full),
        pytest.param(
            "mixtral", ["q_proj"], {"target_parameters": ["experts.gate_up_proj"]}, "target_par", marks=full
        ),
        pytest.param(
            "qwen2", ["lm_head", "embed_tokens"], {"ensure_weight_tying": True}, "ensure_weight", marks=full
        ),
    ],
)
def test_what_is_more_is_evaluated_through_peft_and_not_exported(
    bases: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    targets: list[str],
    options: dict[str, Any],
    named: str,
) -> None:
    adapter = tmp_path / "adapter"
    expected = train_in_pretence(bases(kind), adapter, targets, **options)
    assert apart(probe_logits(load(bases(kind))), expected) > 0.05
    assert apart(probe_logits(attach_adapter(load(bases(kind)), str(adapter))), expected) < 1e-5
    capsys.readouterr()
    for to in ("peft", "peft-uniform", "merged"):
        out = tmp_path / to
        assert main(["--run", str(adapter), "--base", str(bases(kind)), "--to", to, "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and named in line and not out.exists()


@pytest.mark.parametrize("init", ["pissa_niter_4", "lora_ga", "corda", "CorDA_x"])
def test_a_base_changed_by_chance_or_data_is_refused_by_both(
    bases: Callable[[str], Path], tmp_path: Path, init: str
) -> None:
    train_in_pretence(bases("llama"), tmp_path, ["q_proj"])
    edit(tmp_path, init_lora_weights=init)
    for read in (read_peft_adapter, lambda folder: attach_adapter(load(bases("llama")), str(folder))):
        with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
            read(tmp_path)


def edit(folder: Path, **values: Any) -> None:
    """Change keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_key_of_peft_that_is_not_known_to_be_harmless_must_be_empty() -> None:
    defaults = {k: v for k, v in LoraConfig(r=4).to_dict().items() if not isinstance(v, set)}
    require_plain(json.loads(json.dumps({**defaults, "peft_type": "LORA"})), "here")
    others = set(defaults) - set(HARMLESS) | {"a_key_of_a_later_peft"}
    assert {"use_dora", "layer_replication", "megatron_config", "alora_invocation_tokens"} <= others
    for key in others:
        for value in (True, 1, "x", [0], {"a": 0}):
            with pytest.raises(UserError, match=f"^{key} "):
                require_plain({**PLAIN, key: value}, "here")
        for value in (None, False, "", [], {}):
            require_plain({**PLAIN, key: value}, "here")


WRONG: dict[str, list[Any]] = {
    "r": [0, -1, "8", 2.5, True, None, [8], 10**400],
    "lora_alpha": ["16", float("nan"), float("inf"), 10**400, None, {}, False],
    "lora_dropout": ["0", 2, -0.1, [0.1]],
    "peft_type": [5, ["LORA"]],
    "task_type": [1, {}],
    "base_model_name_or_path": [3, ["a"]],
    "revision": [1.5],
    "target_modules": [5, {"q_proj": 1}, [1, 2]],
    "layers_to_transform": ["1", [0.5], {}],
    "init_lora_weights": [1, ["pissa"], {}],
    "rank_pattern": [
        [],
        [2],
        "q_proj",
        {"q_proj": 0},
        {"q_proj": "4"},
        {"q_proj": True},
        {"(": 4},
        {"a{9,1}": 4},
    ],
    "alpha_pattern": [7, {"q_proj": None}, {"q_proj": float("nan")}, {"*": 4}],
    "use_rslora": ["false", 1, 0],
    "fan_in_fan_out": ["no"],
    "bias": [5],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_values_of_other_types_are_one_line(key: str, value: Any) -> None:
    with pytest.raises(UserError) as raised:
        require_types({**PLAIN, key: value}, "adapter_config.json")
    line = str(raised.value)
    assert key in line and "adapter_config.json" in line and "\n" not in line and len(line) < 300


def test_keys_that_a_scale_needs_are_named() -> None:
    with pytest.raises(UserError, match="no lora_alpha"):
        require_types({"r": 4}, "here")


def test_patterns_mean_what_they_mean_to_peft() -> None:
    names = ["layers.1.q_proj", "layers.11.q_proj", "a.b+c", "model.layers.0.mlp.down_proj", "xq_proj"]
    for patterns in (
        {"q_proj": 1, r"layers\.1\.": 2},
        {r"1\.q_proj": 1, "q_proj": 2},
        {"a.b+c": 1},
        {"^layers": 1, r"(.*)\.0\..*": 2},
        {"proj$": 1, ".*": 2},
    ):
        for name in names:
            assert pattern_value(patterns, name, 0) == patterns.get(get_pattern_key(patterns, name), 0)


PATTERNS: list[dict[str, int]] = [
    {"q_prjo": 2},
    {"q_proj": 2, "layers.1.self_attn.q_proj": 3},
    {"layers.1.self_attn.q_proj": 3, "q_proj": 2, "v_proj": 5},
    {"k_proj": 2, r"layers\.(0|7)\..*": 3, "model.layers.9.self_attn.v_proj": 6},
    {".*": 3, "v_proj": 3, "q_proj": 5},
    {r"^model\.layers\.0\.self_attn\.q_proj": 2, "self_attn": 4},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_keys_that_mean_no_layer_are_told_by_whoever_reads(
    bases: Callable[[str], Path], tmp_path: Path, option: str, patterns: dict[str, int]
) -> None:
    """All that PEFT warns of, and a key behind others that take all its layers: without it nothing changes."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{option: patterns})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = get_peft_model(load(bases("llama")), config)
    by_peft = [str(w.message) for w in said if "did not match any targeted module" in str(w.message)]
    model.save_pretrained(tmp_path)
    edit(tmp_path, **{option: patterns})  # PEFT writes them by the alphabet
    names = model.base_model.targeted_module_names
    found = idle_keys({option: patterns}, names, "here")
    assert [key.key for key in found if key.hidden_by is None] == [
        key for key in patterns if any(repr(key) in line for line in by_peft)
    ]
    for key in found:
        left = {k: v for k, v in patterns.items() if k != key.key}
        for name in names:
            assert pattern_value(left, name, 0) == pattern_value(patterns, name, 0)
    read = read_peft_adapter(tmp_path).doubts
    assert len(read) == len(found)
    assert all(key.fault() in line for key, line in zip(found, read, strict=True))
    attached = doubts_of(attach_adapter(load(bases("llama")), str(tmp_path)))
    assert [line.partition(" (")[0] for line in attached] == [line.partition(" (")[0] for line in read]


def test_idle_keys_say_what_may_have_been_meant() -> None:
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(3) for kind in ("q_proj", "v_proj")]
    config = {"peft_type": "LORA", "alpha_pattern": {"q_prjo": 2, ".*": 3, "v_proj": 4, "0.q_proj": 3}}
    said = [(key.fault(), key.remedy()) for key in idle_keys(config, names, "here")]
    assert said == [
        ("alpha_pattern 'q_prjo' matches none of 6 adapted layers", "did you mean 'q_proj'?"),
        (
            "alpha_pattern 'v_proj' has no effect: '.*' stands before it, and the first match counts",
            "write it first",
        ),
        ("alpha_pattern '0.q_proj' matches none of 6 adapted layers", "did you mean 'q_proj'?"),
    ]
    remains = {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 3, "2.self_attn.q_proj": 4, "q_proj": 5}
    assert not idle_keys({"peft_type": "LORA", "rank_pattern": remains}, names, "here")
    across = {"0.*": 2, "1.*": 3, "2.*": 4, "q_proj": 5}
    hidden = [(k.key, k.hidden_by) for k in idle_keys({"alpha_pattern": across}, names, "here")]
    assert hidden == [("q_proj", "0.*")]
    anywhere = {"peft_type": "OSF", "rank_pattern": {"layers.1": 2, "layers.7": 3}}
    assert [key.key for key in idle_keys(anywhere, names, "here")] == ["layers.7"]
    assert not idle_keys({"peft_type": "ADALORA", "rank_pattern": {"a.lora_E": [True]}}, names, "here")


def test_an_export_warns_of_keys_without_effect(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    edit(tmp_path / "adapter", alpha_pattern={"qproj": 99})
    words = ["--run", f"{tmp_path}/adapter", "--base", f"{bases('llama')}", "--out", f"{tmp_path}/out"]
    assert main([*words, "--to", "peft"]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warned == [
        "warning: alpha_pattern 'qproj' matches none of 2 adapted layers "
        f"({tmp_path}/adapter/adapter_config.json); PEFT ignores it too"
    ]


@pytest.fixture(scope="module")
def sound(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    train_in_pretence(bases("llama"), folder, ["q_proj"])
    return folder


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "no tensors": lambda t: {},
    "has no lora_B": lambda t: {k: v for k, v in t.items() if k != B},
    "has no lora_A": lambda t: {k: v for k, v in t.items() if k != A},
    "layers.9": lambda t: {**t, A.replace(".0.", ".9."): t[A] + 1, B.replace(".0.", ".9."): t[B] + 1},
    "magnitude": lambda t: {**t, A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
    "something.else": lambda t: {**t, "something.else": torch.ones(2, 2)},
    "rank 4": lambda t: {**t, A: t[A][:3].clone(), B: t[B][:, :3].clone()},
    "rank": lambda t: {**t, A: torch.zeros(0, 32), B: torch.zeros(32, 0)},
    "size mismatch|in the base": lambda t: {**t, B: t[B][:30].clone()},
    "size mismatch|no matrix": lambda t: {**t, A: t[A].flatten()},
}


@pytest.mark.parametrize("named", DAMAGE)
def test_tensors_that_do_not_fit_are_named_by_both(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(DAMAGE[named](tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        attach_adapter(load(bases("llama")), str(folder))
    assert "\n" not in str(raised.value)
    capsys.readouterr()
    out = tmp_path / "out"
    code = main(["--run", str(folder), "--base", str(bases("llama")), "--to", "merged", "--out", str(out)])
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1 and line.startswith("error: ") and not out.exists()
    assert any(part in line for part in named.split("|")), line


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("adapter_config.json", b"[]", "a list where an object is expected"),
        ("adapter_config.json", b"null", "object is expected"),
        ("adapter_config.json", b"\xff\xfe", "not UTF-8"),
        ("adapter_config.json", b"[" * 100_000, "nested too deeply"),
        ("adapter_config.json", b'{"r": ' + b"9" * 5000 + b"}", "thousands of digits"),
        ("adapter_config.json", b"{}", "peft_type"),
        ("adapter_config.json", b'{"peft_type": {}, "r": 4}', "peft_type"),
        ("adapter_config.json", b'{"peft_type": "NEW", "r": 4}', "peft_type 'NEW'"),
        ("adapter_model.safetensors", b"", "cannot be read"),
        ("adapter_model.safetensors", b"\xff" * 64, "cannot be read"),
    ],
)
def test_files_of_other_kinds_are_one_line_in_both(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)
    (folder / name).write_bytes(content)
    for read in (read_peft_adapter, lambda folder: attach_adapter(load(bases("llama")), str(folder))):
        with pytest.raises(UserError) as raised:
            read(folder)
        line = str(raised.value)
        assert named in line and name in line and "\n" not in line and len(line) < 400


def test_a_key_that_peft_would_ignore_is_refused(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    edit(tmp_path / "adapter", new_kind_of_lora={"x": 1}, other_new_kind=None)
    with pytest.raises(UserError, match="new_kind_of_lora"):
        attach_adapter(load(bases("llama")), str(tmp_path / "adapter"))


def test_an_adapter_on_a_part_of_the_prompt_is_refused(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """The evaluation keeps the prompts' beginning in a cache, where PEFT sees no invocation tokens."""
    shutil.copytree(sound, tmp_path / "adapter")
    edit(tmp_path / "adapter", alora_invocation_tokens=[5, 6])
    with pytest.raises(UserError, match="alora_invocation_tokens"):
        attach_adapter(load(bases("llama")), str(tmp_path / "adapter"))


def test_a_pattern_that_backtracks_without_end_is_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    edit(tmp_path / "adapter", alpha_pattern={r"([\w.]+)*!": 4})
    with pytest.raises(UserError, match=r"alpha_pattern.*nested repetitions"):
        read_peft_adapter(tmp_path / "adapter")


@pytest.mark.full
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {r"([\w.]+)*!": 4}),
        ("target_modules", r"((\w|\.)+)+!"),
        ("exclude_modules", r"(\w*\.?)*!"),
    ],
)
def test_neither_does_peft_get_such_a_pattern(
    sound: Path, bases: Callable[[str], Path], tmp_path: Path, key: str, value: Any
) -> None:
    shutil.copytree(sound, tmp_path / "adapter")
    edit(tmp_path / "adapter", **{key: value})
    with pytest.raises(UserError, match=rf"{key}.*nested repetitions"):
        attach_adapter(load(bases("llama")), str(tmp_path / "adapter"))
