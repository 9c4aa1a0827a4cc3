"""A build of the full size: generated rows in the published counts, local and through `datasets` offline."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import Options, build
from data_prep.convert import encode
from data_prep.published.files import CORPUS, PUBLISHED, Published
from data_prep.rows import Row
from data_prep.sources import HubSource, LocalSource
from data_prep.tasks import TASKS

PARTS = {
    "xs": 160,
    "s": 640,
    "m": 2_558,
    "l": 10_234,
    "xl": 40_398,
    "debiased": 9_248,
}  # WinoGrande's published sizes
HIDDEN_ORDER = ("debiased", "xl", "l", "s", "xs", "m")  # late among the 720
# Published corpus bytes per record, less what templates and JSON take, spread over a row's texts.
WORDS = {"hellaswag": 24, "piqa": 16, "social_i_qa": 5, "winogrande": 9}


def rows_of(task: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows of roughly the published lengths, each different."""
    rng = random.Random(f"{task}/{split}")
    words = [f"word{i}" for i in range(1_000)]

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    n = WORDS.get(task, 6)
    for i in range(count):
        match task:
            case "boolq":
                yield {"question": f"{i} {text(n)}", "answer": i % 3 == 0, "passage": text(90)}
            case "piqa":
                yield {"goal": f"{i} {text(5)}", "sol1": text(n), "sol2": text(n), "label": i % 2}
            case "social_i_qa":
                answers = {f"answer{letter}": text(n) for letter in "ABC"}
                yield {"context": f"{i} {text(12)}", "question": text(5), **answers, "label": str(i % 3 + 1)}
            case "hellaswag":
                endings = [text(n) for _ in range(4)]
                yield {"activity_label": str(i), "ctx": text(2 * n), "endings": endings, "label": str(i % 4)}
            case "winogrande":
                yield {
                    "sentence": f"{i} _ {text(n)}",
                    "option1": "a",
                    "option2": "b",
                    "answer": str(i % 2 + 1),
                }
            case _:
                stem = "question_stem" if task == "openbookqa" else "question"
                choices = {"text": [text(2) for _ in range(4)], "label": ["A", "B", "C", "D"]}
                yield {stem: f"{i} {text(12)}", "choices": choices, "answerKey": "ABCD"[i % 4]}


def splits() -> Iterator[tuple[str, str, int]]:
    for task in TASKS.values():
        yield task.name, task.test.file, PUBLISHED[f"{task.name}/test.json"].records
        if task.name == "winogrande":
            yield from ((task.name, f"train_{part}", count) for part, count in PARTS.items())
        else:
            yield task.name, "train", PUBLISHED[f"{task.name}/train.json"].records


def goal() -> dict[str, Published]:
    """Counts, sizes, hashes to be reached, by the plain definition; WinoGrande in a hidden order."""
    texts: dict[str, list[str]] = {}
    for task, split, count in splits():
        texts[f"{task}/{split}"] = [encode(TASKS[task].record(row)) for row in rows_of(task, split, count)]
    files: dict[str, list[str]] = {}
    for task in TASKS.values():
        hidden = [f"train_{part}" for part in HIDDEN_ORDER] if task.name == "winogrande" else ["train"]
        files[f"{task.name}/train.json"] = [
            text for split in hidden for text in texts[f"{task.name}/{split}"]
        ]
        files[f"{task.name}/test.json"] = texts[f"{task.name}/{task.test.file}"]
    files[CORPUS] = [text for task in TASKS for text in files[f"{task}/train.json"]]
    whole = {name: ("[\n" + ",\n".join(records) + "\n]").encode() for name, records in files.items()}
    return {
        n: Published(len(files[n]), len(data), hashlib.sha256(data).hexdigest()) for n, data in whole.items()
    }


class Parquet:
    """`load_dataset` on parquet files made beforehand; can be sent to another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: str, *, name: str | None, revision: str | None, split: str) -> Iterable[Row]:
        import datasets

        if (name or "").startswith("winogrande_"):
            part = (name or "").removeprefix("winogrande_")
            task, file = "winogrande", split if split == "validation" else f"train_{part}"
        else:
            task = next(
                t.name for t in TASKS.values() if any((h.path, h.config) == (path, name) for h in t.hub)
            )
            file = split
        source = {split: str(self.folder / task / f"{file}.parquet")}
        cache = str(self.folder / "cache")
        rows: Iterable[Row] = datasets.load_dataset(
            "parquet", data_files=source, split=split, cache_dir=cache
        )
        return rows


def measured_build(kind: str, folder: Path, out: Path, wanted: dict[str, Published], results: Any) -> None:
    source = HubSource(Parquet(folder)) if kind == "hub" else LocalSource(folder)
    start, start_cpu = time.monotonic(), time.process_time()
    built = build(source, out, Options(), published=wanted)
    seconds = time.monotonic() - start
    cpu_seconds = time.process_time() - start_cpu  # what the wall clock shows where nothing else runs
    status = Path(
        "/proc/self/status"
    ).read_text()  # getrusage would count what the parent had before the exec
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    results.put((built.manifest["files"], seconds, cpu_seconds, peak))


@pytest.mark.full
def test_a_full_size_build_is_exact_quick_and_small(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    raw = tmp_path / "raw"
    for task, split, count in splits():
        path = raw / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows_of(task, split, count))
        cache = str(tmp_path / "json_cache")
        data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        data.to_parquet(str(path.with_suffix(".parquet")))
    wanted = goal()
    assert wanted[CORPUS].records == 170_420
    spawn = multiprocessing.get_context("spawn")  # a fresh process: its peak memory is the build's
    for kind in ("local", "hub"):
        results = spawn.Queue()
        process = spawn.Process(target=measured_build, args=(kind, raw, tmp_path / kind, wanted, results))
        process.start()
        files, seconds, cpu_seconds, peak = results.get(timeout=300)
        process.join()
        size = wanted[CORPUS].bytes
        print(
            f"{kind}: corpus of {size:,} bytes in {seconds:.1f} s ({cpu_seconds:.1f} s of one core), "
            f"peak memory {peak:.2f} GiB"
        )
        assert {entry["verdict"] for entry in files.values()} == {"identical"}
        found = files["winogrande/train.json"]["order"]
        assert found.endswith(", ".join(f"train_{part}" for part in HIDDEN_ORDER))
        assert cpu_seconds < 60 and peak < 1.0
