"""Does the gradient norm rank the blocks as well as second-order influence, and as measured?

python bench/experiments/proxy.py           # about four minutes; --fast, --gpu

Each parameter of the pretrained model is trained alone on another text, from the same start: by one
plain gradient step, by a few AdamW steps, and by more of them at a higher rate. How far that lowers
the held-out loss is set beside the gradient norm, the norm preconditioned by a diagonal and by a
Kronecker-factored Fisher matrix, and the size of the block as a control.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from experiments import common
from fastgrad.concentration import FloatArray, interval
from fastgrad.curvature import gather_curvature
from fastgrad.measuring import own_loss
from fastgrad.proxy import second_order_scores
from fastgrad.proxy_report import EFFECTS, SCORES, per_element, rank_correlation

BOOTSTRAP = 1000
RATE, STEPS = 1e-3, 4  # of AdamW
LONG_RATE, LONG_STEPS = 4e-3, 16
DAMPINGS = (0.01, 0.1, 1.0)
TEST_ROWS = 64
OUTCOMES = {
    "gradient_step": "one gradient step",
    "adamw": f"{STEPS} AdamW steps at {RATE:g}",
    "adamw_long": f"{LONG_STEPS} AdamW steps at {LONG_RATE:g}",
}
KINDS = ("embedding", "query, key", "value, output", "feed-forward", "norms")


def kind_of(name: str) -> str:
    """What a parameter of the Llama does."""
    if "embed" in name:
        return KINDS[0]
    if "norm" in name:
        return KINDS[4]
    if "mlp" in name:
        return KINDS[3]
    return KINDS[1] if name.split(".")[-2] in ("q_proj", "k_proj") else KINDS[2]


def measured(base: common.Base, domain: str, seed: int) -> tuple[dict[str, Any], FloatArray]:
    """Scores, and the effects of :data:`OUTCOMES`, of every parameter with one sample; and the
    scores of second order with other dampings."""
    model, s = base.model(), base.settings
    train = base.sample(domain, seed)
    rows = base.rows[f"{domain}_valid"][:TEST_ROWS]
    test = [{"input_ids": p, "labels": p} for p in rows.split(s.probe_rows)]
    report = fg.proxy_quality(model, train, test, adam_rate=RATE, steps=STEPS,
                              n_bootstrap=BOOTSTRAP, seed=seed)  # fmt: skip
    longer = fg.proxy_quality(model, train, test, rate=report.rate, adam_rate=LONG_RATE,
                              steps=LONG_STEPS, n_bootstrap=BOOTSTRAP, seed=seed)  # fmt: skip
    row = {
        "domain": domain,
        "seed": seed,
        "summary": report.summary(),
        **{k: v for k, v in report.to_dict().items() if k not in ("correlations", "comparisons")},
        "kinds": [kind_of(n) for n in report.names],
    }
    row["effects"]["adamw_long"] = longer.effects["adamw"].tolist()
    row["n_unresolved"]["adamw_long"] = longer.n_unresolved["adamw"]
    row["other_dampings"] = list(damped(model, train))
    return row


def damped(model: Any, train: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """Scores of second order with other dampings; the model is used up."""
    model.eval()
    for batch in train:
        (own_loss(model, batch) / len(train)).backward()
    own = dict(model.named_parameters())
    gradient = {n: p.grad for n, p in own.items()}
    model.zero_grad(set_to_none=True)
    curvature = gather_curvature(model, own, train, own_loss)
    for of in ("block", "model"):
        for damping in DAMPINGS:
            found = second_order_scores(curvature, gradient, damping, of)
            yield {"damping": damping, "damping_of": of,
                   **{k: [x if np.isfinite(x) else None for x in v] for k, v in found.items()}}


def pooled(
    rows: Sequence[Mapping[str, Any]], score: str, outcome: str, normalised: bool,
    values: Sequence[Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Mean rank correlation over samples, and the norm's on the same blocks less that, with
    intervals over blocks (the same blocks are drawn for every sample)."""
    sizes = np.array(rows[0]["sizes"])

    def of(given: Any, key: str) -> FloatArray:
        array = np.array(given, dtype=np.float64)
        return per_element(key, array, sizes) if normalised else array

    scores = [of(v, score) for v in (values or [r["scores"][score] for r in rows])]
    norms = [of(r["scores"]["norm"], "norm") for r in rows]
    effects = [of(r["effects"][outcome], "effect") for r in rows]
    known = np.flatnonzero(np.isfinite(scores[0]))
    rng = np.random.default_rng(0)
    drawn = known[rng.integers(0, len(known), (BOOTSTRAP, len(known)))]

    def mean(of_score: Sequence[FloatArray], at: Any) -> Any:
        pairs = zip(of_score, effects, strict=True)
        return np.mean([rank_correlation(a[at], b[at]) for a, b in pairs], axis=0)

    value, again = mean(scores, known), mean(scores, drawn)
    norm, norm_again = mean(norms, known), mean(norms, drawn)
    return {"score": score, "outcome": outcome, "per_element": normalised, "n": len(known),
            "value": value, "interval": interval(again), "norm": norm,
            "norm_less_score": norm - value, "difference_interval": interval(norm_again - again)}


def correlations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By domain, outcome and score."""
    found = []
    for domain in dict.fromkeys(r["domain"] for r in rows):
        own = [r for r in rows if r["domain"] == domain]
        for outcome in OUTCOMES:
            for normalised in (False, True):
                found += [{"domain": domain, **pooled(own, score, outcome, normalised)}
                          for score in SCORES if not (normalised and score == "rms")]
    return found


def dampings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for other dampings, on the first domain."""
    own = [r for r in rows if r["domain"] == rows[0]["domain"]]
    found = []
    for i, one in enumerate(own[0]["other_dampings"]):
        for score in ("fisher", "kfac"):
            for outcome in OUTCOMES:
                values = [r["other_dampings"][i][score] for r in own]
                found.append({"damping": one["damping"], "damping_of": one["damping_of"],
                              **pooled(own, score, outcome, False, values)})  # fmt: skip
    return found


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How far two samples agree about the effects: what no score can be expected to beat."""
    own = [r for r in rows if r["domain"] == rows[0]["domain"]]
    return {
        outcome: None if len(own) < 2 else float(np.mean([
            rank_correlation(np.array(a["effects"][outcome]), np.array(b["effects"][outcome]))
            for i, a in enumerate(own) for b in own[:i]
        ]))
        for outcome in OUTCOMES
    }  # fmt: skip


def within_kinds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean rank correlation within the kinds of parameters that have 5 or more, over kinds (by
    their number of parameters) and samples of the first domain."""
    own = [r for r in rows if r["domain"] == rows[0]["domain"]]
    kinds = np.array(own[0]["kinds"])
    large = [k for k in KINDS if (kinds == k).sum() >= 5]
    found = []
    for score in SCORES:
        for outcome in OUTCOMES:
            values, weights = [], []
            for r in own:
                s = np.array(r["scores"][score], dtype=np.float64)
                e = np.array(r["effects"][outcome])
                for kind in large:
                    at = (kinds == kind) & np.isfinite(s)
                    if at.any():
                        values.append(rank_correlation(s[at], e[at]))
                        weights.append(int(at.sum()))
            found.append({"score": score, "outcome": outcome, "kinds": large,
                          "value": float(np.average(values, weights=weights)) if values else None})
    return found


LABELS = {"norm": "gradient norm (per element: rms)", "rms": "rms", "abs": "sum of absolute values",
          "fisher": "diagonal Fisher", "kfac": "Kronecker-factored Fisher",
          "alignment": "alignment with the held-out gradient", "size": "size of the block"}


def cell(c: Mapping[str, Any]) -> str:
    low, high = c["interval"]
    mark = ""
    if c["score"] not in ("norm",):
        below, above = c["difference_interval"]
        mark = " ↓" if below > 0 else " ↑" if above < 0 else ""
    return f"{c['value']:.2f} [{low:.2f}, {high:.2f}]{mark}"


def table(record: Mapping[str, Any]) -> str:
    lines = []
    counts = Counter(r["domain"] for r in record["rows"])
    samples = ", ".join(f"{n} of {domain}" for domain, n in counts.items())
    first = record["rows"][0]
    for domain in dict.fromkeys(c["domain"] for c in record["correlations"]):
        lines += [f"Trained on {domain}:", "", "| score | blocks | " + " | ".join(
            f"{label}{', per element' if each else ''}"
            for label in OUTCOMES.values() for each in (False, True)
        ) + " |", "|:--|--:|" + ":--|" * 2 * len(OUTCOMES)]  # fmt: skip
        for score in SCORES:
            own = [c for c in record["correlations"]
                   if (c["domain"], c["score"]) == (domain, score)]
            at = {(c["outcome"], c["per_element"]): c for c in own}
            cells = [cell(at[o, e]) if (o, e) in at else "–" for o in OUTCOMES
                     for e in (False, True)]  # fmt: skip
            lines.append(f"| {LABELS[score]} | {own[0]['n']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"Spearman's rank correlation, over the blocks (parameters) of a small Llama, of a score "
        "with the measured decrease of the held-out loss by training the block alone; mean over "
        f"the samples of training batches ({samples}), 95 % interval over blocks. ↓: lower "
        "than the norm on the same blocks, ↑: higher (the interval of the difference leaves 0 "
        "out). Per element: score and effect by the number of elements. Damping of the Fisher "
        f"matrices: {first['damping']:g} of the mean eigenvalue of the whole model. The "
        "Kronecker-factored score is known for weights that only linear layers read; the norm on "
        "those blocks: " + ", ".join(
            f"{c['norm']:.2f} ({OUTCOMES[c['outcome']]})" for c in record["correlations"]
            if c["score"] == "kfac" and not c["per_element"] and c["domain"] == common.DOMAINS[0]
        ) + "." + ("" if None in record["agreement"].values() else (
            " Two samples agree about the effects themselves to " + ", ".join(
                f"{v:.2f} ({OUTCOMES[o]})" for o, v in record["agreement"].items()) + "."
        )),
        "",
        f"Within kinds of parameters ({'; '.join(record['within_kinds'][0]['kinds'])}), "
        f"{common.DOMAINS[0]}, mean:",
        "",
        "| score | " + " | ".join(OUTCOMES.values()) + " |",
        "|:--|" + "--:|" * len(OUTCOMES),
        *(
            f"| {LABELS[s]} | " + " | ".join(
                "–" if c["value"] is None else f"{c['value']:.2f}"
                for o in OUTCOMES for c in record["within_kinds"]
                if (c["score"], c["outcome"]) == (s, o)
            ) + " |"
            for s in SCORES if s != "rms"
        ),
        "",
        f"Damping of the second-order scores, {common.DOMAINS[0]}:",
        "",
        "| mean eigenvalue of | times | " + " | ".join(
            f"{LABELS[s]}, {label}" for s in ("fisher", "kfac") for label in OUTCOMES.values()
        ) + " |",
        "|:--|--:|" + "--:|" * 2 * len(OUTCOMES),
    ]  # fmt: skip
    for of in ("block", "model"):
        for damping in DAMPINGS:
            own = [c for c in record["dampings"]
                   if (c["damping_of"], c["damping"]) == (of, damping)]
            values = [f"{c['value']:.2f}" for s in ("fisher", "kfac") for o in OUTCOMES
                      for c in own if (c["score"], c["outcome"]) == (s, o)]  # fmt: skip
            lines.append(f"| {of} | {damping:g} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", common.footer(record)])


def draw(record: Mapping[str, Any]) -> Any:
    """Norm against effect, coloured by kind; and the correlation of every score."""
    from matplotlib.ticker import NullFormatter

    from fastgrad.plots_base import (
        BLUE,
        COLOURS,
        GREEN,
        GREY,
        MARKERS,
        ORANGE,
        SKY,
        VERMILION,
        new_figure,
        open_axes,
    )  # fmt: skip

    figure = new_figure(12.5, 8.2)
    axes = figure.subplots(2, 3)
    row = record["rows"][0]
    kinds, sizes = np.array(row["kinds"]), np.array(row["sizes"])
    looks = dict(zip(KINDS, ((COLOURS[0], MARKERS[0]), (BLUE, "o"), (SKY, "s"), (ORANGE, "D"),
                             (GREEN, "^")), strict=True))  # fmt: skip
    norm = np.array(row["scores"]["norm"])
    panels = [(axes[0, i], outcome, False) for i, outcome in enumerate(OUTCOMES)]
    panels += [(axes[1, 0], "adamw", True)]
    for ax, outcome, each in panels:
        x = norm / np.sqrt(sizes) if each else norm
        y = np.array(row["effects"][outcome]) / (sizes if each else 1)
        for kind, (colour, marker) in looks.items():
            for sign, fill in ((1, colour), (-1, "white")):
                here = (kinds == kind) & (np.sign(y) == sign)
                ax.plot(x[here], np.abs(y[here]), ls="", marker=marker, ms=6, color=colour,
                        mfc=fill, label=kind if sign == 1 else None)  # fmt: skip
        found = next(c for c in record["correlations"] if (c["domain"], c["score"], c["outcome"],
                     c["per_element"]) == (row["domain"], "norm", outcome, each))  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="rms of the gradient" if each else
               "gradient norm", ylabel="fall of the held-out loss" + (" per element" if each else
               ", nats per token"), title=f"{OUTCOMES[outcome]}: {found['value']:.2f}")  # fmt: skip
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[1, 0].text(0.03, 0.97, "hollow: the loss rose\ntitles: mean rank correlation of samples",
                    transform=axes[1, 0].transAxes, va="top", fontsize=8, color=GREY)
    axes[0, 0].legend(fontsize=8, frameon=False)
    places = np.arange(len(SCORES))[::-1]
    styles = ((BLUE, "o"), (ORANGE, "s"), (VERMILION, "^"))
    for ax, each in ((axes[1, 1], False), (axes[1, 2], True)):
        for k, (outcome, (colour, marker)) in enumerate(zip(OUTCOMES, styles, strict=True)):
            for place, score in zip(places, SCORES, strict=True):
                own = [c for c in record["correlations"] if (
                    c["domain"], c["score"], c["outcome"], c["per_element"]
                ) == (row["domain"], score, outcome, each)]  # fmt: skip
                for c in own:
                    y = place + 0.22 * (1 - k)
                    ax.plot(c["interval"], [y, y], color=colour, lw=1.4)
                    ax.plot(c["value"], y, marker=marker, color=colour, ms=6, ls="",
                            label=OUTCOMES[outcome] if score == "norm" else None)  # fmt: skip
        ax.axvline(0, color=GREY, lw=1, ls=":")
        ax.set(yticks=places, yticklabels=SCORES if not each else [
            "rms" if s == "norm" else "" if s == "rms" else s for s in SCORES],
            xlim=(-1.02, 1.02), xlabel="rank correlation, 95 % interval over blocks",
            title="per element" if each else "whole blocks")  # fmt: skip
    axes[1, 1].legend(fontsize=8, frameon=False, loc="lower left")
    open_axes(*axes.flat)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("proxy", __doc__, "small", argv)
    clock, base = common.Clock(), ask.base()
    rows = []
    for domain in common.DOMAINS:
        for seed in ask.seeds if domain == common.DOMAINS[0] else ask.seeds[:1]:
            rows.append(measured(base, domain, seed))
            print(f"  {domain}, sample {seed}: {clock():.0f} s", flush=True)
    record = {**common.origin(ask), "bootstrap": BOOTSTRAP, "test_rows": TEST_ROWS,
              "adamw": {"rate": RATE, "steps": STEPS},
              "adamw_long": {"rate": LONG_RATE, "steps": LONG_STEPS},
              "explained": {**SCORES, **EFFECTS, "adamw_long": OUTCOMES["adamw_long"]},
              "correlations": correlations(rows), "dampings": dampings(rows),
              "within_kinds": within_kinds(rows), "agreement": agreement(rows), "rows": rows,
              "seconds": clock()}  # fmt: skip
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
