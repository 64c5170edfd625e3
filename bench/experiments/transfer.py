"""Blueprint transfer: what does a blueprint of the general domain cost on a specialised one?

python bench/experiments/transfer.py           # about three minutes; --fast, --gpu

The model has learnt Python source, and its blueprint was measured there. It is adapted to the prose
of the help topics and to C headers, a fifth of its parameters in whole submodules, chosen by the
released blueprint (of the finished model, and of the checkpoint after a tenth of its pre-training),
by statistics of the target text, by a blend of both, or by lot. The cost of staleness is the
held-out loss with the released choice less that with the local one; beside it stands what
``Blueprint.staleness`` said beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from experiments import common
from fastgrad.measuring import measure
from fastgrad.quickstart.arms import WEIGHT_DECAY, Prepared
from fastgrad.quickstart.settings import FRACTION

SAMPLE_SEED = 11
EARLY = common.CHECKPOINTS[0]
LOCAL = "local"


def other_weights(selection: fg.Selection) -> common.Prepare:
    """A selection that was measured on an earlier checkpoint."""

    def prepare(model: nn.Module, seed: int) -> Prepared:
        partial = fg.make_partial(model, selection, allow_other_weights=True)
        trained = list(partial.parameters())
        return Prepared(
            model, trained, partial.n_parameters,
            lambda rate: fg.SparseAdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY),
            partial=partial,
        )  # fmt: skip

    return prepare


def overlap(a: fg.Selection, b: fg.Selection) -> float:
    """Shared elements by all that either has; blocks are whole submodules."""
    def elements(names: set[str]) -> int:
        return sum(a.grid(n).numel for n in names)

    return elements(set(a.blocks) & set(b.blocks)) / elements(set(a.blocks) | set(b.blocks))


def stale(blueprint: fg.Blueprint, local: fg.GradientStats) -> dict[str, Any]:
    found = blueprint.staleness(local)
    half = found.local
    return {
        "verdict": found.verdict, "reason": found.reason, "spearman": found.spearman,
        "weighted_tau": found.weighted_tau, "top_jaccard": found.top_jaccard,
        "local_spearman": None if half is None else half.spearman,
        "local_top_jaccard": None if half is None else half.top_jaccard,
    }  # fmt: skip


def one_domain(
    ask: common.Asked, base: common.Base, domain: str, early: fg.Blueprint, released: fg.Blueprint
) -> dict[str, Any]:
    """Every choice on one target text, with all seeds."""
    model = base.model()
    local, loss = measure(model, base.sample(domain, SAMPLE_SEED), blocks="module")
    blend = released.blend(local, weight="auto")
    chosen = {
        "early": fg.select(early, fraction=FRACTION),
        "released": fg.select(released, model=model, fraction=FRACTION),
        "blend": fg.select(blend, model=model, fraction=FRACTION),
        LOCAL: fg.select(local, model=model, fraction=FRACTION),
    }

    def lot(model: nn.Module, seed: int) -> fg.Selection:
        return fg.select(None, model, fraction=FRACTION, ranking="random", seed=seed)

    arms: dict[str, common.Prepare] = {
        "early": other_weights(chosen["early"]),
        **{key: common.sparse(chosen[key]) for key in ("released", "blend", LOCAL)},
        "random": common.sparse(lot),
        "full": common.whole("full", base),
    }
    before = common.before(base, domain)
    total = sum(p.numel() for p in model.parameters())
    runs = {}
    for key, prepare in arms.items():
        runs[key] = [common.Adaptation(base, domain, prepare, i).run() for i in ask.seeds]
        print(f"  {domain}, {key}: {runs[key][0]['test']:.3f}", flush=True)
    return {
        "domain": domain, "before": before, "sample_loss": loss,
        "test_rows": len(base.rows[f"{domain}_test"]),
        "staleness": {"early": stale(early, local), "released": stale(released, local)},
        "arms": [
            {
                "key": key, "runs": found,
                "summary": asdict(common.Summary.of(key, found, before, total)),
                "overlap": overlap(chosen[key], chosen[LOCAL]) if key in chosen else None,
                "cost": asdict(common.compared(found, runs[LOCAL])) if key != LOCAL else None,
                "selected": sorted(chosen[key].blocks) if key in chosen else None,
            }
            for key, found in runs.items()
        ],
    }  # fmt: skip


LABELS = {
    "early": "released at 10 % of pre-training", "released": "released",
    "blend": "released, blended with local", LOCAL: "local", "random": "random", "full": "full",
}  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| target | chosen by | staleness verdict | Spearman (halves) | top 20 % (halves) | "
        "overlap with local choice | test loss | gain | cost of not being local |",
        "|:--|:--|:--|:--|:--|--:|:--|--:|:--|",
    ]
    for d in record["domains"]:
        for r in d["arms"]:
            t = d["staleness"].get(r["key"])
            s = common.Summary(**r["summary"])
            said = ["–"] * 3 if t is None else [
                t["verdict"], f"{_two(t['spearman'])} ({_two(t['local_spearman'])})",
                f"{_two(t['top_jaccard'])} ({_two(t['local_top_jaccard'])})",
            ]  # fmt: skip
            cost = "–" if r["cost"] is None else common.told(common.Difference(**r["cost"]))
            over = "–" if r["overlap"] is None else f"{r['overlap']:.0%}"
            lines.append(
                f"| {d['domain']} | {LABELS[r['key']]} | {' | '.join(said)} | {over} | {s.loss} | "
                f"{s.gain:.3f}{'*' if s.edge else ''} | {cost} |"
            )
    s = record["settings"]
    fresh = record["same_domain"]
    lines += [
        "",
        "Test loss: nats per token on held-out rows of the target ("
        + ", ".join(f"{d['domain']}: {d['test_rows']} rows, {d['before']['test']:.3f} before"
                    for d in record["domains"])
        + f"); mean ± standard deviation over {len(record['seeds'])} seeds (order of the batches; "
        "random draws one selection for each). Cost: loss less that of the local choice, 95 % "
        "interval paired over test rows and seeds. Overlap: shared parameters by all that either "
        f"choice has. {s['steps']} steps of {s['rows']} rows; rate: for each seed the best on the "
        "validation part of "
        + common.rates_told([r for d in record["domains"] for r in d["arms"]])
        + f". Samples: {s['probe_batches']} batches of {s['probe_rows']} rows. As a control, "
        f"another sample of the general domain: {fresh['verdict']}, Spearman "
        f"{_two(fresh['spearman'])} ({_two(fresh['local_spearman'])}).",
        "",
        common.footer(record),
    ]  # fmt: skip
    return "\n".join(lines)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw(record: Mapping[str, Any]) -> Any:
    """Cost of each choice on each text, with its interval."""
    from fastgrad.plots_base import BLUE, GREY, VERMILION, new_figure, open_axes

    domains = record["domains"]
    figure = new_figure(5.4 * len(domains), 3.7)
    axes = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for ax, d in zip(axes, domains, strict=True):
        rows = [r for r in d["arms"] if r["cost"] is not None and r["key"] != "full"]
        for y, r in enumerate(reversed(rows)):
            c = r["cost"]
            colour = GREY if r["key"] == "random" else (
                BLUE if c["low"] <= 0 else VERMILION
            )  # fmt: skip
            ax.plot([c["low"], c["high"]], [y, y], color=colour, lw=1.6)
            ax.plot(c["mean"], y, "o", color=colour, ms=6)
            if r["key"] in d["staleness"]:
                ax.annotate(d["staleness"][r["key"]]["verdict"], (c["mean"], y), xytext=(0, 7),
                            textcoords="offset points", ha="center", fontsize=8,
                            bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
        ax.axvline(0, color=GREY, lw=1, ls="--")
        ax.set(yticks=range(len(rows)), yticklabels=[LABELS[r["key"]] for r in reversed(rows)],
               ylim=(-0.5, len(rows) - 0.3), title=f"adapted to {d['domain']}",
               xlabel="held-out loss less that of the local choice")  # fmt: skip
        ax.locator_params(axis="x", nbins=6)
    open_axes(*axes)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("transfer", __doc__, "small", argv)
    clock, base = common.Clock(), ask.base()
    # Twelve arms with three seeds each: fewer steps, and no rate between those of equal ratios.
    base.settings = replace(base.settings, refine=False, steps=round(0.75 * base.settings.steps))
    blueprints = {}
    for share in (EARLY, 1.0):
        model = base.model(share)
        stats, _ = measure(model, base.sample("code", SAMPLE_SEED), blocks="module")
        blueprints[share] = fg.Blueprint.from_stats(stats, model, ["python-source"])
    again, _ = measure(base.model(), base.sample("code", SAMPLE_SEED + 1), blocks="module")
    domains = [
        one_domain(ask, base, domain, blueprints[EARLY], blueprints[1.0])
        for domain in common.DOMAINS
    ]
    record = {**common.origin(ask), "settings": vars(base.settings), "sample_seed": SAMPLE_SEED,
              "same_domain": stale(blueprints[1.0], again), "domains": domains,
              "seconds": clock()}  # fmt: skip
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
