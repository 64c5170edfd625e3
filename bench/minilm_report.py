"""What the blueprints of the MiniLM checkpoint say, as text for docs/blueprint.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastgrad as fg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "minilm" / "results.json"

#: arXiv 2511.01077 takes the rank exponent of gradient norms to lie in here.
PAPER = (1.0, 2.0)


def section(path: Path = RESULTS) -> str:
    """Tables, verdicts and origin, computed from the results file."""
    data = json.loads(path.read_text())
    domains: dict[str, dict[str, Any]] = data["domains"]
    settings, env, model = data["settings"], data["environment"], data["model"]
    names = list(domains)
    rows = [
        ("texts", lambda d: d["source"]),
        ("pairs, batches", lambda d: f"{d['n_pairs']}, {d['n_batches']}"),
        ("loss", lambda d: f"{d['loss']:.3f}"),
        ("submodules: exact, without gradient, dead", _coverage),
        *((f"share of ‖g‖² in the top {float(k):.0%} of the parameters",
           lambda d, k=k: f"{d['top'][k]:.0%}") for k in domains[names[0]]["top"]),
        ("gamma of ‖g‖²", lambda d: f"{d['gamma']:.2f} {_between(d['gamma_interval'])}, off by up "
                                    f"to {d['gamma_off']:.0%}"),
        ("rank exponent of ‖g‖, all submodules", lambda d: _exponent(d["tail"])),
        ("verdict on a power law", lambda d: _verdict(d["tail"])),
        ("rank exponent, weight matrices alone", lambda d: _exponent(_as_tail(d["matrices"]))),
        ("verdict", lambda d: _verdict(_as_tail(d["matrices"]))),
        ("halves of the sample agree to", _halves),
        *((f"k* for {name}", lambda d, name=name: _k_star(d["k_star"].get(name)))
          for name in domains[names[0]]["k_star"]),
    ]  # fmt: skip
    table = [
        "| | " + " | ".join(names) + " |",
        "|:--|" + ":--|" * len(names),
        *("| " + label + " | " + " | ".join(of(domains[n]) for n in names) + " |"
          for label, of in rows),
    ]  # fmt: skip
    stale = [
        "| blueprint of | sample of | verdict | Spearman | weighted tau | top-20 % Jaccard |",
        "|:--|:--|:--|--:|--:|--:|",
        *(_comparison(row) for row in data["staleness"]),
    ]
    return "\n".join([
        *table, "", _largest(domains) + _rounding(names), "", _power_law(domains), "", *stale, "",
        "In brackets: the same statistic between halves of a sample, the lower of the two. "
        "Asked which domain fresh pairs are most like, the file with both domains says "
        + "; ".join(f"of {name}: {' + '.join(n['tags']) or 'none'}, {n['verdict']} ({n['reason']})"
                    for name, n in data["nearest"].items()) + ".",
        "", _far(data["other"]) + " " + _drift(data["staleness"], data["other"]), "",
        f"{model['class']} `{model['name']}`, {model['n_parameters']:,} parameters, weights "
        f"`{model['weights_hash'][:23]}`; {settings['pairs']} pairs in a batch, texts of at most "
        f"{settings['tokens']} tokens, seed {settings['seed']}. {env['date']}, "
        f"{env['processor']}, {env['threads']} threads, {data['seconds']:.0f} s in all, "
        f"{data['cpu_seconds']:.0f} s of processor "
        f"time; Python {env['python']}, torch {env['torch']}, transformers {env['transformers']}; "
        "`python bench/minilm_blueprint.py`.",
    ])  # fmt: skip


def _coverage(domain: dict[str, Any]) -> str:
    c = domain["coverage"]
    missing = f", {c['missing']} missing" if c["missing"] else ""
    return f"{c['exact']}, {c['unused']}, {len(domain['dead'])}{missing}"


def _between(ends: list[float | None]) -> str:
    return "" if None in ends else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def _as_tail(fit: dict[str, Any]) -> dict[str, Any]:
    return fit | {"exponent": fit["rank_exponent"], "interval": fit["rank_interval"]}


def _exponent(tail: dict[str, Any]) -> str:
    if tail["exponent"] is None:
        return "none"
    return (f"{tail['exponent']:.2f} {_between(tail['interval'])}, tail of {tail['n_tail']} of "
            f"{tail['n']}")  # fmt: skip


def _verdict(tail: dict[str, Any]) -> str:
    return f"**{tail['verdict'].replace('_', ' ')}**: {tail['reason']}"


def _halves(domain: dict[str, Any]) -> str:
    h = domain["split_half"]
    return (f"Spearman {h['spearman']:.2f}, weighted tau {h['weighted_tau']:.2f}, Jaccard "
            f"{h['top_jaccard']:.2f}")  # fmt: skip


def _k_star(k: dict[str, Any] | None) -> str:
    if k is None:
        return "none"
    kept = "" if k["curve_share"] is None else f", keeps {k['curve_share']:.0%}"
    warning = " (over-aggressive)" if k["over_aggressive"] else ""
    return f"{k['value']:.1%}{kept}{warning}"


def _largest(domains: dict[str, dict[str, Any]]) -> str:
    return "Largest shares of ‖g‖². " + " ".join(
        f"{name[0].upper() + name[1:]}: "
        + ", ".join(f"`{s['name']}` {s['share']:.1%}" for s in d["largest"][:3]) + "."
        for name, d in domains.items()
    )  # fmt: skip


def _rounding(names: list[str]) -> str:
    """Key biases: softmax does not change where the same is added to all logits of a query, so
    their gradient is zero but for rounding, which is what ``dead`` has to find."""
    found: list[float] = []
    missed: list[str] = []
    for name in names:
        file = fg.Blueprint.from_pretrained(ROOT / "docs" / "examples" / f"minilm-{name}")
        norms = {s.name: s.grad_norm for s in file.submodules if s.grad_norm}
        keys = [n for n in norms if n.endswith("key.bias")]
        found += [norms[n] / max(norms.values()) for n in keys]
        missed += [n for n in keys if n not in file.dead]
    if not found:
        return ""
    text = (
        f" The biases of the keys ({len(found) // len(names)} of them) have no gradient in exact "
        "arithmetic, since softmax does not change when a query's logits all grow by the same; "
        f"what is measured, {max(found):.0e} of the largest norm at most, is rounding"
    )
    if missed:
        return text + f", and {len(missed)} of these measurements were not told from a gradient."
    return text + ", and they are among the dead."


def _power_law(domains: dict[str, dict[str, Any]]) -> str:
    """The paper's assumption beside what was found."""
    fits = [
        (f"{name}, {what}", tail) for name, d in domains.items()
        for what, tail in (("all submodules", d["tail"]), ("matrices", _as_tail(d["matrices"])))
    ]  # fmt: skip
    inside = [label for label, t in fits
              if t["exponent"] is not None and PAPER[0] < t["exponent"] < PAPER[1]]  # fmt: skip
    supported = [label for label, t in fits if t["verdict"] == "supported"]
    text = (
        f"The paper assumes a power law with a rank exponent between {PAPER[0]:g} and "
        f"{PAPER[1]:g}. Of the {len(fits)} fits, {_named(inside)} "
        f"{'has' if len(inside) == 1 else 'have'} an exponent in that range; {_named(supported)} "
        f"{'support' if len(supported) > 1 else 'supports'} a power law."
    )
    if set(inside) & set(supported):
        return text
    return text + " So this checkpoint does not bear the assumption out."


def _named(labels: list[str]) -> str:
    return f"{len(labels)} ({'; '.join(labels)})" if labels else "none"


def _comparison(row: dict[str, Any]) -> str:
    cells = []
    for key in ("spearman", "weighted_tau", "top_jaccard"):
        halves = [h[key] for h in (row["local"], row["released"]) if h is not None]
        value = "–" if row[key] is None else f"{row[key]:.2f}"
        cells.append(value + (f" ({min(halves):.2f})" if halves else ""))
    return (f"| {row['blueprint']} | {row['sample']} | **{row['verdict']}** | "
            f"{' | '.join(cells)} |")  # fmt: skip


_STATISTICS = (("Spearman", "spearman"), ("weighted tau", "weighted_tau"),
               ("the top 20 %", "top_jaccard"))  # fmt: skip


def _less(row: dict[str, Any], key: str) -> bool:
    """Whether a statistic, as printed, is below that between halves of the less sure sample."""
    halves = [h[key] for h in (row["local"], row["released"]) if h is not None]
    return row[key] is not None and bool(halves) and round(row[key], 2) < round(min(halves), 2)


def _far(far: dict[str, Any]) -> str:
    return (f"The third sample, {far['source']}: {far['n_pairs']} of {far['n_pairs_in_source']} "
            f"pairs in {far['n_batches']} batches, loss {far['loss']:.3f}.")  # fmt: skip


def _drift(rows: list[dict[str, Any]], far: dict[str, Any]) -> str:
    """What was found between domains: among the two measured in full, and with the third."""
    across = [r for r in rows if "half" not in r["blueprint"]]
    said = []
    for what, some in (
        ("Between code and prose", [r for r in across if r["sample"] != far["name"]]),
        (f"For the {far['name']}, which are not about Python,",
         [r for r in across if r["sample"] == far["name"]]),
    ):  # fmt: skip
        verdicts = {r["verdict"] for r in some}
        if verdicts == {"fresh"}:
            less = [label for label, key in _STATISTICS if any(_less(r, key) for r in some)]
            said.append(f"{what} the verdict is fresh: " + (
                f"within the tolerances, though {', '.join(less)} agree less than between "
                "halves of one sample." if less else
                "ranks agree no less than between halves of one sample."))  # fmt: skip
        elif verdicts == {"drifted"}:
            said.append(f"{what} the verdict is drifted: such a blueprint should not choose what "
                        "is trained there.")  # fmt: skip
        else:
            said.append(f"{what}: " + "; ".join(
                f"blueprint of {r['blueprint']} for {r['sample']}: {r['verdict']}, {r['reason']}"
                for r in some) + ".")  # fmt: skip
    if {r["verdict"] for r in across} == {"fresh"}:
        said.append(
            "So where this model's gradient is depends little on what the texts are about, and by "
            "these tolerances a blueprint of either would do for all three."
        )
    return " ".join(said)


__all__ = ["section"]
