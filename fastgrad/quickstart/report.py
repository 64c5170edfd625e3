"""What came out: table, closing sentences, JSON, Markdown. All of it computed from the results."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from fastgrad.quickstart.settings import cores

MB = 1e6


@dataclass(frozen=True)
class Row:
    """One arm's numbers. Losses are nats per token on the test parts."""

    key: str
    label: str
    kind: str
    group: str
    rate: float
    edge: bool
    before: float
    loss: float
    gain_share: float
    forgetting: float
    n_trained: int
    trained_share: float
    state_bytes: int
    gradient_bytes: int
    peak: int
    above: int | None
    seconds: float
    cpu_seconds: float
    test_rows: tuple[float, ...]


def rows(results: Sequence[dict[str, Any]], before: dict[str, float], total: int) -> list[Row]:
    """One row per arm, in the order of the results; the first must be full tuning."""
    full_gain = before["prose_test"] - results[0]["test"]
    found = []
    for result in results:
        rates = [t["rate"] for t in result["tried"]]
        found.append(
            Row(
                key=result["key"],
                label=result["label"],
                kind=result["kind"],
                group="random submodules" if result["key"].startswith("random") else
                result["label"],
                rate=result["rate"],
                edge=len(rates) > 2 and result["rate"] in (min(rates), max(rates)),
                before=before["prose_test"],
                loss=result["test"],
                gain_share=(before["prose_test"] - result["test"]) / full_gain
                if full_gain > 0 else math.nan,
                forgetting=result["code"] - before["code_test"],
                n_trained=result["n_trained"],
                trained_share=result["n_trained"] / total,
                state_bytes=result["state_bytes"],
                gradient_bytes=result["gradient_bytes"],
                peak=result["peak"],
                above=None if result["baseline"] is None else result["peak"] - result["baseline"],
                seconds=result["seconds"],
                cpu_seconds=result["cpu_seconds"],
                test_rows=tuple(result["test_rows"]),
            )
        )  # fmt: skip
    return found


# -- the table ---------------------------------------------------------------------------

HEADINGS = (
    "arm", "test loss", "gain kept", "forgetting", "trained", "optimizer MB", "gradient MB",
    "peak MB", "above model MB", "seconds", "CPU seconds", "rate",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, in the order of :data:`HEADINGS`."""
    return [
        row.label,
        f"{row.loss:.3f}",
        f"{row.gain_share:.0%}" if math.isfinite(row.gain_share) else "-",
        f"{row.forgetting:+.3f}",
        f"{row.trained_share:.1%}",
        f"{row.state_bytes / MB:.1f}",
        f"{row.gradient_bytes / MB:.1f}",
        f"{row.peak / MB:.0f}",
        "-" if row.above is None else f"{row.above / MB:.0f}",
        f"{row.seconds:.1f}",
        f"{row.cpu_seconds:.1f}",
        f"{row.rate:g}" + ("*" if row.edge else ""),
    ]


def legend(table: Sequence[Row], at_a_time: int = 1) -> str:
    """What the columns mean, and what holds for all arms."""
    text = (
        f"Test loss: nats per token on held-out prose, {table[0].before:.3f} before adaptation. "
        "Gain kept: share of full tuning's gain. Forgetting: change of the test loss on the "
        "first domain. Optimizer and gradient: bytes of all state and gradient tensors. Peak: "
        "resident memory of the arm's own process; above model: that peak less the memory held "
        "once the model was loaded. Seconds and CPU seconds: all training steps at the chosen "
        "rate, by the clock and in processor time. Rate: the best on the validation part"
    )
    if any(row.edge for row in table):
        text += "; * marks a rate at the edge of those tried, so a better one may lie outside"
    text += "."
    if at_a_time > 1:
        text += (
            f" {at_a_time} arms ran at a time on one thread each: compare CPU seconds rather than "
            "seconds."
        )
    return text


# -- the closing sentences ---------------------------------------------------------------


def difference(a: Row, b: Row) -> tuple[float, float]:
    """Mean of ``a`` less ``b`` over test rows, and its standard error (paired by row)."""
    pairs = [x - y for x, y in zip(a.test_rows, b.test_rows, strict=True)]
    mean = fmean(pairs)
    if len(pairs) < 2:
        return mean, math.inf
    variance = math.fsum((d - mean) ** 2 for d in pairs) / (len(pairs) - 1)
    return mean, math.sqrt(variance / len(pairs))


def verdict(table: Sequence[Row]) -> str:
    """What the numbers say about the blueprint, whatever it is."""
    by_key = {row.key: row for row in table}
    full, blueprint = by_key["full"], by_key["blueprint"]
    if not math.isfinite(full.gain_share):
        return (
            f"Full tuning did not lower the test loss ({full.before:.3f} before, {full.loss:.3f} "
            "after), so this run says nothing about the others."
        )
    sentences = [
        f"With {blueprint.trained_share:.0%} of the weights, chosen by the blueprint as whole "
        f"submodules, {blueprint.gain_share:.0%} of full tuning's gain was kept "
        f"(loss {blueprint.before:.2f} to {blueprint.loss:.2f}; full: {full.loss:.2f})."
    ]
    outcomes: dict[str, list[str]] = {"better than": [], "worse than": [], "level with": []}
    for row in table:
        if row.key in ("full", "blueprint"):
            continue
        mean, error = difference(blueprint, row)
        outcome = "level with" if abs(mean) <= 2 * error else (
            "better than" if mean < 0 else "worse than"
        )  # fmt: skip
        outcomes[outcome].append(f"{row.label} ({row.gain_share:.0%})")
    said = [f"{how} {_list(arms)}" for how, arms in outcomes.items() if arms]
    if said:
        sentences.append(f"It was {'; '.join(said)}.")
    sparse = [row for row in table if row.key != "full"]
    best = min(sparse, key=lambda row: row.loss)
    sentences.append(
        f"Of the arms that train a part, {best.label} reached the lowest loss ({best.loss:.2f}); "
        f"{min(table, key=lambda row: row.forgetting).label} forgot least."
    )
    spared = full.state_bytes + full.gradient_bytes
    used = blueprint.state_bytes + blueprint.gradient_bytes
    sentences.append(
        f"Gradients and optimizer state took {used / MB:.1f} MB instead of {spared / MB:.1f} MB, "
        f"training {blueprint.cpu_seconds:.1f} s of processor time instead of "
        f"{full.cpu_seconds:.1f} s."
    )
    sentences.append(
        "Better and worse mean a difference of more than two standard errors over the "
        f"{len(full.test_rows)} test rows; this is one training seed."
    )
    return " ".join(sentences)


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# -- where it ran ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found = {}
    for package in ("fastgrad", "torch", "transformers", "peft", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            from fastgrad import __version__

            found[package] = __version__ if package == "fastgrad" else "unknown"
    return found


def origin(record: dict[str, Any]) -> str:
    """One line: machine, versions, date."""
    at, with_ = record["machine"], record["versions"]
    return (
        f"{record['created'][:10]}, {at['cpu']}, {at['cores']} cores, "
        f"{record['arms_at_a_time']} arms at a time on {record['threads_per_process']} thread "
        f"each; torch {with_['torch']}, transformers "
        f"{with_['transformers']}, Python {at['python']}; seed {record['seed']}, "
        f"{record['settings']['name']} run, {record['seconds']['total']:.0f} s in all."
    )


def markdown(record: dict[str, Any], table: Sequence[Row], figure: str) -> str:
    """The table, its legend and the verdict, for a README."""
    lines = [
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "|".join([":--", *["--:"] * (len(HEADINGS) - 1)]) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in table),
        "",
        legend(table, record["arms_at_a_time"]),
        "",
        verdict(table),
        "",
        f"Delta checkpoint: {record['delta_bytes'] / MB:.2f} MB; full checkpoint: "
        f"{record['checkpoint_bytes'] / MB:.2f} MB.",
        "",
        f"![Concentration, influence by layer, and loss against resources]({figure})",
        "",
        origin(record),
        "",
    ]
    return "\n".join(lines)
