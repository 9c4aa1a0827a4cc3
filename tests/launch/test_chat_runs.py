"""A user's chats from file to figures: trained on with the command, evaluated with the adapter that comes of it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main as evaluate
from eval.predictions import PredictionFolder
from flexlora_ds.checkpoint.adapter import read_checkpoint_adapter
from flexlora_ds.checkpoint.state import Checkpoint
from flexlora_ds.errors import RunError
from flexlora_ds.export import read_peft_adapter
from launch.options.train_options import TrainOptions
from launch.run_folder.compatibility import Identity
from tests.helpers import eval_tiny, training
from tests.helpers.chat_templates import CHANNELS, DATED, THINKING, make_tokenizer
from tests.helpers.processes import Processes
from tests.helpers.training import Place

SYSTEM = "you know the moon"


def chat(record: Any, answer: str) -> dict[str, Any]:
    turns = [
        ("system", SYSTEM),
        ("user", record["instruction"]),
        ("assistant", f"the correct answer is {answer}"),
    ]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "answer": answer}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A base model with a chat template, chats that all say true, and test chats that half say true."""
    place = Place(tmp_path_factory.mktemp("chats"))
    model = eval_tiny.make_model(seed=4)
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    rng = random.Random(3)
    chats = [chat(eval_tiny.make_record("boolq", rng), "true") for _ in range(40)]
    place.data.write_text("".join(json.dumps(one) + "\n" for one in chats))
    tests = [chat(eval_tiny.make_record("boolq", rng), answer) for answer in ("true", "false") * 3]
    (place.root / "data" / "boolq").mkdir(parents=True)
    (place.root / "data" / "boolq" / "test.json").write_text(json.dumps(tests))
    return place


def results(place: Place, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["--model", str(place.model), "--data", str(place.root / "data"), "--out", str(out)]
    assert evaluate([*arguments, "--tasks", "boolq", *more]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_chats_are_learnt_and_asked(place: Place, one_process: Processes, tmp_path: Path) -> None:
    arguments = place.arguments(
        tmp_path / "run", max_steps=40, lr=2e-2, dropout=0, adjust_size=0, val_every=0
    )
    (done,) = one_process.run(training.command, arguments)
    assert done["code"] == 0, done["stderr"]
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "prompt.json").read_text()) == {"prompt": "chat"}
    assert "prompt: chat" in (tmp_path / "run" / "options.yaml").read_text()
    found = results(place, tmp_path / "eval", "--adapter", str(adapter))
    assert found["settings"]["prompt"] == "chat"
    lines = (tmp_path / "eval" / "predictions" / "boolq.jsonl").read_text().splitlines()
    assert {json.loads(line)["output"] for line in lines} == {"the correct answer is true"}
    assert found["tasks"]["boolq"]["accuracy"] == 0.5


def test_the_base_is_asked_through_the_template_too(place: Place, tmp_path: Path) -> None:
    found = results(place, tmp_path / "eval", "--mode", "score")
    assert found["settings"]["prompt"] == "chat" and found["tasks"]["boolq"]["unanswered"] == 0
    assert found["protocol"] == "score v2", "the prompts of chats changed; those of records are still of v1"


@pytest.mark.parametrize("template", [THINKING, pytest.param(CHANNELS, marks=pytest.mark.full)])
def test_generation_and_scoring_agree_where_a_template_writes_more_than_its_prompt(
    template: str, place: Place, one_process: Processes, tmp_path: Path
) -> None:
    thinking = Place(tmp_path)
    shutil.copytree(place.model, thinking.model)
    make_tokenizer(template, eos_token="<|im_end|>").save_pretrained(thinking.model)
    how = {"data": place.data, "max_steps": 40, "lr": 2e-2, "dropout": 0, "adjust_size": 0, "val_every": 0}
    (done,) = one_process.run(training.command, thinking.arguments(tmp_path / "run", **how))
    assert done["code"] == 0, done["stderr"]
    assert "before an answer: it is part of the prompt" in done["stderr"]
    asked = ["--model", str(thinking.model), "--data", str(place.root / "data"), "--tasks", "boolq"]
    for mode in ("generate", "score"):
        out = tmp_path / mode
        adapter = ["--adapter", str(tmp_path / "run" / "adapter"), "--mode", mode]
        assert evaluate([*asked, "--out", str(out), *adapter]) == 0
        lines = (out / "predictions" / "boolq.jsonl").read_text().splitlines()
        assert {json.loads(line)["output"] for line in lines} == {"the correct answer is true"}


def test_a_run_of_before_dates_were_recorded_goes_on() -> None:
    """Its examples tell whether it began on another day."""
    options = TrainOptions(
        ds="zero2.json", model="base", data="chats.json", out="run", template_date="2024-02-03"
    )
    here = Identity.of(options, None, "examples", 4)
    before = {**here.to_dict(), "options": {k: v for k, v in here.options.items() if k != "template_date"}}
    there = Checkpoint(Path("step_00000002"), {"step": 2, "run": {"identity": before}}, [])
    assert here.compare(there) == []
    with pytest.raises(RunError, match="give the day it began as template_date"):
        replace(here, data="examples of another day").compare(there)
    dated = {**before, "options": {**before["options"], "template_date": "2024-02-04"}}
    there = Checkpoint(Path("step_00000002"), {"step": 2, "run": {"identity": dated}}, [])
    with pytest.raises(RunError, match="template_date is 2024-02-04 in it and 2024-02-03 here"):
        here.compare(there)


def test_a_run_has_one_date_also_on_another_day(place: Place, one_process: Processes, tmp_path: Path) -> None:
    dated = Place(tmp_path)
    shutil.copytree(place.model, dated.model)
    make_tokenizer(DATED, eos_token="<|im_end|>").save_pretrained(dated.model)
    how = {"data": place.data, "adjust_size": 0, "val_every": 0, "save_every": 1, "micro_batch_size": 1}
    begun = dated.arguments(tmp_path / "run", max_steps=1, template_date="2024-02-03", **how)
    continued = dated.arguments(tmp_path / "run", max_steps=2, **how)
    for arguments in (begun, continued):
        (done,) = one_process.run(training.command, arguments)
        assert done["code"] == 0, done["stderr"]
    assert "continuing after step 1" in done["stderr"] and "prompt chat of 2024-02-03" in done["stderr"]
    assert "template_date: '2024-02-03'" in (tmp_path / "run" / "options.yaml").read_text()
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "prompt.json").read_text()) == {"prompt": "chat", "date": "2024-02-03"}
    assert read_peft_adapter(adapter).prompt_date == "2024-02-03"
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert read_checkpoint_adapter(checkpoint).prompt_date == "2024-02-03"
    (refused,) = one_process.run(training.command, [*continued, "--template_date", "2024-02-04"])
    assert refused["code"] == 1 and "template_date is 2024-02-03 in it" in refused["stderr"]
    (refused,) = one_process.run(training.command, [*continued, "--template_date", "tomorrow"])
    assert refused["code"] == 2 and "template_date 'tomorrow' is no date" in refused["stderr"]
    asked = [
        "--model",
        str(dated.model),
        "--data",
        str(place.root / "data"),
        "--tasks",
        "boolq",
        "--limit",
        "1",
    ]
    for out, more, day in (
        ("adapted", ["--adapter", str(adapter)], "2024-02-03"),
        ("base", [], date.today().isoformat()),
    ):
        assert evaluate([*asked, "--out", str(tmp_path / out), *more]) == 0
        assert json.loads((tmp_path / out / "settings.json").read_text())["template_date"] == day
        assert PredictionFolder(tmp_path / out).template_date() == day


def test_without_a_template_both_commands_say_so(
    place: Place, one_process: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Place(tmp_path)
    eval_tiny.make_model(seed=4).save_pretrained(bare.model)
    eval_tiny.make_tokenizer().save_pretrained(bare.model)
    (done,) = one_process.run(training.command, bare.arguments(tmp_path / "run", data=place.data))
    arguments = [
        "--model",
        str(bare.model),
        "--data",
        str(place.root / "data"),
        "--out",
        str(tmp_path / "eval"),
    ]
    capsys.readouterr()  # what saving the model has written
    code = evaluate([*arguments, "--tasks", "boolq"])
    for error, ended in ((done["stderr"], done["code"]), (capsys.readouterr().err, code)):
        assert ended == 2 and error.count("\n") == 1
        assert (
            "the tokenizer has no chat template, which chats need" in error and "; use an instruct" in error
        )
    assert not (tmp_path / "run").exists()
