"""Does choosing parameters and examples together multiply, and does it train better at equal cost?

python bench/experiments/joint.py           # about ten minutes; --fast, --gpu

First the cross-influence of a pool of examples on 32x32 tiles, at three points of an ordinary full
fine-tuning: rank, independence, multiplicativity. Then the test of the claim: a fifth of the
parameters and a quarter of the examples, chosen together, against parameters alone, examples
alone, random examples, and full tuning. All have the same cost: fraction of parameters times number
of example passes, so arms that train every parameter take a fifth of the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from experiments import common
from experiments.joint_arms import BOTH, EXAMPLES, arms
from fastgrad.quickstart.measure import row_losses
from fastgrad.quickstart.pretrain import batches
from fastgrad.quickstart.settings import FRACTION

DOMAIN = "prose"
POOL_SEED = 7
POINTS = (0.0, 0.5, 1.0)  # shares of a full fine-tuning at which T is looked at
STEPS = {"small": 60, "fast": 5, "gpu": 200}
POOL = {"small": 256, "fast": 24, "gpu": 1024}
RESAMPLES = {"small": 200, "fast": 20, "gpu": 200}
TARGET = {"small": 64, "fast": 8, "gpu": 128}  # rows that signed scores are about


def measured(model: nn.Module, rows: torch.Tensor, size: int, tile: str) -> fg.GradientStats:
    """Cross-influence of every row on every tile; the ids are the rows' numbers."""
    with fg.Probe(model, blocks=tile, loss_reduction="token_mean") as probe:
        for batch in batches(rows, size, -(-len(rows) // size)):
            model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return probe.stats()


def answers(stats: fg.GradientStats, resamples: int) -> dict[str, Any]:
    """What the record keeps of a report."""
    r = fg.influence_report(stats, n_bootstrap=resamples, n_permutations=resamples)
    m, i = r.multiplicativity, r.independence
    return {
        "summary": r.summary(),
        "explained_by_first": float(r.spectrum.explained[0]),
        "stable_rank": r.spectrum.stable_rank,
        "participation": r.spectrum.participation if r.spectrum.complete else None,
        "log_explained": None if i is None else i.explained,
        "misplaced": None if i is None else i.misplaced,
        "independence": None if i is None else i.reason,
        "independence_verdict": None if i is None else i.verdict,
        "independence_p": None if i is None else i.p_value,
        "multiplicativity": m.verdict,
        "multiplicativity_reason": m.reason,
        "ratio": r.meeting.ratio,
        "ratio_interval": list(r.meeting.interval),
        "warning": r.meeting.warning,
        "gamma": r.blocks.gamma.gamma,
        "delta": r.examples.gamma.gamma,
        "share_blocks": r.blocks.gamma.share[r.blocks.gamma.at.index(0.2)],
        "share_examples": r.examples.gamma.share[r.examples.gamma.at.index(0.2)],
        "tail_blocks": r.blocks.tail.verdict,
        "tail_examples": r.examples.tail.verdict,
        "block_ranks_again": r.stability.block_ranks[0],
    }


def in_training(
    base: common.Base, pool: torch.Tensor, steps: int, resamples: int
) -> list[dict[str, Any]]:
    """Reports at :data:`POINTS` of full tuning at the middle rate."""
    s, found = base.settings, []
    at = {round(share * steps): share for share in POINTS}

    def look(model: nn.Module, step: int) -> None:
        if step in at:
            stats = measured(model, pool, s.probe_rows, s.tile)
            loss = float(row_losses(model, pool, s.probe_rows).mean())
            found.append({"share": at[step], "step": step, "loss": loss,
                          **answers(stats, resamples)})  # fmt: skip

    run = common.Adaptation(base, DOMAIN, common.whole("full", base), 0, steps=steps)
    model = run.load()
    look(model, 0)
    prepared = run.prepare(model)
    prepared.after_step = lambda step, optimizer: look(model, step)
    run.train(prepared, sorted(s.rates)[len(s.rates) // 2], steps)
    return found


def choice_of(stats: fg.GradientStats, losses: np.ndarray) -> list[dict[str, Any]]:
    """What was chosen, and how hard the chosen examples are for the model."""
    rows = []
    for strategy in ("alternating", "marginal"):
        found = fg.select_jointly(stats, FRACTION, EXAMPLES, strategy=strategy)
        c = found.choice
        rows.append({
            "strategy": strategy, "share": c.share, "by_blocks": c.by_blocks,
            "by_examples": c.by_examples, "ratio": c.ratio, "rounds": c.rounds,
            "parameters": c.parameters, "n_examples": len(found.example_ids),
            "loss_chosen": float(losses[found.example_ids].mean()),
            "loss_pool": float(losses.mean()),
            "ids": sorted(found.example_ids.tolist()),
        })  # fmt: skip
    return rows


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| full tuning done | first pattern of T | stable rank | log T explained by margins | "
        "the rest | mass elsewhere | best 20 % of parameters | heaviest 20 % of examples | "
        "hot on hot | product of the shares |",
        "|--:|--:|--:|--:|:--|--:|--:|--:|:--|:--|",
    ]
    for r in record["points"]:
        low, high = r["ratio_interval"]
        explained = "–" if r["log_explained"] is None else f"{r['log_explained']:.0%}"
        rest = ("–" if r["independence_p"] is None
                else f"{r['independence_verdict']}, p = {r['independence_p']:.3f}")
        elsewhere = "–" if r["misplaced"] is None else f"{r['misplaced']:.0%}"
        lines.append(
            f"| {r['share']:.0%} | {r['explained_by_first']:.0%} | {r['stable_rank']:.2f} | "
            f"{explained} | {rest} | {elsewhere} | {r['share_blocks']:.0%} | "
            f"{r['share_examples']:.0%} | {r['ratio']:.2f} [{low:.2f}, {high:.2f}] | "
            f"{r['multiplicativity']} |"
        )
    lines += [
        "",
        "The rest: what the margins leave of log T, and the test of whether it has structure, by "
        f"{record['draws']} draws of random signs (smallest p: {1 / (record['draws'] + 1):.3f}). "
        "Hot on hot: what the best 20 % of the parameters hold on the heaviest 10 % of the "
        "examples, by the product of both shares; below 1, multiplying promises too much. Product "
        "of the shares: the verdict over a grid of 16 such pairs.",
        "",
        *(f"- {r['share']:.0%}: {r['independence']}; {r['multiplicativity_reason']}."
          for r in record["points"] if r["independence"] is not None),
        "",
        "| arm | parameters | rows to train on | steps | cost | rows to choose by | test loss | "
        "gain | against joint choice | against all rows |",
        "|:--|--:|--:|--:|--:|--:|:--|--:|:--|:--|",
    ]
    for r in record["arms"]:
        s = common.Summary(**r["summary"])
        against, rows = ("–" if d is None else common.told(common.Difference(**d))
                         for d in (r["against"], r["against_all"]))
        lines.append(
            f"| {r['label']} | {s.trained:.0%} | {r['n_examples']} | {r['steps']} | "
            f"{r['cost']:.0f} | {r['choosing']} | {s.loss} | "
            f"{s.gain:.3f}{'*' if s.edge else ''} | {against} | {rows} |"
        )
    c, s_rows = record["choices"][0], record["settings"]["rows"]
    lines += [
        "",
        f"Test loss: nats per token on {record['test_rows']} held-out rows of prose, "
        f"{record['before']['test']:.3f} before; mean ± standard deviation over "
        f"{len(record['seeds'])} seeds (order of the batches, random choices). Cost: share of the "
        "parameters times example passes; forward pass and activation gradients are not in it, nor "
        "what choosing costs: the rows whose gradients were measured for it, once or more, stand "
        "beside. "
        "Against: difference of the losses with its 95 % interval, paired over test rows and "
        "seeds; above zero the joint choice is better, or training on the rows as they come (of "
        "the same share of the parameters, chosen by their gradient over all rows). Rate: for "
        "each seed the best on the validation part of "
        f"{common.rates_told(record['arms'])}. Chosen once, on the pretrained model, from a pool "
        f"of {record['pool']} rows; anew every step: the best quarter of {4 * s_rows} candidates "
        "from it, with the model as it is. Alignment and cosine: with the gradient of "
        f"{record['target']} other training rows. The jointly chosen rows have a mean loss of "
        f"{c['loss_chosen']:.2f} before training, the pool {c['loss_pool']:.2f}; "
        f"they hold with their blocks {c['share']:.0%} of the squared gradient, which is "
        f"{c['ratio']:.2f} times the product of the shares ({c['by_blocks']:.0%} and "
        f"{c['by_examples']:.0%}).",
        "",
        common.footer(record),
    ]
    return "\n".join(lines)


def draw(record: Mapping[str, Any]) -> Any:
    """Losses at equal cost, and S(k, q) beside the product at each point."""
    from fastgrad.plots_base import BLUE, GREY, VERMILION, new_figure, open_axes

    figure = new_figure(11.5, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    rows = record["arms"]
    for y, r in enumerate(reversed(rows)):
        s = r["summary"]
        joint, dear = r["label"].startswith("joint"), "cost" in r["label"]
        colour = BLUE if joint else GREY if dear else VERMILION
        left.errorbar(s["test"], y, xerr=s["sd"] or 0, fmt="o" if joint else "s", color=colour,
                      mfc="white" if dear else colour, ms=6, capsize=3)  # fmt: skip
    left.axvline(record["before"]["test"], color=GREY, ls=":", lw=1)
    left.text(record["before"]["test"], len(rows) - 0.55, "before ", ha="right", va="center",
              fontsize=8, color=GREY)  # fmt: skip
    left.set(yticks=range(len(rows)), yticklabels=[r["label"] for r in reversed(rows)],
             xlabel="held-out loss, nats per token (mean ± sd over seeds)",
             title="equal cost (hollow: five times)")  # fmt: skip
    points = record["points"]
    places = np.arange(len(points))
    ratios = np.array([p["ratio"] for p in points])
    ends = np.array([p["ratio_interval"] for p in points], dtype=float)
    right.axhspan(0.95, 1.05, color="#E69F00", alpha=0.18, lw=0)
    right.axhline(1, color=GREY, lw=1, ls="--")
    right.errorbar(places, ratios, yerr=np.abs(ends.T - ratios), fmt="o", color=BLUE, capsize=3)
    right.set(xticks=places, xticklabels=[f"{p['share']:.0%}" for p in points],
              xlim=(-0.5, len(points) - 0.5), ylim=(min(0.8, ends.min() - 0.02),
             max(1.2, ends.max() + 0.02)), xlabel="full tuning done",
              ylabel="S(20 %, 10 %) over the product of its shares",
              title="1: both choices multiply")  # fmt: skip
    open_axes(left, right)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("joint", __doc__, "small", argv)
    clock, base, s = common.Clock(), ask.base(), ask.settings
    steps, count = STEPS[s.name], POOL[s.name]
    train = base.rows[f"{DOMAIN}_train"]
    drawn = np.random.default_rng(POOL_SEED).permutation(len(train))
    pool_ids, target_ids = drawn[:count], drawn[count : count + TARGET[s.name]]
    pool, target = (train[torch.from_numpy(ids)].to(ask.device) for ids in (pool_ids, target_ids))
    points = in_training(base, pool, steps, RESAMPLES[s.name])
    model = base.model()
    stats = measured(model, pool, s.probe_rows, s.tile)
    losses = row_losses(model, pool, s.probe_rows).cpu().numpy()
    total = sum(p.numel() for p in model.parameters())
    before = common.before(base, DOMAIN)
    own = arms(base, stats, pool_ids, pool, target, steps)
    results: dict[str, list[dict[str, Any]]] = {}
    for label, arm in own.items():
        results[label] = [arm.run(base, DOMAIN, seed, target) for seed in ask.seeds]
        print(f"  {label}: {[round(r['test'], 3) for r in results[label]]}", flush=True)
    rows = []
    for label, arm in own.items():
        runs = results[label]
        rows.append({
            "label": label, "steps": arm.steps, "n_examples": len(arm.rows(0)),
            "cost": arm.parameters * arm.steps * s.rows,
            "choosing": arm.choosing(s.rows, len(target)),
            "summary": asdict(common.Summary.of(label, runs, before, total)),
            "against": None if label == BOTH else asdict(common.compared(runs, results[BOTH])),
            "against_all": None if arm.against is None else asdict(
                common.compared(runs, results[arm.against])),
            "reference": arm.against,
            "runs": runs,
        })  # fmt: skip
    record = {**common.origin(ask), "pool": len(pool_ids), "pool_seed": POOL_SEED,
              "target": len(target_ids), "draws": RESAMPLES[s.name],
              "test_rows": len(base.rows[f"{DOMAIN}_test"]), "before": before,
              "points": points,
              "choices": choice_of(stats, losses), "arms": rows, "seconds": clock()}  # fmt: skip
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
