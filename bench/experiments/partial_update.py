"""Partial update: a fifth of the parameters by each ranking and granularity, against the controls.

python bench/experiments/partial_update.py           # about four minutes; --fast, --gpu

Every ranking (norm, rms, relative, l1, alignment) with every granularity (submodule, row, 32x32
tile), all from one local sample of the target text; random blocks of each granularity; full tuning;
LoRA. The learning rate of each arm is the best on the validation part, found with the first seed
and kept for the others; rankings that choose the same blocks are trained once. The
comparison with other libraries' methods is bench/finetune_arms.py, on the larger model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from experiments import common
from fastgrad.quickstart.settings import FRACTION

DOMAIN = "prose"
SAMPLE_SEED = 23
TARGET_SEED = 24  # rows of the direction, drawn apart from those of the sample
RANKINGS = ("norm", "rms", "relative", "l1", "alignment")
STEPS_SHARE = 0.6  # of the settings' steps: twenty arms, three seeds, three rates


def granularities(tile: str) -> dict[str, str]:
    return {"submodules": "module", "rows": "row", "tiles": tile}


def measured(base: common.Base, model: nn.Module, blocks: str) -> fg.GradientStats:
    """The local sample, with absolute values, and aligned with the mean gradient of other rows."""
    model.zero_grad(set_to_none=True)
    for batch in base.sample(DOMAIN, TARGET_SEED):
        model(**batch).loss.backward()
    direction = fg.gradient_direction(model)
    model.zero_grad(set_to_none=True)
    with fg.Probe(model, blocks=blocks, detail=(), targets=direction, l1=True) as probe:
        for batch in base.sample(DOMAIN, SAMPLE_SEED):
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    return probe.stats()


def random_of(blocks: str) -> Callable[[nn.Module, int], fg.Selection]:
    def choose(model: nn.Module, seed: int) -> fg.Selection:
        return fg.select(None, model, fraction=FRACTION, blocks=blocks, ranking="random", seed=seed)

    return choose


Key = tuple[str, str]


def arms(base: common.Base) -> tuple[dict[Key, common.Prepare], dict[Key, Key]]:
    """(ranking, granularity) -> how the arm is set up, full tuning first; and the arms whose blocks
    are those of an earlier one."""
    found = {("full", "–"): common.whole("full", base), ("LoRA", "–"): common.whole("lora", base)}
    seen: dict[tuple[Any, ...], Key] = {}
    same: dict[Key, Key] = {}
    for name, blocks in granularities(base.settings.tile).items():
        model = base.model()
        stats = measured(base, model, blocks)
        for ranking in RANKINGS:
            chosen = fg.select(stats, model, fraction=FRACTION, blocks=blocks, ranking=ranking)
            content = (name, *((n, *ids.tolist()) for n, ids in chosen.blocks.items()))
            first = seen.setdefault(content, (ranking, name))
            if first == (ranking, name):
                found[first] = common.sparse(chosen)
            else:
                same[ranking, name] = first
        found["random", name] = common.sparse(random_of(blocks))
    return found, same


def all_seeds(
    base: common.Base, prepare: common.Prepare, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Results of every seed at the rate that is best with the first."""
    runs = [common.Adaptation(base, DOMAIN, prepare, seeds[0]).run()]
    rate = runs[0]["rate"]
    return runs + [
        common.Adaptation(base, DOMAIN, prepare, i, rate=rate).run() for i in seeds[1:]
    ]


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| ranking | granularity | trained | test loss | gain kept | forgetting | rate | against "
        "random of this granularity | against LoRA |",
        "|:--|:--|--:|:--|--:|--:|--:|:--|:--|",
    ]
    lora = next(r for r in record["arms"] if r["ranking"] == "LoRA")["runs"]
    full = next(r for r in record["arms"] if r["ranking"] == "full")["summary"]["gain"]
    for r in record["arms"]:
        s = common.Summary(**r["summary"])
        rates = "-".join(f"{x:g}" for x in sorted({min(s.rates), max(s.rates)}))
        against = "–" if r["against"] is None else common.told(common.Difference(**r["against"]))
        lora_too = "–" if r["runs"] == lora else common.told(common.compared(r["runs"], lora))
        lines.append(
            f"| {r['ranking']} | {r['granularity']} | {s.trained:.0%} | {s.loss} | "
            f"{s.gain / full:.0%} | {s.forgetting:+.2f} | {rates}{'*' if s.edge else ''} | "
            f"{against} | {lora_too} |"
        )
    s = record["settings"]
    twins = [f"{r['ranking']} {r['granularity']} as {r['same_as']}" for r in record["arms"]
             if r["same_as"]]  # fmt: skip
    lines += [
        "",
        *([f"The same blocks, trained once: {', '.join(twins)}.", ""] if twins else []),
        f"Test loss: nats per token on {record['test_rows']} held-out rows of prose, "
        f"{record['before']['test']:.3f} before; mean ± standard deviation over "
        f"{len(record['seeds'])} seeds (order of the batches, random choices). Gain kept: share of "
        "full tuning's gain. Forgetting: change of the loss on held-out Python source. Against: "
        "difference of the losses with its 95 % interval, paired over test rows and seeds; below "
        f"zero the arm is better. {s['steps']} steps of {s['rows']} rows (fewer than the "
        f"quickstart's 64, so that the grid fits). Rate: the best on the validation part of "
        f"{common.rates_told(record['arms'])}, tried with the first seed. Statistics: one sample "
        f"of {s['probe_batches']} batches of {s['probe_rows']} training rows; alignment with the "
        "mean gradient of as many others.",
        "",
        common.footer(record),
    ]
    return "\n".join(lines)


def draw(record: Mapping[str, Any]) -> Any:
    """Losses of every ranking, a column of points for each granularity."""
    from fastgrad.plots_base import COLOURS, GREY, MARKERS, new_figure, open_axes

    figure = new_figure(9.5, 4.6)
    ax = figure.subplots()
    names = ("submodules", "rows", "tiles")
    rankings = (*RANKINGS, "random")
    for i, ranking in enumerate(rankings):
        for j, name in enumerate(names):
            r = next(r for r in record["arms"] if (r["ranking"], r["granularity"]) ==
                     (ranking, name))["summary"]  # fmt: skip
            ax.errorbar(j + (i - 2.5) * 0.11, r["test"], yerr=r["sd"] or 0, capsize=3, ms=6,
                        fmt=MARKERS[1 + i], color=GREY if ranking == "random" else COLOURS[1 + i],
                        label=ranking if j == 0 else None)  # fmt: skip
    for key, style in (("full", "-"), ("LoRA", "--")):
        r = next(r for r in record["arms"] if r["ranking"] == key)["summary"]
        ax.axhline(r["test"], color=GREY, lw=1, ls=style, zorder=0)
        ax.annotate(key, (2.42, r["test"]), xytext=(0, 3), textcoords="offset points",
                    fontsize=9, color=GREY, ha="right")  # fmt: skip
    ax.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.45, 2.45),
           ylabel="held-out loss, nats per token (mean ± sd)",
           title="a fifth of the parameters, by ranking and granularity")  # fmt: skip
    ax.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.09))
    open_axes(ax)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("partial_update", __doc__, "small", argv)
    clock, base = common.Clock(), ask.base()
    base.settings = replace(
        base.settings, refine=False, steps=max(2, round(STEPS_SHARE * base.settings.steps))
    )
    before = common.before(base, DOMAIN)
    total = sum(p.numel() for p in base.model().parameters())
    own, same = arms(base)
    runs: dict[Key, list[dict[str, Any]]] = {}
    for key, prepare in own.items():
        runs[key] = all_seeds(base, prepare, ask.seeds)
        print(f"  {' '.join(key)}: {runs[key][0]['test']:.3f}", flush=True)
    runs |= {key: runs[first] for key, first in same.items()}
    order = [("full", "–"), ("LoRA", "–")] + [
        (ranking, name) for name in granularities(base.settings.tile)
        for ranking in (*RANKINGS, "random")
    ]  # fmt: skip
    rows = []
    for ranking, name in order:
        found = runs[ranking, name]
        summary = common.Summary.of(f"{ranking}, {name}", found, before, total)
        other = runs.get(("random", name)) if ranking != "random" else None
        rows.append({
            "ranking": ranking, "granularity": name, "summary": asdict(summary),
            "same_as": " ".join(same[ranking, name]) if (ranking, name) in same else None,
            "runs": found,
            "against": None if other is None else asdict(common.compared(found, other)),
        })  # fmt: skip
    record = {**common.origin(ask), "settings": vars(base.settings), "peft": version("peft"),
              "before": before, "test_rows": len(base.rows[f"{DOMAIN}_test"]), "arms": rows,
              "seconds": clock()}  # fmt: skip
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
