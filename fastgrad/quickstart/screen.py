"""What the user sees in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastgrad.quickstart import report
from fastgrad.quickstart.report import MB, Row

if TYPE_CHECKING:
    from fastgrad import Blueprint, GradientStats, Selection
    from fastgrad.integrations.transformers import Measurement as Measured
    from fastgrad.quickstart.corpus import Data
    from fastgrad.staleness import Staleness

_WIDE = 110  # columns that the result needs as one table
_SHOWN = 6  # submodules listed


def console(to_stderr: bool = False) -> Console:
    """A console for people; wide enough for the table where output goes to a file."""
    stream = sys.stderr if to_stderr else sys.stdout
    if stream.isatty() or "COLUMNS" in os.environ:
        return Console(highlight=False, stderr=to_stderr)
    return Console(highlight=False, width=_WIDE, stderr=to_stderr)


def heading(out: Console, title: str) -> None:
    out.print()
    out.rule(f"[bold]{title}", align="left", style="dim")


def bar(out: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<26}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=out,
    )


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, text in enumerate(headings):
        table.add_column(text, justify="left" if i == 0 else "right")
    return table


def _show(out: Console, table: Table) -> None:
    out.print(Padding(table, (0, 0, 0, 2)))


def _say(out: Console, text: str) -> None:
    """A paragraph, indented as the tables are."""
    out.print(Padding(text, (0, 2)))


def splits(out: Console, data: Data) -> None:
    table = _table("split before anything is learnt", "documents", "rows used", "tokens")
    for name, rows in data.rows.items():
        domain, part = name.split("_")
        text = {"code": "Python source", "prose": "English prose"}[domain]
        table.add_row(f"{text}, {part}", f"{data.n_documents[name]}", f"{len(rows):,}",
                      f"{rows.numel():,}")  # fmt: skip
    _show(out, table)


def measurements(out: Console, found: Sequence[Measured]) -> None:
    table = _table("callback, held-out source", "step", "loss", "gradient norm",
                   "largest per weight (rms)")  # fmt: skip
    for m in found:
        rms = m.stats.grad_norm / m.stats.numel**0.5
        table.add_row(
            f"{m.fraction:.0%} of training", f"{m.step}", f"{m.loss:.3f}",
            f"{float((m.stats.grad_norm**2).sum()) ** 0.5:.3f}", m.stats.names[int(rms.argmax())],
        )  # fmt: skip
    _show(out, table)


def probed(
    out: Console,
    released: Blueprint,
    mixed: Blueprint,
    staleness: Staleness,
    local: GradientStats,
    choices: Mapping[str, Selection],
    seconds: float,
) -> dict[str, Any]:
    """Print what the local sample says beside the blueprint; returns it for the record."""
    blend = mixed.file.blend
    weight = float(blend.blend_weight) if blend is not None else 0.0
    _say(out, f"Local sample: {local.n_examples} rows in {local.n_batches} batches, "
         f"{seconds:.1f} s.")  # fmt: skip
    _say(out, f"The blueprint against it: {staleness.verdict}; {staleness.reason}")
    _say(out, f"Blend: {weight:.0%} blueprint, {1 - weight:.0%} local sample.")
    blend_names = choices["blend"].names
    table = _table("20 % by", "weights", "submodules", "shared with the blend")
    for name, selection in choices.items():
        shared = _overlap(selection, choices["blend"])
        table.add_row(name, f"{selection.n_parameters:,}", f"{len(selection.names)}",
                      f"{shared:.0%} of the weights")  # fmt: skip
    _show(out, table)
    largest = sorted(blend_names, key=choices["blend"].n_selected, reverse=True)
    more = len(largest) - _SHOWN
    _say(out, "Largest chosen: " + ", ".join(_brief(n) for n in largest[:_SHOWN])
         + (f" and {more} more" if more > 0 else ""))  # fmt: skip
    return {
        "seconds": seconds,
        "blend_weight": weight,
        "staleness": staleness.to_dict(),
        "coverage": {
            status: sum(c.status == status for c in local.coverage_list)
            for status in ("exact", "unused", "frozen", "missing")
        },
        "noise_scale_examples": released.noise.noise_scale,
        "selections": {
            name: {"n_parameters": s.n_parameters, "submodules": s.names,
                   "shared_with_blend": _overlap(s, choices["blend"])}
            for name, s in choices.items()
        },
    }  # fmt: skip


def _overlap(a: Selection, b: Selection) -> float:
    """Share of ``b``'s weights that ``a`` selects too; both of whole submodules."""
    common = sum(b.n_selected(name) for name in b.names if name in a.blocks)
    return common / b.n_parameters


def _brief(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def result(out: Console, record: Mapping[str, Any], table: Sequence[Row]) -> None:
    """The table of all arms, in pieces where the terminal is narrow, and the verdict."""
    for piece in _pieces(out, table):
        _show(out, piece)
    out.print(Padding(report.legend(table, record["arms_at_a_time"]), (0, 2)), style="dim")
    out.print()
    _say(out, report.verdict(table))
    restores = (
        "base model plus delta is the adapted model bit for bit"
        if record["delta_restores"] else "[bold red]it does not restore the adapted model[/]"
    )  # fmt: skip
    share = record["delta_bytes"] / record["checkpoint_bytes"]
    out.print()
    _say(
        out,
        f"Delta checkpoint of the blueprint arm: {record['delta_bytes'] / MB:.2f} MB, "
        f"{share:.0%} of the full checkpoint's {record['checkpoint_bytes'] / MB:.2f} MB; "
        f"{restores}.",
    )
    out.print()


def _pieces(out: Console, table: Sequence[Row]) -> list[Table]:
    """The arms in as few tables as show every number whole."""
    unlimited = out.options.update(max_width=10_000)  # else it measures what it would cut
    columns = list(range(1, len(report.HEADINGS)))
    pieces: list[Table] = []
    for count in range(1, len(columns) + 1):
        size = -(-len(columns) // count)
        pieces = [
            _arms_table(table, columns[i : i + size]) for i in range(0, len(columns), size)
        ]
        if all(Measurement.get(out, unlimited, p).maximum <= out.width - 2 for p in pieces):
            break
    return pieces


def _arms_table(table: Sequence[Row], columns: Sequence[int]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for i in (0, *columns):
        title = report.HEADINGS[i].replace(" ", "\n")
        shown.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in table:
        text = report.cells(row)
        style = "bold" if row.key.startswith("blueprint") else None
        shown.add_row(*(text[i] for i in (0, *columns)), style=style)
    return shown


def files(out: Console, folder: Path, entries: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for what, name in entries.items():
        table.add_row(f"  {what}", str(folder / name))
    out.print(table)
