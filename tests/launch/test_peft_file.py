"""`method: peft`: what a file may say, and what is refused in one line before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from flexlora_ds import TorchEngine
from flexlora_ds.errors import RunError, UserError
from launch.engine.methods import peft_settings
from launch.engine.methods.peft_file import PeftFromFile, count_parameters, require_possible
from launch.engine.methods.peft_settings import read_peft_config
from launch.options.train_options import TrainOptions
from tests.helpers import eval_tiny


def options(folder: Path, content: Any, **others: Any) -> TrainOptions:
    file = folder / "peft.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return TrainOptions(method="peft", peft_config=str(file), **{"model": "m", **others})


REFUSED: dict[str, Any] = {
    r"no peft_type .*; give one of ADALORA, ": {"r": 4},
    r"peft_type 'LORAA' is not known to PEFT .*; did you mean LORA\?": {"peft_type": "LORAA"},
    r"peft_type 7 is not known to PEFT": {"peft_type": 7},
    r"'lora_alhpa' is not known to PEFT .*; did you mean lora_alpha\?": {
        "peft_type": "LORA",
        "lora_alhpa": 0,
    },
    r"task_type 'SEQ_CLS' .*; leave it out": {"peft_type": "LORA", "task_type": "SEQ_CLS"},
    r"PEFT cannot make this adapter: You can only specify either": {
        "peft_type": "OFT",
        "r": 4,
        "oft_block_size": 4,
    },
    r"peft_type PREFIX_TUNING cannot be trained here .*virtual tokens": {"peft_type": "PREFIX_TUNING"},
    r"peft_type ADALORA cannot be trained here .*; choose method adalora": {
        "peft_type": "ADALORA",
        "total_step": 10,
    },
    r"init_lora_weights 'pissa_niter_4' is more than .*; choose method pissa": {
        "peft_type": "LORA",
        "init_lora_weights": "pissa_niter_4",
    },
    r"not valid JSON: ": "{",
    r"list|array|object": "[]",
    r"peft_type SHADOW cannot be trained here": {"peft_type": "SHADOW"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_a_file_cannot_say_is_refused_in_one_line(said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        read_peft_config(options(tmp_path, REFUSED[said]))
    assert "\n" not in str(refusal.value) and str(tmp_path / "peft.json") in str(refusal.value)


def test_a_file_must_be_named_and_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method peft needs peft_config"):
        read_peft_config(TrainOptions(model="m", method="peft"))
    with pytest.raises(UserError, match=r"absent\.json"):
        read_peft_config(TrainOptions(model="m", method="peft", peft_config=str(tmp_path / "absent.json")))


def test_what_describes_an_adapter_that_exists_is_passed_over(tmp_path: Path) -> None:
    """A file that PEFT wrote beside an adapter is taken as it is."""
    OFTConfig(oft_block_size=8, r=0, inference_mode=True, base_model_name_or_path="x").save_pretrained(
        tmp_path
    )
    written = (tmp_path / "adapter_config.json").read_text()
    found: Any = read_peft_config(options(tmp_path, written))
    assert (found.oft_block_size, found.inference_mode, found.base_model_name_or_path) == (8, False, None)


def test_stage_3_takes_lora_only(tmp_path: Path) -> None:
    require_possible(options(tmp_path, {"peft_type": "LORA"}), 3, {})
    with pytest.raises(UserError, match="peft_type OFT needs ZeRO-0, 1 or 2"):
        require_possible(options(tmp_path, {"peft_type": "OFT"}), 3, {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    eval_tiny.make_model(seed=4).save_pretrained(folder)
    return folder


def test_parameters_are_counted_without_weights(base: Path, tmp_path: Path) -> None:
    given = {"peft_type": "OFT", "r": 0, "oft_block_size": 8, "target_modules": ["q_proj"]}
    config = OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"])
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    assert (
        count_parameters(options(tmp_path, given, model=str(base))) == real.get_nb_trainable_parameters()[0]
    )


@pytest.mark.parametrize("wrong", [{"r": "eight"}, {"target_modules": ["q_prjo"]}, {"target_modules": "("}])
def test_values_that_peft_finds_out_about_late_are_one_line_too(
    wrong: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="PEFT cannot make this adapter") as refusal:
        count_parameters(options(tmp_path, {"peft_type": "LORA", **wrong}, model=str(base)))
    assert "\n" not in str(refusal.value)


def test_a_module_to_save_that_is_none_is_refused(base: Path, tmp_path: Path) -> None:
    """PEFT would train without it, and say in the adapter that it was there."""
    for given, said in (
        (["lm_head", "lmhead"], "'lmhead' is no module of the base"),
        ("lm_head", "'lm_head' is no list"),
    ):
        content = {"peft_type": "LORA", "modules_to_save": given}
        with pytest.raises(UserError, match=rf"modules_to_save {said} \(.*\.json\)"):
            count_parameters(options(tmp_path, content, model=str(base)))


LORA = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
IDLE: list[tuple[dict[str, Any], str]] = [
    ({**LORA, "rank_pattern": {"q_prjo": 4}}, r"rank_pattern 'q_prjo' matches none of .*mean 'q_proj'\?"),
    (
        {**LORA, "alpha_pattern": {"v_proj": 2, "0.self_attn.v_proj": 4}},
        r"'0.self_attn.v_proj' has no effect",
    ),
    ({**LORA, "rank_pattern": {"k_proj": 4}}, "'k_proj' matches none of 4 adapted layers"),
    ({**LORA, "target_modules": ["q_proj", "v_porj"]}, r"target_modules 'v_porj' is no module .*'v_proj'\?"),
    ({**LORA, "exclude_modules": ["1.self_attn.q_prj"]}, "exclude_modules '1.self_attn.q_prj' is no module"),
    ({**LORA, "layers_to_transform": [0, 7]}, "layers_to_transform 7 is no layer that is adapted"),
    (
        {"peft_type": "LOHA", "target_modules": ["q_proj"], "alpha_pattern": {"q": 3}},
        "alpha_pattern 'q' matches none",
    ),
    (
        {"peft_type": "FOURIERFT", "target_modules": ["q_proj"], "n_frequency_pattern": {"v_proj": 3}},
        "n_frequency_pattern 'v_proj' matches none",
    ),
]


@pytest.mark.parametrize(("given", "said"), IDLE, ids=[said for _, said in IDLE])
def test_names_that_mean_nothing_on_this_base_are_refused(
    base: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    """PEFT itself trains something else than what was meant, with a warning at most."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match=said) as refusal:
        PeftFromFile(options(tmp_path, given)).adapt(model)
    assert "\n" not in str(refusal.value) and "peft.json" in str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [
        {**LORA, "rank_pattern": {"q_proj": 4}, "exclude_modules": ["v_proj"], "layers_to_transform": [1]},
        {**LORA, "target_modules": r".*\.[qv]_proj", "alpha_pattern": {r"layers\.0\..*": 4, ".*": 8}},
        {**LORA, "alpha_pattern": {"0.self_attn.q_proj": 4, "1.self_attn.q_proj": 8, "q_proj": 2}},
        {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
        {"peft_type": "OSF", "target_modules": ["q_proj"], "rank_pattern": {"layers.1": 2}},
    ],
    ids=str,
)
def test_names_that_mean_something_are_taken(base: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    method = PeftFromFile(options(tmp_path, given))
    method.adapt(AutoModelForCausalLM.from_pretrained(base))
    assert method.matrices


def test_an_adapter_is_saved_with_its_patterns_in_their_order(base: Path, tmp_path: Path) -> None:
    """The first match counts, and PEFT alone would write them by the alphabet: with other scales than were trained."""
    given = {**LORA, "alpha_pattern": {"q_proj": 4, ".*": 32}, "init_lora_weights": False}
    method = PeftFromFile(options(tmp_path, given))
    wrapped: Any = method.adapt(AutoModelForCausalLM.from_pretrained(base))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    method.engine = TorchEngine(wrapped, torch.optim.AdamW(trained))  # type: ignore[assignment]
    method.save(tmp_path / "adapter", str(base))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)
    scales = [module.scaling["default"] for module in loaded.modules() if hasattr(module, "lora_A")]
    assert sorted(set(scales)) == [0.5, 4.0]


def test_an_adapter_that_changes_the_base_is_refused_whatever_it_is_called(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a start of a later PEFT may, which no list of ours knows."""
    monkeypatch.setattr(peft_settings, "START_OF_ITS_OWN", {})
    given = {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    with pytest.raises(UserError, match="changes the base's weights before the first step"):
        PeftFromFile(options(tmp_path, given)).adapt(AutoModelForCausalLM.from_pretrained(base))


def test_a_run_goes_on_with_the_settings_that_it_began_with(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    begun = PeftFromFile(options(tmp_path, {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    begun.adapt(model)
    state = json.loads(json.dumps(begun.state_dict()))
    begun.load_state_dict(state, 3)
    with pytest.raises(RunError, match="the checkpoint is of another adapter: r is 8 in it"):
        begun.load_state_dict({**state, "r": 8}, 3)
