"""Every Python example of README and docs runs, as it stands in the text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import data_prep.tasks
from data_prep.build import Options, build
from data_prep.records import load_records
from data_prep.sources import LocalSource
from tests.helpers.markdown import blocks, pages
from tests.helpers.processes import ROOT, Processes
from tests.helpers.raw_rows import write_split

STEPS = 40


def examples(page: str) -> list[str]:
    return [block.text for block in blocks(ROOT / page) if block.language == "python"]


def test_no_example_is_forgotten() -> None:
    found = {str(page.relative_to(ROOT)): len(examples(str(page.relative_to(ROOT)))) for page in pages()}
    assert {page: count for page, count in found.items() if count} == {"README.md": 1, "docs/data.md": 2}


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
    (text,) = examples("README.md")
    (found,) = one_process.run(run_readme_example, text.replace('"bfloat16"', '"bf16"'), str(tmp_path))
    assert found["matrices"] == found["loaded"] == 6
    assert found["changes"] > 0


def test_the_ninth_task_of_the_page_on_data_builds(tmp_path: Path) -> None:
    convert, definition = examples("docs/data.md")
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
