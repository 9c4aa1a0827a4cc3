"""`--backend vllm` against a stand-in for vLLM that answers with transformers: what is asked, what comes of it."""

from __future__ import annotations

import json
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.__main__ import main
from flexlora_ds.peft_reading.plain import read_peft_adapter
from tests.helpers import eval_tiny


class StandIn:
    """vLLM's `LLM`: continues token ids greedily, ends after the first of the `stop` strings."""

    made: dict[str, Any]
    asked: list[Any]

    def __init__(self, **arguments: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        type(self).made, type(self).asked = arguments, []
        self.model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
        config = types.SimpleNamespace(dtype=torch.float32, max_model_len=512)
        self.llm_engine = types.SimpleNamespace(model_config=config)

    def generate(self, prompts: Any, params: Any, lora_request: Any, use_tqdm: bool) -> Any:
        from peft import PeftModel

        model = self.model
        if lora_request is not None:
            type(self).asked.append(read_peft_adapter(Path(lora_request.path)))
            model = PeftModel.from_pretrained(model, lora_request.path)
        texts = [
            self._continue(model, p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)
        ]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]

    def _continue(self, model: Any, prompt: list[int], params: Any) -> str:
        assert params.temperature == 0 and params.include_stop_str_in_output
        ids = torch.tensor([prompt])
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_tokens,
            do_sample=False,
        )
        text: str = self.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
        ends = [text.find(stop) + len(stop) for stop in params.stop if stop in text]
        return text[: min(ends)] if ends else text


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    module, lora, request = (types.ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.__spec__ = ModuleSpec("vllm", None)
    vars(module).update(LLM=StandIn, SamplingParams=types.SimpleNamespace, __version__="stand-in")
    vars(request).update(LoRARequest=lambda name, number, path: types.SimpleNamespace(path=path))
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return StandIn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers, an adapter with two ranks, data of two tasks."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("vllm")
    tokenizer, model = eval_tiny.make_tokenizer(), eval_tiny.make_model(seed=4)
    questions = [q for t in ("boolq", "ARC-Easy") for q in eval_tiny.make_questions(t, 12)]
    eval_tiny.teach(model, tokenizer, questions, steps=30)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, rank_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(place / "adapter")
    eval_tiny.write_data(place / "data", 6, ("boolq", "ARC-Easy"))
    return place


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    common = ["--model", f"{place}/model", "--data", f"{place}/data", "--tasks", "boolq,ARC-Easy"]
    return [*common, "--out", f"{out}", *more]


def answers(out: Path) -> list[tuple[str, str | None]]:
    lines = [
        json.loads(text)
        for task in ("boolq", "ARC-Easy")
        for text in (out / "predictions" / f"{task}.jsonl").read_text().splitlines()
    ]
    return [(line["output"].strip(), line["prediction"]) for line in lines]


@pytest.mark.parametrize(
    ("adapted", "version", "ranks"),
    [(False, "0.32.1", set()), (True, "0.32.1", {5}), (True, "0.33.0rc1", {2, 5}), (True, "1.0", {2, 5})],
)
def test_the_same_predictions(
    place: Path, tmp_path: Path, vllm: type[StandIn], adapted: bool, version: str, ranks: set[int]
) -> None:
    """One rank for all matrices where that vLLM knows one only, else the adapter's own folder."""
    vars(sys.modules["vllm"])["__version__"] = version
    adapter = ["--adapter", f"{place}/adapter"] if adapted else []
    assert main(arguments(place, tmp_path / "a", *adapter)) == 0
    assert main(arguments(place, tmp_path / "b", *adapter, "--backend", "vllm")) == 0
    assert [p for _, p in answers(tmp_path / "b")] == [p for _, p in answers(tmp_path / "a")]
    assert any(prediction for _, prediction in answers(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["backend"] == f"vllm {version}"
    if adapted:
        assert vllm.made["enable_lora"] and vllm.made["max_lora_rank"] == 8
        assert {m.rank for served in vllm.asked for m in served.matrices.values()} == ranks


def test_an_adapter_that_is_not_finite_is_not_served(
    place: Path, tmp_path: Path, vllm: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM would read it itself, and answer."""
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("inf")
    save_file(tensors, path)
    vars(sys.modules["vllm"])["__version__"] = "0.33.0"
    given = ["--adapter", f"{tmp_path}/adapter", "--backend", "vllm"]
    assert main(arguments(place, tmp_path / "out", *given)) == 1
    assert "holds numbers that are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("**/results.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "vLLM is not installed (--backend vllm); pip install vllm"),
        (["--mode", "score"], "--backend vllm serves --mode generate, not score"),
        (["--merge", "--adapter", "x"], "--backend vllm does not take --merge"),
        (["--adapter", "some/hub-id"], "--backend vllm needs a local one"),
        (["--model", "a.gguf"], "--backend vllm does not take a .gguf file"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    options: list[str], words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "out", "--backend", "vllm", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
