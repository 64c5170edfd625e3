"""What came out of all runs: summary rows, table, Markdown and figure, computed from results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean, stdev
from typing import Any

from arms_setup import CONTROL, FULL, OURS, PEER
from arms_verdict import LEVEL, Difference, Verdict, difference, memory_word
from fastgrad.plots import BLACK, BLUE, VERMILION, ArmPoint, pareto_front
from fastgrad.quickstart.report import MB, versions

ROLES = {FULL: "all weights", OURS: "fastgrad", CONTROL: "control", PEER: "peer"}
COLOURS = {FULL: BLACK, OURS: BLUE, CONTROL: "#767676", PEER: VERMILION}
MARKERS = {FULL: "*", OURS: "o", CONTROL: "s", PEER: "D"}
TERMS = ("gradient_bytes", "state_bytes", "copy_bytes")


@dataclass(frozen=True)
class Summary:
    """One arm over all seeds. Losses are nats per token; ``sd`` is over seeds, None for one."""

    key: str
    label: str
    role: str
    valid: float
    loss: float
    loss_sd: float | None
    gain_share: float
    gain_sd: float | None
    forgetting: float
    forgetting_sd: float | None
    gradient_bytes: float
    state_bytes: float
    copy_bytes: float
    above: float | None
    cpu_seconds: float
    flops_per_step: float
    trained_share: float
    rates: tuple[float, ...]
    edge: bool
    note: str

    @property
    def memory(self) -> float:
        """Bytes that training adds to the weights, activations apart."""
        return self.gradient_bytes + self.state_bytes + self.copy_bytes


def sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def summarise(
    results: Mapping[str, Sequence[dict[str, Any]]],
    roles: Mapping[str, str],
    before: Mapping[str, float],
    total: int,
) -> list[Summary]:
    """One row per arm from its results by seed; "full" must be among them, with the same seeds."""
    full = [before["prose_test"] - r["test"] for r in results["full"]]
    rows = []
    for key, runs in results.items():
        if len(runs) != len(full):
            raise ValueError(f"{key} has {len(runs)} seeds, full tuning has {len(full)}")
        shares = [
            (before["prose_test"] - r["test"]) / gain if gain > 0 else math.nan
            for r, gain in zip(runs, full, strict=True)
        ]
        losses = [r["test"] for r in runs]
        forgotten = [r["code"] - before["code_test"] for r in runs]
        above = [None if r["baseline"] is None else r["peak"] - r["baseline"] for r in runs]
        rows.append(
            Summary(
                key, runs[0]["label"], roles[key], fmean(r["valid"] for r in runs),
                fmean(losses), sd(losses), fmean(shares), sd(shares),
                fmean(forgotten), sd(forgotten),
                *(fmean(r[term] for r in runs) for term in TERMS),
                None if None in above else fmean(above),  # type: ignore[arg-type]
                fmean(r["cpu_seconds"] for r in runs),
                fmean(r["flops_per_step"] for r in runs),
                fmean(r["n_trained"] for r in runs) / total,
                tuple(r["rate"] for r in runs), any(map(at_edge, runs)), runs[0]["note"],
            )
        )  # fmt: skip
    return rows


def at_edge(result: Mapping[str, Any]) -> bool:
    """The chosen rate is the lowest or highest of more than two."""
    tried = [t["rate"] for t in result["tried"]]
    return len(tried) > 2 and result["rate"] in (min(tried), max(tried))


def best_of_ours(rows: Sequence[Summary]) -> Summary:
    """The arm of ours with the lowest *validation* loss: the test rows then judge it fairly."""
    return min((r for r in rows if r.role == OURS), key=lambda r: r.valid)


def judge(
    rows: Sequence[Summary], results: Mapping[str, Sequence[dict[str, Any]]]
) -> list[Verdict]:
    """Every other arm against the best of ours."""
    best = best_of_ours(rows)
    own = [r["test_rows"] for r in results[best.key]]
    return [
        Verdict(
            row.key, row.label, row.role, best.label,
            difference([r["test_rows"] for r in results[row.key]], own),
            memory_word(row.memory, best.memory), row.memory / best.memory,
        )
        for row in rows if row.key != best.key
    ]  # fmt: skip


def from_record(record: Mapping[str, Any]) -> tuple[list[Summary], list[Verdict]]:
    """What results.json holds of all runs."""

    def of(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {f.name: entry[f.name] for f in fields(kind)}

    rows = [Summary(**of(Summary, r) | {"rates": tuple(r["rates"])}) for r in record["summary"]]
    verdicts = [
        Verdict(**of(Verdict, v) | {"found": Difference(**of(Difference, v["found"]))})
        for v in record["verdicts"]
    ]
    return rows, verdicts


# -- tables ------------------------------------------------------------------------------

HEADINGS = (
    "arm", "test loss", "gain kept", "forgetting", "gradient MB", "optimizer MB", "copies MB",
    "sum MB", "peak MB", "CPU s", "GFLOP/step", "trained", "rate", "against best",
)  # fmt: skip


def cells(row: Summary, verdict: Verdict | None) -> list[str]:
    """A row as text, in the order of :data:`HEADINGS`."""
    rates = sorted(set(row.rates))
    span = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g}-{rates[-1]:g}"
    if verdict is None:
        word = "the best"
    else:
        word = f"{verdict.found.word}, {verdict.memory} memory"
    return [
        row.label,
        _spread(row.loss, row.loss_sd, ".3f"),
        _spread(row.gain_share, row.gain_sd, ".0%") if math.isfinite(row.gain_share) else "-",
        _spread(row.forgetting, row.forgetting_sd, "+.2f", ".2f"),
        f"{row.gradient_bytes / MB:.2f}",
        f"{row.state_bytes / MB:.2f}",
        f"{row.copy_bytes / MB:.2f}",
        f"{row.memory / MB:.2f}",
        "-" if row.above is None else f"{row.above / MB:.0f}",
        f"{row.cpu_seconds:.1f}",
        f"{row.flops_per_step / 1e9:.2f}",
        f"{row.trained_share:.0%}",
        span + ("*" if row.edge else ""),
        word,
    ]


def _spread(value: float, deviation: float | None, form: str, small: str | None = None) -> str:
    text = format(value, form)
    return text if deviation is None else f"{text} ±{format(deviation, small or form)}"


def legend(record: Mapping[str, Any], rows: Sequence[Summary]) -> str:
    """What the columns mean, and what holds for all arms."""
    seeds = len(record["seeds"])
    text = (
        f"Test loss: nats per token on {record['test_rows']} held-out rows of prose, "
        f"{record['loss_before']['prose_test']:.3f} before adaptation; mean"
        f"{' ± standard deviation' if seeds > 1 else ''} over {seeds} training seed"
        f"{'s' if seeds > 1 else ''} (data order and draws; the pretrained model is one). Gain "
        "kept: share of full tuning's gain with the same seed. Forgetting: change of the test loss "
        "on the first domain. Gradient, optimizer, copies: bytes of these tensors at the step that "
        "holds most; copies are what is trained beside the model's own weights (packed blocks, "
        "adapters, master copies). Peak: resident memory of the arm's process above that with the "
        "model loaded, activations and re-selection included. CPU s: processor time of training "
        "at the chosen rate. GFLOP/step: matrix products and attention, forward and backward "
        "(PyTorch's counter; SVD and arithmetic by element are not in it). Trained: weights that "
        "change at any time. Rate: lowest and highest over the seeds, each the best of "
        f"{record['rates_tried']} on the validation part, as many as every arm tries"
    )
    if any(row.edge for row in rows):
        text += "; * marks one at the edge of those tried, so a better one may lie outside"
    text += (
        f". Against best: compared with {best_of_ours(rows).label}, which of ours has the lowest "
        f"validation loss; better and worse where the {LEVEL:.0%} interval of the difference, "
        "paired over test rows and seeds, leaves out zero; memory is the sum, equal within 5 %."
    )
    return text


def markdown(
    record: Mapping[str, Any], rows: Sequence[Summary], verdicts: Sequence[Verdict], figure: str
) -> str:
    """Table, legend, verdicts and origin, for the documentation."""
    by_key = {v.key: v for v in verdicts}
    at, used = record["machine"], record["versions"]
    lines = [
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "|".join([":--", *["--:"] * (len(HEADINGS) - 2), ":--"]) + "|",
        *("| " + " | ".join(cells(row, by_key.get(row.key))) + " |" for row in rows),
        "",
        *(f"- {a['label']} did not run: {a['why']}" for a in record["absent"]),
        *([""] if record["absent"] else []),
        legend(record, rows),
        "",
        f"**Aim (at equal or less memory no peer has a better held-out loss): {record['aim']}.**",
        "",
        *(f"- {v.sentence()}" for v in verdicts),
        "",
        "Settings of the arms:",
        "",
        *(f"- {row.label}: {row.note}" for row in rows),
        "",
        f"![Held-out loss against memory, and paired differences]({figure})",
        "",
        f"{record['created'][:10]}, {at['cpu']}, {at['cores']} cores, {record['at_a_time']} arms "
        f"at a time on {record['threads_per_process']} thread each; torch {used['torch']}, "
        f"transformers {used['transformers']}, Python {at['python']}; commit "
        f"{', '.join(c[:12] for c in record['commits'])}; "
        f"{record['settings']['name']} run, {record['seconds']['total']:.0f} s in all.",
        "",
    ]
    return "\n".join(lines)


def all_versions() -> dict[str, str]:
    """Versions of what the arms run on; "absent" for a peer that is not installed."""
    found = versions()
    for package in ("galore-torch", "badam", "bitsandbytes", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


# -- figure ------------------------------------------------------------------------------


def figure_of(record: Mapping[str, Any]) -> Any:
    """The figure of what results.json holds."""
    seeds = len(record["seeds"])
    return figure(
        *from_record(record), record["loss_before"]["prose_test"],
        f"Fine-tuning a Llama of {record['n_parameters'] / 1e6:.1f} million weights from Python "
        f"source to prose: {record['fraction']:.0%} of the weights against the peers, {seeds} seed"
        + ("s" if seeds > 1 else ""),
    )  # fmt: skip


def figure(
    rows: Sequence[Summary], verdicts: Sequence[Verdict], before: float, title: str
) -> Any:
    """Loss against memory with error bars, and every arm's paired difference from our best."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made = matplotlib.figure.Figure(figsize=(13, 6.4), layout="constrained")
    FigureCanvasAgg(made)  # no window system is needed
    left, right = made.subplots(1, 2, width_ratios=(1.15, 1))
    _loss_panel(left, rows, before)
    _difference_panel(right, verdicts, best_of_ours(rows).label)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#eeeeee")
        ax.set_axisbelow(True)
    made.suptitle(title, fontsize=12.5)
    return made


def _loss_panel(ax: Any, rows: Sequence[Summary], before: float) -> None:
    front = pareto_front([ArmPoint(r.label, r.memory / MB, r.loss) for r in rows])
    ax.step([p.resource for p in front], [p.loss for p in front], where="post", color="#b0b0b0",
            linewidth=1.0, zorder=1, label="not beaten in both")  # fmt: skip
    for role, name in ROLES.items():
        own = [r for r in rows if r.role == role]
        if own:
            ax.errorbar(
                [r.memory / MB for r in own], [r.loss for r in own],
                yerr=[r.loss_sd or 0 for r in own], fmt=MARKERS[role], color=COLOURS[role],
                markersize=13 if role == FULL else 7, markeredgecolor="white", elinewidth=1.2,
                capsize=3, label=name, zorder=3,
            )  # fmt: skip
    low, high = min(r.loss for r in rows), max(r.loss for r in rows)
    bars = max(r.loss_sd or 0 for r in rows)
    room = max(high - low, 1e-6)
    ax.set_ylim(low - bars - 0.08 * room, high + bars + 0.12 * room)
    right = max(r.memory for r in rows) / MB
    ax.set_xlim(0, 1.25 * right)  # savings are read as lengths; room for the names
    _name_points(ax, rows, right, 0.036 * (room + 2 * bars))
    deviation = "" if rows[0].loss_sd is None else "; bars: standard deviation over seeds"
    ax.set(
        xlabel="gradients + optimizer state + trained copies (MB)",
        ylabel=f"held-out loss (nats per token{deviation})",
        title=f"Loss against memory (before adaptation: {before:.2f})",
    )  # fmt: skip
    ax.legend(frameon=False, fontsize=9, loc="upper right")


def short(label: str) -> str:
    """A label where the colour says whose arm it is."""
    return label.removeprefix("SparseAdamW, ")


def _name_points(ax: Any, rows: Sequence[Summary], right: float, gap: float) -> None:
    """Every point's name beside it, on white, so that lines behind do not run through it."""
    from matplotlib.patheffects import withStroke

    points = [(r.memory / MB, r.loss, r.loss_sd or 0.0) for r in rows]
    # A letter of this size takes about this much of the axis of 1.25 * right.
    widths = [0.0145 * 1.25 * right * len(short(r.label)) for r in rows]
    for row, (x, y) in zip(rows, label_places(points, widths, 0.05 * right, gap), strict=True):
        ax.annotate(
            short(row.label), (row.memory / MB, row.loss), (x, y),
            fontsize=8.5, va="center", color=COLOURS[row.role], zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "linewidth": 0.7, "shrinkA": 0,
                        "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def label_places(
    points: Sequence[tuple[float, float, float]],
    widths: Sequence[float],
    shift: float,
    gap: float,
) -> list[tuple[float, float]]:
    """Left ends and heights of the points' labels, beside the points and clear of each other, of
    all points and of their error bars.

    Each label takes the nearest free place: to the right of its point, or further up or down, or
    further right. The points that are most alone come last, since they have the choice.

    Args:
        points: ``(x, y, half the length of the error bar)``.
        widths: of the labels, in units of x.
        shift: from a point to its label.
        gap: height of a label.
    """
    taken: list[tuple[float, float, float, float]] = [  # x from, x to, y from, y to
        (x - 0.25 * shift, x + 0.25 * shift, y - max(bar, gap / 2), y + max(bar, gap / 2))
        for x, y, bar in points
    ]
    crowd = [
        sum(abs(x - u) < widths[i] and abs(y - v) < 4 * gap for u, v, _ in points)
        for i, (x, y, _) in enumerate(points)
    ]
    found: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(points)), key=lambda i: (-crowd[i], -points[i][1], i)):
        x, y, _ = points[i]
        tries = [
            (abs(up) + 2 * right, x + (1 + right) * shift, y + up * gap / 2)
            for up in range(-24, 25) for right in range(5)
        ]  # fmt: skip
        for _, left, middle in sorted(tries):
            box = (left, left + widths[i], middle - gap / 2, middle + gap / 2)
            if not any(_overlap(box, other) for other in taken):
                break
        else:  # so crowded that nothing is free: beside the point, whatever is there
            left, middle = x + shift, y
            box = (left, left + widths[i], middle - gap / 2, middle + gap / 2)
        taken.append(box)
        found[i] = (left, middle)
    return [found[i] for i in range(len(points))]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _difference_panel(ax: Any, verdicts: Sequence[Verdict], best: str) -> None:
    ordered = sorted(verdicts, key=lambda v: v.found.mean, reverse=True)
    for i, v in enumerate(ordered):
        f = v.found
        ax.errorbar(
            f.mean, i, xerr=[[f.mean - f.low], [f.high - f.mean]], fmt=MARKERS[v.role],
            color=COLOURS[v.role], markersize=11 if v.role == FULL else 6.5, elinewidth=1.4,
            markeredgecolor="white", capsize=3,
        )  # fmt: skip
    ax.axvline(0, color=BLUE, linewidth=1.2, linestyle="--")
    names = [f"{short(v.label)}  ({v.memory_ratio:.2f} x)" for v in ordered]
    ax.set_yticks(range(len(ordered)), names, fontsize=9)
    for label, v in zip(ax.get_yticklabels(), ordered, strict=True):
        label.set_color(COLOURS[v.role])
    ax.set_ylim(-0.7, len(ordered) - 0.3)
    ax.set(
        xlabel=f"held-out loss less that of {short(best)} (nats per token)\n"
        "left of the line: better; in brackets: memory as a multiple",
        title=f"Against the best of fastgrad: {LEVEL:.0%} intervals, paired",
    )
