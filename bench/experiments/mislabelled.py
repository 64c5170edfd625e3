"""Do gradients find mislabelled examples, and better than the loss alone?

python bench/experiments/mislabelled.py           # under a minute; --fast, --gpu

The digits of scikit-learn, a small perceptron, and a tenth of the training labels flipped to
another class. At several points of training every training example gets its gradient norm, its
alignment with the gradient of a small clean target set (lowest first), its loss, and a random
number as a control; how well do these tell the flipped labels from the others? Then the tenth that
each score suspects is left out, and the network trained again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from experiments import common
from fastgrad.errors import MissingExtraError


@dataclass(frozen=True)
class Digits:
    """Sizes of the example."""

    train: int = 1200
    target: int = 100
    flipped: float = 0.1
    hidden: int = 64
    batch: int = 32
    rate: float = 2e-3
    epochs: int = 40
    points: tuple[int, ...] = (1, 3, 10, 40)


FAST = Digits(train=200, target=50, epochs=20, points=(1, 20))
# Scores of which a high value is suspect; "mean" scores are means over the points so far.
SCORES = {
    "loss": "loss",
    "norm": "gradient norm",
    "alignment": "alignment with the target set, negated",
    "own class": "alignment with the target set's examples of its own label, negated",
    "most harmed": "alignment with those of the label that it harms most, negated",
    "cosine": "cosine with the target set, negated",
    "mean loss": "loss, mean over the points so far",
    "mean norm": "gradient norm, mean over the points so far",
    "mean alignment": "alignment, negated, mean over the points so far",
    "mean cosine": "cosine, negated, mean over the points so far",
    "mean own class": "alignment with its own label's, negated, mean over the points so far",
    "mean most harmed": "alignment with the most harmed label's, mean over the points so far",
    "random": "random numbers",
}
ONCE = ("loss", "norm", "alignment", "cosine", "own class", "most harmed")
TABLE = tuple(k for k in SCORES if k not in ("mean cosine", "mean own class"))


@dataclass
class Data:
    x: Tensor
    y: Tensor  # as given, some flipped
    flipped: np.ndarray
    target: tuple[Tensor, Tensor]  # clean
    test: tuple[Tensor, Tensor]  # clean


def data(d: Digits, seed: int, device: str) -> Data:
    """A split of the digits with flipped labels, drawn with ``seed``.

    Raises:
        MissingExtraError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "bench") from error

    found = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found.target))
    x = torch.tensor(found.data[order] / 16.0, dtype=torch.float32, device=device)
    y = torch.tensor(found.target[order], dtype=torch.int64, device=device)
    flipped = np.zeros(d.train, bool)
    flipped[rng.choice(d.train, round(d.flipped * d.train), replace=False)] = True
    given = y[: d.train].clone()
    shift = torch.tensor(rng.integers(1, 10, int(flipped.sum())), device=device)
    at = torch.tensor(np.flatnonzero(flipped), device=device)
    given[at] = (given[at] + shift) % 10
    a, b = d.train, d.train + d.target
    return Data(x[:a], given, flipped, (x[a:b], y[a:b]), (x[b:], y[b:]))


def network(d: Digits, seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, d.hidden), nn.ReLU(), nn.Linear(d.hidden, d.hidden), nn.ReLU(),
        nn.Linear(d.hidden, 10),
    ).to(device)  # fmt: skip


def scores_of(model: nn.Module, given: Data, d: Digits) -> dict[str, np.ndarray]:
    """``[E]`` by the keys of :data:`ONCE`, the suspect end up."""
    x, y = given.target
    parts = {"clean": torch.ones_like(y, dtype=torch.bool)}
    parts |= {f"label {c}": y == c for c in range(10)}
    targets = {}
    for name, part in parts.items():
        F.cross_entropy(model(x[part]), y[part]).backward()
        targets[name] = fg.gradient_direction(model)
        model.zero_grad(set_to_none=True)
    with fg.Probe(model, targets=targets, loss_reduction="row_mean") as probe:
        for start in range(0, len(given.x), 256):
            part = slice(start, start + 256)
            F.cross_entropy(model(given.x[part]), given.y[part]).backward()
    model.zero_grad(set_to_none=True)
    stats = probe.stats()
    with torch.no_grad():
        loss = F.cross_entropy(model(given.x), given.y, reduction="none").cpu().numpy()
    by_label = np.array([fg.example_scores(stats, "alignment", direction=f"label {c}")
                         for c in range(10)])  # fmt: skip
    return {"loss": loss.astype(np.float64), "norm": fg.example_scores(stats),
            "alignment": -fg.example_scores(stats, "alignment", direction="clean"),
            "cosine": -fg.example_scores(stats, "cosine", direction="clean"),
            "own class": -by_label[given.y.cpu().numpy(), np.arange(len(given.y))],
            "most harmed": -by_label.min(0)}  # fmt: skip


def train(
    model: nn.Module, x: Tensor, y: Tensor, d: Digits, seed: int, steps_per_epoch: int,
    at_epoch: Any = lambda epoch: None,
) -> None:  # fmt: skip
    """AdamW over shuffled batches; the same number of steps whatever the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=d.rate)
    order = torch.empty(0, dtype=torch.int64)
    for epoch in range(1, d.epochs + 1):
        for _ in range(steps_per_epoch):
            if len(order) < d.batch:
                order = torch.cat([order, torch.randperm(len(x), generator=generator)])
            now, order = order[: d.batch].to(x.device), order[d.batch :]
            F.cross_entropy(model(x[now]), y[now]).backward()
            optimizer.step()
            optimizer.zero_grad()
        at_epoch(epoch)


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).float().mean())


def quality(suspicion: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """AUROC, and the share of flipped labels among the tenth that is most suspect."""
    from sklearn.metrics import roc_auc_score

    count = int(flipped.sum())
    worst = np.argsort(-suspicion, kind="stable")[:count]
    return {"auroc": float(roc_auc_score(flipped, suspicion)),
            "precision": float(flipped[worst].mean())}  # fmt: skip


def one_seed(d: Digits, seed: int, device: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Qualities of every score at every point; accuracies after suspects were left out."""
    given = data(d, seed, device)
    steps = -(-d.train // d.batch)
    model = network(d, seed, device)
    history: list[dict[str, np.ndarray]] = []
    rows: list[dict[str, Any]] = []
    latest: dict[str, np.ndarray] = {}

    def look(epoch: int) -> None:
        if epoch not in d.points:
            return
        found = scores_of(model, given, d)
        history.append(found)
        means = {f"mean {k}": np.mean([h[k] for h in history], axis=0) for k in ONCE}
        noise = np.random.default_rng(1000 + seed).random(d.train)
        latest.update(found | means | {"random": noise})
        wrong = torch.tensor(given.flipped, device=device)
        fit = accuracy(model, (given.x[wrong], given.y[wrong]))
        for key in SCORES:
            rows.append({"seed": seed, "epoch": epoch, "score": key, "flipped_learnt": fit,
                         "test_accuracy": accuracy(model, given.test),
                         **quality(latest[key], given.flipped)})  # fmt: skip

    train(model, given.x, given.y, d, seed, steps, look)
    again: dict[str, Any] = {"seed": seed, "nothing": accuracy(model, given.test)}
    count = int(given.flipped.sum())
    # suspected at the best point of each score in hindsight would be a cheat: at the second point
    suspects = {key: np.argsort(-value, kind="stable")[:count]
                for key, value in _at(history, 1, seed, d).items()}  # fmt: skip
    suspects["all flipped labels"] = np.flatnonzero(given.flipped)
    for key, left_out in suspects.items():
        keep = torch.tensor(np.setdiff1d(np.arange(d.train), left_out), device=device)
        fresh = network(d, seed, device)
        train(fresh, given.x[keep], given.y[keep], d, seed, steps)
        again[key] = accuracy(fresh, given.test)
    return rows, again


def _at(
    history: Sequence[Mapping[str, np.ndarray]], point: int, seed: int, d: Digits
) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1000 + seed).random(d.train)
    return {**history[min(point, len(history) - 1)], "random": noise}


def against_loss(rows: Sequence[Mapping[str, Any]], points: Sequence[int]) -> list[dict[str, Any]]:
    """AUROC of each score less the loss's at the same point, by seed."""
    found = []
    for epoch in points:
        for key in (k for k in SCORES if k not in ("loss", "random")):
            by = {(r["seed"], r["score"]): r["auroc"] for r in rows if r["epoch"] == epoch}
            other = "mean loss" if key.startswith("mean") else "loss"
            if key == other:
                continue
            found.append({"epoch": epoch, "score": key, "control": other, "auroc_difference": [
                by[seed, key] - by[seed, other] for seed in sorted({s for s, _ in by})
            ]})  # fmt: skip
    return found


def told(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ±{stdev(values):.3f}" if len(values) > 1 else "")


def table(record: Mapping[str, Any]) -> str:
    points = record["settings"]["points"]
    lines = ["| score | " + " | ".join(f"epoch {e}: AUROC | precision" for e in points) + " |",
             "|:--|" + ":--|:--|" * len(points)]  # fmt: skip
    for key in TABLE:
        label, cells = SCORES[key], []
        for epoch in points:
            own = [r for r in record["rows"] if (r["score"], r["epoch"]) == (key, epoch)]
            cells += [told([r[q] for r in own]) for q in ("auroc", "precision")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    fits = {e: fmean([r["flipped_learnt"] for r in record["rows"] if r["epoch"] == e])
            for e in points}  # fmt: skip
    share = record["settings"]["flipped"]
    lines += [
        "",
        f"Mean ± standard deviation over {len(record['seeds'])} seeds (split, flipped labels, "
        f"weights, order). {share:.0%} of {record['settings']['train']} training labels are "
        f"flipped; precision: share of them among the {share:.0%} most suspect. Flipped labels "
        "that the network has learnt by heart: "
        + ", ".join(f"{v:.0%} at epoch {e}" for e, v in fits.items())
        + f". The target set has {record['settings']['target']} clean examples, which the loss "
        "does not see.",
        "",
        f"Left out at epoch {points[min(1, len(points) - 1)]}, then trained anew, test accuracy: "
        + ", ".join(
            f"{key} {told([r[key] for r in record['again']])}"
            for key in record["again"][0] if key != "seed"
        ) + ".",
        "",
        common.footer(record),
    ]  # fmt: skip
    return "\n".join(lines)


def draw(record: Mapping[str, Any]) -> Any:
    """AUROC and precision over training."""
    from fastgrad.plots_base import (
        BLACK,
        BLUE,
        GREEN,
        GREY,
        ORANGE,
        PURPLE,
        VERMILION,
        new_figure,
        open_axes,
    )

    figure = new_figure(12.5, 4.4)
    axes = figure.subplots(1, 2)
    looks = {"loss": (BLACK, "o"), "norm": (BLUE, "s"), "alignment": (VERMILION, "^"),
             "cosine": (GREEN, "D"), "own class": (ORANGE, "v"), "most harmed": (PURPLE, "P"),
             "random": (GREY, "x")}  # fmt: skip
    points = record["settings"]["points"]
    for ax, what in zip(axes, ("auroc", "precision"), strict=True):
        for key in TABLE:
            colour, marker = looks[key.removeprefix("mean ")]
            values = np.array([
                [r[what] for r in record["rows"] if (r["score"], r["epoch"]) == (key, e)]
                for e in points
            ])
            mean = key.startswith("mean")
            ax.plot(points, values.mean(1), color=colour, marker=marker, ms=5,
                    ls="--" if mean else "-", mfc="white" if mean else colour,
                    label=None if mean else key)  # fmt: skip
        ax.set(xscale="log", xticks=points, xticklabels=points, xlabel="epochs trained",
               ylabel={"auroc": "AUROC of flipped labels",
                       "precision": "share flipped among the most suspect"}[what],
               ylim=(0, 1.02))  # fmt: skip
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False,
                  loc="outside right center", title="dashed: mean over\nthe points so far",
                  title_fontsize=8)  # fmt: skip
    open_axes(*axes)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.asked("mislabelled", __doc__, "small", argv)
    d, clock = FAST if ask.fast else Digits(), common.Clock()
    rows: list[dict[str, Any]] = []
    again = []
    for seed in ask.seeds:
        found, accuracies = one_seed(d, seed, ask.device)
        rows += found
        again.append(accuracies)
    record = {**common.origin(ask), "settings": asdict(d),
              "packages": {"scikit-learn": version("scikit-learn")}, "explained": SCORES,
              "rows": rows, "against_loss": against_loss(rows, d.points), "again": again,
              "seconds": clock()}  # fmt: skip
    record.pop("pretraining_seed")
    common.write(ask, record, table, draw)


if __name__ == "__main__":
    main()
