"""Which way to train gains most per unit of each resource: meters side by side.

table = fg.compare_meters({"all weights": "full.json", "top 20 %": meter})
print(table.to_markdown())
table.figure().savefig("arms.png")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastgrad.errors import FastgradError, ResourceError
from fastgrad.meter import UNITS, Meter
from fastgrad.meter_log import Check, mode_kind, read_file, read_state
from fastgrad.plots import ArmPoint, pareto_plot
from fastgrad.plots_base import COLOURS, matplotlib_module, new_figure, open_axes

#: Resources in words, for axes and columns; of the peak it is what was held.
NAMES = {
    "seconds": "wall time", "cpu_seconds": "processor time", "flops": "operations",
    "joules": "energy", "traffic_bytes": "bytes moved", "peak_bytes": "peak memory",
}  # fmt: skip
_PER = {
    "seconds": "s", "cpu_seconds": "cpu s", "flops": "FLOP", "joules": "J",
    "traffic_bytes": "B moved", "peak_bytes": "B held",
}  # fmt: skip


@dataclass(frozen=True)
class ArmSpending:
    """What one arm gained, and what it took.

    Attributes:
        arm: its name.
        first, last: figure of merit at the first check and at the one that is looked at.
        step: steps done at the latter.
        spent: resources between the two checks; of ``peak_bytes`` the highest up to the latter.
        gain_per: ``(last - first) / spent``; None where nothing was spent.
        modes: how each resource was measured, those that were not included.
        resumed: several runs added to it.
        path: checks from first to last as ``(spent, psi)`` of each resource that is spent.
    """

    arm: str
    first: float
    last: float
    step: int
    spent: dict[str, float]
    gain_per: dict[str, float | None]
    modes: dict[str, str]
    resumed: bool
    path: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class MeterComparison:
    """Arms side by side, see :func:`compare_meters`.

    Attributes:
        arms: one entry each, in the order given.
        fronts: resource -> names of the arms that no other beats in both it and the figure of
            merit, cheapest first.
        not_compared: resource -> why it has no front.
        notes: what else to know when reading the table.
    """

    arms: tuple[ArmSpending, ...]
    fronts: dict[str, tuple[str, ...]]
    not_compared: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "arms": {
                a.arm: {
                    "first": a.first, "last": a.last, "step": a.step, "spent": dict(a.spent),
                    "gain_per": dict(a.gain_per), "modes": dict(a.modes), "resumed": a.resumed,
                }
                for a in self.arms
            },
            "fronts": {name: list(front) for name, front in self.fronts.items()},
            "not_compared": dict(self.not_compared),
            "notes": list(self.notes),
        }  # fmt: skip

    def rows(self) -> list[list[str]]:
        """The table as text, headings first: what was gained, and per resource what was spent and
        what a unit of it bought. A star is the front's, a tilde says estimated."""
        names = [n for n in UNITS if any(n in a.spent for a in self.arms)]
        heads = ["arm", "first", "last", "gain"]
        for name in names:
            heads += [f"{NAMES[name]} ({UNITS[name]})", f"gain per {_PER[name]}"]
        table = [heads]
        for arm in self.arms:
            row = [arm.arm, f"{arm.first:.4g}", f"{arm.last:.4g}", f"{arm.last - arm.first:+.4g}"]
            for name in names:
                row += self._cells(arm, name)
            table.append(row)
        return table

    def _cells(self, arm: ArmSpending, name: str) -> list[str]:
        if name not in arm.spent:
            return ["-", "-"]
        about = "~" if mode_kind(arm.modes[name]) == "estimated" else ""
        star = " *" if arm.arm in self.fronts.get(name, ()) else ""
        gain = arm.gain_per[name]
        return [
            f"{about}{arm.spent[name]:.4g}{star}", "-" if gain is None else f"{about}{gain:.3g}"
        ]  # fmt: skip

    def _remarks(self) -> list[str]:
        remarks = ["* no other arm beats it in both this resource and the figure of merit"]
        if any(mode_kind(m) == "estimated" for a in self.arms for n, m in a.modes.items()
               if n in a.spent):  # fmt: skip
            remarks.append("~ estimated, not measured")
        remarks += [f"{NAMES[n]} is not compared: {why}" for n, why in self.not_compared.items()]
        return [*remarks, *self.notes]

    def to_markdown(self) -> str:
        """The table and its remarks as Markdown."""
        heads, *rows = ([c.replace("|", "\\|") for c in row] for row in self.rows())
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n" + "\n".join(f"- {r}" for r in self._remarks()) + "\n"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        heads, *rows = self.rows()
        table = Table()
        for i, head in enumerate(heads):
            table.add_column(Text(head), justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        return Group(table, *(Text(r, style="dim") for r in self._remarks()))

    def plot(self, ax: Any, resource: str, *, ylabel: str | None = None,
             loss: bool = True) -> None:  # fmt: skip
        """Draw the arms' ends with their front, and the way that each went.

        Args:
            ax: matplotlib axes.
            resource: on the horizontal axis.
            ylabel: of the vertical axis.
            loss: the figure of merit is minus a loss, which is drawn, so that lower is better;
                else it is drawn itself and higher is better.

        Raises:
            FastgradError: if the resource is not compared, with the reason.
            MissingExtraError: without matplotlib.
        """
        matplotlib_module()
        if resource not in self.fronts:
            raise FastgradError(
                f"{resource!r} is not compared: {self.not_compared.get(resource, 'unknown')}. "
                f"Remedy: one of {', '.join(self.fronts) or 'none here'}"
            )
        from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

        points = [ArmPoint(a.arm, a.spent[resource], -a.last) for a in self.arms]
        pareto_plot(ax, points, xlabel=f"{NAMES[resource]} ({UNITS[resource]})",
                    title=NAMES[resource].capitalize())  # fmt: skip
        for i, arm in enumerate(self.arms):
            path = arm.path.get(resource, [])
            ax.plot([x for x, _ in path], [-psi for _, psi in path], "--", linewidth=1.0,
                    alpha=0.7, color=COLOURS[i % len(COLOURS)], zorder=2)  # fmt: skip
        ax.set_xlim(0, 1.06 * max(p.resource for p in points) or None)
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.xaxis.set_major_locator(MaxNLocator(5))
        if loss:
            ax.set_ylabel(ylabel or "loss")
        else:
            ax.invert_yaxis()  # drawn as a loss, and turned over
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))
            ax.set_ylabel(ylabel or "figure of merit")

    def figure(self, resources: Sequence[str] | None = None, *, ylabel: str | None = None,
               loss: bool = True) -> Any:  # fmt: skip
        """One panel for each resource, all that are compared by default; see :meth:`plot`.

        Returns:
            A matplotlib ``Figure``, for :func:`fastgrad.plots.save_figure`.

        Raises:
            FastgradError: as :meth:`plot`, or if no resource is compared.
        """
        chosen = list(self.fronts) if resources is None else list(resources)
        if not chosen:
            raise FastgradError(f"no resource is compared: {self.not_compared}")
        columns = min(3, len(chosen))
        lines = -(-len(chosen) // columns)
        figure = new_figure(4.6 * columns, 3.6 * lines)
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, resource in zip(panels, chosen, strict=False):
            self.plot(ax, resource, ylabel=ylabel, loss=loss)
            if ax is not panels[0]:
                ax.get_legend().remove()
            if ax not in panels[::columns]:
                ax.set_ylabel("")
        for ax in panels[len(chosen) :]:
            ax.set_axis_off()
        open_axes(*panels[: len(chosen)])
        return figure


def compare_meters(
    meters: Mapping[str, Meter | str | os.PathLike[str]], *, at: Literal["last", "best"] = "last"
) -> MeterComparison:
    """What each arm gained per unit of each resource, and which arms no other beats.

    All arms have to be judged by the same figure of merit on the same data, and to begin where
    they are to be compared from: with a check before the first step.

    Args:
        meters: arm -> its meter or its log.
        at: look at the last check of each arm, or at its best one.

    Raises:
        ResourceError: without arms, for a damaged log, or for an arm with less than two checks.
    """
    if not meters:
        raise ResourceError("there is no arm to compare. Remedy: {name: meter or log}")
    if at not in ("last", "best"):
        raise ResourceError(f"at is {at!r}. Remedy: 'last' or 'best'")
    logs = {
        name: read_state(m.state_dict(), name) if isinstance(m, Meter)
        else read_state(read_file(m), str(m))
        for name, m in meters.items()
    }  # fmt: skip
    arms = tuple(_arm(name, log, at) for name, log in logs.items())
    fronts: dict[str, tuple[str, ...]] = {}
    not_compared: dict[str, str] = {}
    for resource in UNITS:
        reason = _incomparable(arms, resource)
        if reason is None:
            fronts[resource] = _front(arms, resource)
        else:
            not_compared[resource] = reason
    return MeterComparison(arms, fronts, not_compared, _notes(logs, arms, fronts))


def _arm(name: str, log: Mapping[str, Any], at: str) -> ArmSpending:
    checks: list[Check] = log["checks"]
    if len(checks) < 2:
        raise ResourceError(
            f"arm {name!r} has {len(checks)} checks, and a gain is between two. Remedy: "
            "meter.check(psi) before the first step and at the end"
        )
    end = len(checks) - 1
    if at == "best":  # the earliest of equals; the first check is where the gain is counted from
        end = max(range(1, len(checks)), key=lambda i: (checks[i].psi, -i))
    first, last = checks[0], checks[end]
    names = [n for n in UNITS if n in last.spent and n in first.spent and n in log["spent"]]
    spent = {n: _between(first, last, n) for n in names}
    gain = last.psi - first.psi
    path = {
        n: [(_between(first, c, n), c.psi) for c in checks[: end + 1] if n in c.spent]
        for n in names
        if n != "peak_bytes"
    }
    return ArmSpending(
        name, first.psi, last.psi, last.step, spent,
        {n: gain / s if s > 0 else None for n, s in spent.items()},
        dict(log["modes"]), len(log["sessions"]) > 1, path,
    )  # fmt: skip


def _between(first: Check, last: Check, name: str) -> float:
    return last.spent[name] - (0.0 if name == "peak_bytes" else first.spent[name])


def _incomparable(arms: Sequence[ArmSpending], resource: str) -> str | None:
    missing = [a for a in arms if resource not in a.spent]
    if missing:
        modes = {a.modes.get(resource, "not measured") for a in missing}
        return f"{', '.join(a.arm for a in missing)}: {'; '.join(sorted(modes))}"
    kinds = {a.arm: mode_kind(a.modes[resource]) for a in arms}
    if len(set(kinds.values())) > 1:
        return ", ".join(f"{kind} in {arm}" for arm, kind in kinds.items())
    return None


def _front(arms: Sequence[ArmSpending], resource: str) -> tuple[str, ...]:
    """Cheapest first; of arms alike in both, all."""
    front = [
        a
        for a in arms
        if not any(
            b.spent[resource] <= a.spent[resource]
            and b.last >= a.last
            and (b.spent[resource], b.last) != (a.spent[resource], a.last)
            for b in arms
        )
    ]
    return tuple(a.arm for a in sorted(front, key=lambda a: a.spent[resource]))


def _notes(
    logs: Mapping[str, Any], arms: Sequence[ArmSpending], fronts: Mapping[str, Any]
) -> tuple[str, ...]:
    notes = []
    starts = {a.first for a in arms}
    if len(starts) > 1:
        notes.append(
            f"the arms begin at different figures of merit ({min(starts):.4g} to "
            f"{max(starts):.4g}): gains are not from one start"
        )
    for name, log in logs.items():
        begun, sessions = log["checks"][0].step, log["sessions"]
        if begun > 0:
            notes.append(f"{name}: counted from step {begun}, its first check")
        if len(sessions) > 1:
            at = ", ".join(str(s["from_step"]) for s in sessions[1:])
            notes.append(f"{name}: resumed at step {at}; all runs are added up")
        process = next((s for s in sessions if "processes" in s), None)
        if process is not None:
            notes.append(f"{name}: process {process['process']} of {process['processes']} alone")
    for resource in fronts:
        modes = {a.modes[resource] for a in arms}
        if len(modes) > 1:
            notes.append(
                f"{NAMES[resource]} was not found in the same way: {' | '.join(sorted(modes))}"
            )
    return tuple(notes)
