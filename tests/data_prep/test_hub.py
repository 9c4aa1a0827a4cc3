"""The hub path: with a stand-in for `datasets.load_dataset`, and with `datasets` on local parquet files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_prep.build import Options, build
from data_prep.rows import Row
from data_prep.sources import HubSource, LocalSource
from data_prep.tasks import TASKS
from flexlora_ds.errors import UserError
from tests.helpers.raw_rows import ROWS, winogrande, write_raw


class Rows(list[dict[str, Any]]):
    """A loaded split; `datasets` keeps the download URLs, and with them the commit, in this attribute."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.download_checksums = {f"hf://datasets/some/set@{'ab' * 20}/data/train.parquet": {"num_bytes": 1}}


class GatedRepoError(Exception):
    pass


def hub(
    broken: dict[str, Exception] | None = None, **rows: list[dict[str, Any]]
) -> Callable[..., Iterable[Row]]:
    """`load_dataset` of a hub with every data set of every task, where `broken` ones fail."""

    def load_dataset(path: str, *, name: str | None, revision: str | None, split: str) -> Iterable[Row]:
        fault = (broken or {}).get(path)
        if fault is not None:
            raise fault
        if path in rows:
            return Rows(rows[path])
        for task in TASKS.values():
            for place in task.hub:
                for wanted in (*task.train, task.test):
                    key = (place.path, wanted.config or place.config, place.revision, wanted.split)
                    if key == (path, name, revision, split):
                        part = (name or "").removeprefix("winogrande_")
                        part = "validation" if split == "validation" else part
                        return Rows(winogrande(part) if task.name == "winogrande" else ROWS[task.name])
        raise ValueError(f"BuilderConfig '{name}' not found or unknown split {split!r}")

    return load_dataset


def texts(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.json") if p.name != "manifest.json"
    }


def test_the_hub_gives_the_same_files_as_a_local_folder(tmp_path: Path) -> None:
    built = build(HubSource(hub()), tmp_path / "hub", Options())
    build(LocalSource(write_raw(tmp_path / "raw")), tmp_path / "local", Options())
    assert texts(tmp_path / "hub") == texts(tmp_path / "local")
    (origin,) = built.manifest["files"]["piqa/train.json"]["sources"]
    assert origin == {
        "source": "ybisk/piqa",
        "config": None,
        "split": "train",
        "revision": "refs/convert/parquet",
        "commit": "ab" * 20,
        "rows": 2,
    }
    parts = built.manifest["files"]["winogrande/train.json"]["sources"]
    assert [part["config"] for part in parts] == [
        f"winogrande_{p}" for p in ("xs", "s", "m", "l", "xl", "debiased")
    ]
    assert build(HubSource(hub()), tmp_path / "hub", Options()).unchanged


def test_every_task_has_an_alternative_and_the_one_used_is_recorded(tmp_path: Path) -> None:
    assert all(len(task.hub) >= 2 for task in TASKS.values())
    lines: list[str] = []
    broken = {"ybisk/piqa": RuntimeError("Dataset scripts are no longer supported")}
    built = build(HubSource(hub(broken), lines.append), tmp_path / "data", Options(tasks=("piqa",)))
    assert built.manifest["files"]["piqa/train.json"]["sources"][0]["source"] == "baber/piqa"
    assert [line for line in lines if "train" in line] == [
        "piqa/train: asking the hub for ybisk/piqa@refs/convert/parquet",
        "piqa/train: asking the hub for baber/piqa",
    ]


def test_a_place_with_other_columns_is_passed_over_and_super_glue_is_adapted(tmp_path: Path) -> None:
    glue = [{"question": row["question"], "label": int(row["answer"]), "idx": 0} for row in ROWS["boolq"]]
    load = hub(**{"google/boolq": [{"frage": "?"}], "aps/super_glue": glue})
    build(HubSource(load), tmp_path / "hub", Options(tasks=("boolq",)))
    found = json.loads((tmp_path / "hub/boolq/test.json").read_text())
    assert found == [TASKS["boolq"].record(row) for row in ROWS["boolq"]]


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (ConnectionError("Couldn't reach\nthe Hub"), "check the network"),
        (GatedRepoError("401 Client Error"), "hf auth login"),
    ],
)
def test_where_nothing_works_all_that_was_tried_is_said(
    tmp_path: Path, fault: Exception, advice: str
) -> None:
    broken = {place.path: fault for place in TASKS["piqa"].hub}
    with pytest.raises(UserError) as error:
        build(HubSource(hub(broken)), tmp_path / "data", Options())
    message = str(error.value)
    assert "piqa/train" in message and "ybisk/piqa" in message and "baber/piqa" in message
    assert type(fault).__name__ in message and advice in message and "--source DIR" in message
    assert "\n" not in message and not (tmp_path / "data").exists()


class _Gate(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated data set to somebody who is not logged in."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this data set is restricted.")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("gated", "advice"),
    [
        (True, "log in with `hf auth login`"),
        pytest.param(False, "check the network", marks=pytest.mark.full),  # the libraries try for a minute
    ],
)
def test_what_the_real_libraries_say_is_understood(tmp_path: Path, gated: bool, advice: str) -> None:
    """`datasets` itself, against a hub that wants a login, and against none at all."""
    pytest.importorskip("datasets")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if not gated:
            server.shutdown()
            server.server_close()  # nobody listens there now
        variables = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }
        out = tmp_path / "data"
        command = [sys.executable, "-m", "data_prep", "--tasks", "openbookqa", "--out", str(out)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        if gated:
            server.shutdown()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert errors == done.stderr.splitlines()[-1:] and not out.exists()
    for part in (advice, "openbookqa/train", "allenai/openbookqa@refs/convert/parquet", "--source DIR"):
        assert part in errors[0]


def test_a_wrong_configuration_and_an_empty_split_are_errors(tmp_path: Path) -> None:
    def load_dataset(path: str, **kwargs: Any) -> Iterable[Row]:
        return hub()(path, **{**kwargs, "name": "winogrande_huge"})

    with pytest.raises(UserError, match="BuilderConfig 'winogrande_huge' not found"):
        build(HubSource(load_dataset), tmp_path / "data", Options(tasks=("winogrande",)))
    empty = hub(**{place.path: [] for place in TASKS["piqa"].hub})
    with pytest.raises(UserError, match=r"the split is empty \(ybisk/piqa"):
        build(HubSource(empty), tmp_path / "data", Options(tasks=("piqa",)))
    assert not (tmp_path / "data").exists()


def test_rows_from_parquet_through_datasets(tmp_path: Path) -> None:
    """What `datasets` really yields for these columns (nested choices, lists, integer labels), offline."""
    datasets = pytest.importorskip("datasets")
    for name, rows in ROWS.items():
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    tasks = {place.path: task.name for task in TASKS.values() for place in task.hub}
    tasks_by_config = {"ARC-Easy": "ARC-Easy", "ARC-Challenge": "ARC-Challenge"}

    def load_dataset(path: str, *, name: str | None, revision: str | None, split: str) -> Iterable[Row]:
        file = tmp_path / f"{tasks_by_config.get(name or '', tasks[path])}.parquet"
        rows: Iterable[Row] = datasets.load_dataset(
            "parquet", data_files={split: str(file)}, split=split, cache_dir=str(tmp_path / "cache")
        )
        return rows

    names = tuple(name for name in TASKS if name != "winogrande")
    build(HubSource(load_dataset), tmp_path / "hub", Options(tasks=names))
    build(LocalSource(write_raw(tmp_path / "raw")), tmp_path / "local", Options(tasks=names))
    assert texts(tmp_path / "hub") == texts(tmp_path / "local")
