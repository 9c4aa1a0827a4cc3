"""Every Python example of README and docs runs, as it stands in the text."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import data_prep.tasks
from data_prep.build import Options, build
from data_prep.records import load_records
from data_prep.sources import LocalSource
from eval.items import load_questions
from eval.test_sets import protocol_for
from tests.helpers.markdown import blocks, pages
from tests.helpers.processes import ROOT, Processes
from tests.helpers.raw_rows import write_split

STEPS = 40


def examples(page: str) -> list[str]:
    return [block.text for block in blocks(ROOT / page) if block.language == "python"]


def test_no_example_is_forgotten() -> None:
    found = {str(page.relative_to(ROOT)): len(examples(str(page.relative_to(ROOT)))) for page in pages()}
    assert {page: count for page, count in found.items() if count} == {
        "README.md": 2,
        "docs/data.md": 3,
        "docs/trainer.md": 5,
    }


def run_readme_example(text: str, folder: str) -> dict[str, Any]:
    """Run the text in a process of a launcher, with a tiny model for the hub's, and a batch for each step."""
    import torch
    from peft import PeftModel

    from tests.helpers import tiny

    tiny.start()
    ds_config = tiny.ds_config(2, "bf16")
    ids = torch.randint(1, tiny.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    variables: dict[str, Any] = {
        "ds_config": ds_config,
        "batches": [{"input_ids": ids, "labels": ids}] * STEPS,
    }
    os.chdir(folder)
    with patch(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda name, dtype: tiny.tiny_llama(dtype)
    ):
        exec(text, variables)
    os.chdir(ROOT)
    peft = PeftModel.from_pretrained(tiny.tiny_llama(), Path(folder) / "adapter")
    return {
        "matrices": len(variables["controller"].ranks),
        "changes": variables["controller"].changes,
        "loaded": sum("lora_A" in name for name, _ in peft.named_parameters()),
    }


def test_the_example_of_the_readme_trains_and_saves(tmp_path: Path, one_process: Processes) -> None:
    text, _ = examples("README.md")
    (found,) = one_process.run(run_readme_example, text.replace('"bfloat16"', '"bf16"'), str(tmp_path))
    assert found["matrices"] == found["loaded"] == 6
    assert found["changes"] > 0


def run_trainer_example(text: str, folder: str) -> dict[str, Any]:
    """Run the text as `python` would, with a tiny model for the hub's, and records."""
    import torch
    from peft import PeftModel

    from tests.helpers import tiny
    from tests.helpers.trainer_worker import fresh_accelerate

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask, labels = tiny.collate([row["ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    records = [{"ids": ids} for ids in tiny.records(16)]
    variables: dict[str, Any] = {"dataset": records, "collate": collate}
    os.chdir(folder)
    loads = patch("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny.tiny_llama())
    with loads, fresh_accelerate(launched=False):
        exec(text, variables)
    os.chdir(ROOT)
    peft = PeftModel.from_pretrained(tiny.tiny_llama(), Path(folder) / "out")
    return {
        "changes": len(variables["trainer"].rank_life.changes),
        "loaded": sum("lora_A" in name for name, _ in peft.named_parameters()),
    }


@pytest.mark.parametrize("page", ["README.md", "docs/trainer.md"])
def test_the_examples_of_the_trainer_train_and_save(
    tmp_path: Path, one_process: Processes, page: str
) -> None:
    (text,) = [text for text in examples(page) if "FlexLoRATrainer(" in text]
    quick = f"max_steps={STEPS}, use_cpu=True, report_to='none', remove_unused_columns=False"
    (found,) = one_process.run(run_trainer_example, text.replace("max_steps=500", quick), str(tmp_path))
    assert found["loaded"] == 4 and found["changes"] > 0


def run_torch_example(text: str, folder: str) -> dict[str, Any]:
    """Run the text with a tiny model and a batch for each step."""
    import torch

    from tests.helpers import tiny

    ids = torch.randint(1, tiny.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "labels": ids}] * STEPS
    variables: dict[str, Any] = {"model": tiny.tiny_llama(), "batches": batches}
    os.chdir(folder)
    exec(text, variables)
    os.chdir(ROOT)
    return {"changes": variables["controller"].changes}


def test_the_example_in_plain_torch_trains_and_saves(tmp_path: Path, one_process: Processes) -> None:
    text, _ = in_plain_torch()
    (found,) = one_process.run(run_torch_example, text, str(tmp_path))
    assert found["changes"] > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def in_plain_torch() -> tuple[str, str]:
    """A loop of one's own, and the same with checkpoints."""
    simple, interrupted = [text for text in examples("docs/trainer.md") if "TorchEngine(" in text]
    return simple, interrupted


def run_interrupted_example(imports: str, text: str, folder: str) -> list[Any]:
    """Run the text twice, the first time with a batch that ends it; and once undisturbed. Step, ranks and λ of each."""
    import torch

    from tests.helpers import tiny

    ids = torch.randint(1, tiny.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
    whole = [{"input_ids": ids, "labels": ids}] * STEPS
    found = []
    for name, batches in (("a", [*whole[:25], None, *whole[26:]]), ("a", whole), ("b", whole)):
        (Path(folder) / name).mkdir(exist_ok=True)
        os.chdir(Path(folder) / name)
        variables: dict[str, Any] = {"model": tiny.tiny_llama(), "batches": batches}
        exec(imports, variables)
        with contextlib.suppress(TypeError):  # no batch
            exec(text, variables)
        controller = variables["controller"]
        values = {n: layer.lam.tolist() for n, layer in controller.layers.items()}
        found.append([controller.step, controller.ranks, values])
    os.chdir(ROOT)
    return found


def test_the_example_with_checkpoints_goes_on_where_it_was(tmp_path: Path, one_process: Processes) -> None:
    simple, text = in_plain_torch()
    imports = simple.partition("inject_adapters(model")[0]
    (found,) = one_process.run(run_interrupted_example, imports, text.replace("% 100", "% 10"), str(tmp_path))
    broken_off, resumed, undisturbed = found
    assert broken_off[0] == 25
    assert resumed == undisturbed
    assert resumed[0] == STEPS
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("step_*")) == [
        "step_00000030",
        "step_00000040",
    ]


def test_the_short_examples_of_the_trainers_page_run() -> None:
    """The extension is compiled already; TRL is there or not."""
    with_trl, prepares = [
        text for text in examples("docs/trainer.md") if "Engine(" not in text and "args" not in text
    ]
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        exec(compile(prepares, "docs/trainer.md", "exec", dont_inherit=True), {})
    if find_spec("trl") is not None:
        exec(compile(with_trl, "docs/trainer.md", "exec", dont_inherit=True), {"__name__": "example"})


def test_the_ninth_task_of_the_page_on_data_builds(tmp_path: Path) -> None:
    convert, definition, _ = examples("docs/data.md")
    names = dict(vars(data_prep.tasks))
    exec(convert, names)
    task = eval(definition, names)
    row = {f"distractor{i}": f"wrong {i}" for i in (1, 2, 3)} | {"correct_answer": "right"}
    for split in ("train", "test"):
        rows = [row | {"question": f"question {n}"} for n in range(4)]
        write_split(tmp_path / "raw", task.name, split, rows)
    options = Options(tasks=(task.name,))
    build(LocalSource(tmp_path / "raw"), tmp_path / "data", options, tasks={task.name: task})
    for record in load_records(tmp_path / "data" / task.name / "test.json"):
        answer = task.answers(record).index(record["answer"]) + 1
        assert f"Answer{answer}: right" in record["instruction"]


def test_the_test_of_ones_own_of_the_page_on_data_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = eval(examples("docs/data.md")[2], dict(vars(data_prep.tasks)))
    monkeypatch.setitem(data_prep.tasks.TASKS, task.name, task)
    text = next(b.text for b in blocks(ROOT / "docs/data.md") if b.text.startswith('{"instruction"'))
    (tmp_path / task.name).mkdir()
    (tmp_path / task.name / "test.json").write_text(text)
    (question,) = load_questions(tmp_path, task.name, "alpaca")
    assert (question.answers, question.answer) == (("true", "false"), "true")
    protocol_for("generate", {task.name: [question]}, "alpaca")
