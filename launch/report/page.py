"""The report's page: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from launch.progress import duration
from launch.report.run_data import RunData

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f7f8fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { color: #616e7c; margin: .2rem 0 1.4rem; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 1rem; overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; }
.facts div { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: .7rem .9rem; }
.facts b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.facts span { color: #616e7c; font-size: .85rem; }
.warn { background: #fffbeb; border-color: #f0c36d; } .warn ul { margin: 0; padding-left: 1.2rem; }
img { max-width: 100%; display: block; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #edf0f3; vertical-align: top; }
th { color: #616e7c; font-weight: 600; white-space: nowrap; } td.names, th.names { text-align: left; }
details summary { cursor: pointer; color: #616e7c; } code { font-size: .82rem; }
"""


def page(run: RunData, plots: Mapping[str, bytes]) -> str:
    """Return the page of a run; `plots` are PNG files by title, embedded as they are."""
    sections = [_header(run), _facts(run), _warnings(run.warnings)]
    for title, png in plots.items():
        data = base64.b64encode(png).decode()
        sections.append(_section(title, f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'))
    sections += [_section("Rank changes", _changes(run.changes)), _section("Options", _options(run))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · FlexLoRA</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def _header(run: RunData) -> str:
    state = run.summary.get("state", "still running, or ended without a summary")
    said = [str(run.options[key]) for key in ("method", "model", "data") if run.options.get(key)]
    lead = " · ".join([state, *said])
    return f'<h1>{escape(run.name)}</h1><p class="lead">{escape(lead)}</p>\n'


def _facts(run: RunData) -> str:
    summary, last = run.summary, run.metrics[-1]
    params = summary.get("trainable_params", {})
    tokens = summary.get("tokens")
    facts = {
        "steps": f"{summary.get('steps', last['step']):,}",
        "final training loss": _number(summary.get("final_loss", last["loss"]), ".4f"),
        "final validation loss": _number(run.validation[-1]["loss"] if run.validation else None, ".4f"),
        "wall time": duration(summary["wall_seconds"]) if "wall_seconds" in summary else "–",
        "tokens": _number(tokens, ",d"),
        "tokens per second": _number(summary.get("tokens_per_s", last["tokens_per_s"]), ",.0f"),
        "peak memory (GB)": _number(summary.get("peak_mem_gb", last["peak_mem_gb"]), ".2f"),
        "trainable parameters": _number(params.get("final"), ",d"),
        "the same, mean over steps": _number(params.get("mean"), ",.0f"),
        "rank changes": str(len(run.changes)),
        "total rank": f"{last['total_rank']:,}",
        "steps skipped": str(sum(bool(row["skipped"]) for row in run.metrics)),
    }
    cells = "".join(f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in facts.items())
    return f'<div class="facts">{cells}</div>\n'


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<h2>Warnings</h2><div class="card warn"><ul>{items}</ul></div>\n'


def _changes(changes: list[dict[str, Any]]) -> str:
    if not changes:
        return "<p>No rank was changed.</p>"
    names = [f'<th class="names">{name}</th>' for name in ("pruned", "expanded")]
    numbers = (
        "margin",
        "age of pruned",
        "total rank",
        "parameters",
        "loss before → after",
        "λ error",
        "seconds",
    )
    head = "<th>step</th><th>size</th>" + "".join(names) + "".join(f"<th>{name}</th>" for name in numbers)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_change, changes))}</tbody></table>"


def _change(row: Mapping[str, Any]) -> str:
    losses = f"{_number(row['loss_before'], '.4f')} → {_number(row['loss_after'], '.4f')}"
    ages = ", ".join(str(age) for age in row["prune_age"])
    cells = [
        (f"{row['step']:,}", False),
        (str(row["adjust_size"]), False),
        (_names(row["pruned"]), True),
        (_names(row["expanded"]), True),
        (_number(row["score_margin"], ".2g"), False),
        (escape(ages), False),
        (f"{row['total_rank']:,}", False),
        (f"{row['trainable_params']:,}", False),
        (losses, False),
        (_number(row["spectrum_error"], ".1%"), False),
        (_number(row["seconds"], ".2f"), False),
    ]
    return "<tr>" + "".join(f"<td{_left(left)}>{text}</td>" for text, left in cells) + "</tr>"


def _names(names: Iterable[str]) -> str:
    counts = Counter(names)
    if not counts:
        return "–"
    return "<br>".join(f"<code>{escape(n)}</code>{f' × {c}' if c > 1 else ''}" for n, c in counts.items())


def _options(run: RunData) -> str:
    versions = {f"{name} (version)": value for name, value in run.summary.get("versions", {}).items()}
    rows = "".join(
        f'<tr><td class="names">{escape(str(key))}</td><td class="names">{escape(str(value))}</td></tr>'
        for key, value in {**run.options, **versions}.items()
    )
    return f"<details><summary>every option and version</summary><table>{rows}</table></details>"


def _section(title: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><div class="card">{body}</div>\n'


def _left(left: bool) -> str:
    return ' class="names"' if left else ""


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
