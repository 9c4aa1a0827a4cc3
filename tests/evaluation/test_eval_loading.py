"""What an evaluation loads: an adapter's safetensors alone, and never an adapter that lies beside the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eval.__main__ import main
from eval.model.loading import attach_adapter
from flexlora_ds.errors import UserError
from tests.helpers import eval_tiny
from tests.helpers.shell import run_in_shell


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, an adapter of its (`adapter/`), and `data/`."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("loading")
    eval_tiny.make_model(seed=4).save_pretrained(place / "model")
    eval_tiny.make_tokenizer().save_pretrained(place / "model")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(eval_tiny.make_model(seed=4), config).save_pretrained(place / "adapter")
    eval_tiny.write_data(place / "data", 2)
    return place


def test_an_adapter_beside_the_model_ends_an_evaluation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "adapter" / "adapter_config.json", model)
    shutil.copy(place / "adapter" / "adapter_model.safetensors", model)
    words = ["--model", f"{model}", "--data", f"{place}/data", "--out", f"{tmp_path}/out"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds an adapter beside the model" in error and "--adapter" in error
    assert not (tmp_path / "out").exists()


def test_an_evaluation_warns_of_keys_without_effect(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"k_proj": 64}}))
    words = ["--model", f"{place}/model", "--adapter", f"{adapter}", "--data", f"{place}/data"]
    assert main([*words, "--out", f"{tmp_path}/out", "--tasks", "boolq", "--limit", "1"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: alpha")]
    assert len(warned) == 1 and "'k_proj' matches none of 4 adapted layers" in warned[0]


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 10**12}, {"num_hidden_layers": 100_000}, {"vocab_size": -3}]
)
def test_absurd_sizes_end_an_evaluation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int]
) -> None:
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | changes))
    assert main(["--model", f"{model}", "--data", f"{place}/data", "--out", f"{tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(model) in error and "fetch the model again" in error


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.complaint("lm-evaluation-harness 2294", "lm-evaluation-harness 2432")
def test_an_evaluation_says_whether_the_adapter_changes_anything(
    trained: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = place / "adapter"
    if not trained:  # PEFT's own beginning, whose B is zero
        adapter = tmp_path / "adapter"
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        get_peft_model(eval_tiny.make_model(seed=4), config).save_pretrained(adapter)
    words = ["--model", f"{place}/model", "--data", f"{place}/data", "--out", f"{tmp_path}/out"]
    assert main([*words, "--adapter", f"{adapter}", "--tasks", "boolq", "--mode", "score"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "probe logits" in line]
    if trained:
        assert said == ["the adapter changes the answers: 8 of 8 probe logits differ"]
    else:
        (line,) = said
        assert line.startswith("warning: the adapter changes no answer: 0 of 8 probe logits differ")


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(place: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / 'it\'s $(touch ran) "mine"'))
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        attach_adapter(eval_tiny.make_model(seed=4), str(adapter))
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickled weights.*adapter_model\.bin") as caught:
        attach_adapter(eval_tiny.make_model(seed=4), str(adapter))
    run_in_shell(str(caught.value).partition("convert them once: ")[2], tmp_path)
    ids = torch.tensor([[2, 5, 9]])
    found, expected = (
        attach_adapter(eval_tiny.make_model(seed=4), str(folder)) for folder in (adapter, place / "adapter")
    )
    assert torch.equal(found(ids).logits, expected(ids).logits)
