"""Put the committed results into README and docs: every figure there comes from a results file.

python bench/readme.py                          # rewrite the sections between the markers
python bench/readme.py --take quickstart-out    # first take over a run of make quickstart
python bench/readme.py --compile                # first compile every kernel anew (two minutes)
python bench/readme.py --check                  # exit 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import callback_report
import minilm_report
import roofline
from fastgrad_kernels.compile_check import Facts, check, markdown
from timing import environment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURE = "quickstart.png"
MODELS = {"llama": "Llama", "bert": "BERT, tied weights"}


def step_overhead() -> str:
    """One line per model and batch: each contender's time and memory over the plain step's."""
    data = json.loads((RESULTS / "step_overhead.json").read_text())
    env, settings = data["environment"], data["settings"]
    rows = {(r["model"], r["tokens"], r["step"]): r for r in data["rows"]}
    steps = list(dict.fromkeys(r["step"] for r in data["rows"] + data["absent"]))[1:]  # not plain
    lines = [
        "Time / peak memory of forward and backward pass, as multiples of the plain step's; for T "
        "per parameter with the quartiles of its time:",
        "",
        f"| model | examples x tokens | {' | '.join(steps)} |",
        "|:--|:--|" + "--:|" * len(steps),
    ]
    for r in data["rows"]:
        if r["step"] == "plain step":
            found = (rows.get((r["model"], r["tokens"], step)) for step in steps)
            cells = [f"{r['examples']} x {r['tokens']}", *map(_overhead, found)]
            lines.append(f"| {MODELS[r['model']]} | {' | '.join(cells)} |")
    missed = any(r["misses"] for r in data["rows"])
    alone = bool(settings.get("cpu_time"))
    lines += [
        "",
        f"The aim for gradient norms and T per parameter: at most {settings['aim']:.2f} in both "
        "and no slower than a peer (quartiles apart); "
        + ("**bold** cells miss it. " if missed else "all meet it. ")
        + f"{settings['layers']} layers of width {settings['width']}; median of "
        f"{settings['rounds']} interleaved rounds"
        + (", processor time on one thread" if alone else "")
        + ". Memory: most bytes of tensors alive beyond "
        "those before the step, gradients included; the larger ratio of the batch shown, where "
        f"the loss's logits make the peak, and of {settings['small']} examples of it, where the "
        "gradients may. Opacus refuses tied weights: its BERT has an output layer of its own. "
        "torch.func holds every example's gradient at once. "
        + "".join(f"No {a['step']} for {_shape(a)}: {a['why']}. " for a in data["absent"])
        + f"{env['date']}, {env['processor']}, {_threads(env)}, torch {env['torch']}; "
        f"`python bench/step_overhead.py --rounds {settings['rounds']}"
        + (" --cpu-time`." if alone else "`."),
        *_by_the_clock(),
    ]
    return "\n".join(lines)


def _by_the_clock() -> list[str]:
    """The rows that were also timed by the clock on all threads, where that is dearer."""
    path = RESULTS / "step_overhead_clock.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    env, settings = data["environment"], data["settings"]
    rows = [r for r in data["rows"] if r["step"] == "T, per parameter"]
    found = ", ".join(
        f"{_shape(r)}: {r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})"
        + (", above the aim" if r["misses"] else "")
        for r in rows
    )
    return [
        "",
        f"By the clock on {_threads(env)}, T per parameter: {found}. {env['date']}, "
        f"{env['processor']}, torch {env['torch']}; `python bench/step_overhead.py --tokens "
        f"{' '.join(map(str, settings['tokens']))} --rounds {settings['rounds']}`.",
    ]


def _threads(env: dict[str, Any]) -> str:
    return "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"


def _overhead(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    time = f"{row['ratio']:.2f}"
    if row["step"] == "T, per parameter":
        time = f"{row['ratio']:.3f} ({row['low']:.2f}–{row['high']:.2f})"
    cell = f"{time} / {max(row['memory'], row['memory_small'] or 0):.2f}"
    return f"**{cell}**" if row["misses"] else cell


def _shape(row: dict[str, Any]) -> str:
    return f"{MODELS[row['model']]}, {row['examples']} x {row['tokens']}"


def quickstart() -> str:
    folder = RESULTS / "quickstart"
    text = (folder / "results.md").read_text().strip()
    return text.replace(f"]({FIGURE})", f"]({(folder / FIGURE).relative_to(ROOT)})")


def take(run: Path) -> None:
    """Keep what a quickstart run found: table, figure and all numbers."""
    target = RESULTS / "quickstart"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("results.md", "results.json", FIGURE):
        shutil.copyfile(run / name, target / name)


def registers() -> str:
    """What the compiler made of the kernels, from the last --compile."""
    data = json.loads((RESULTS / "compile.json").read_text())
    facts = [Facts(**f) for f in data["facts"]]
    return (
        f"{data['environment']['date']}, triton {data['environment']['triton']}, "
        f"`python bench/readme.py --compile`:\n\n{markdown(facts)}"
    )


def compile_all() -> None:
    data = {"environment": environment(), "facts": [asdict(f) for f in check()]}
    for f in data["facts"]:
        f["seconds"] = 0.0  # of no interest, and never the same twice
    (RESULTS / "compile.json").write_text(json.dumps(data, indent=1) + "\n")


def roofline_floors() -> str:
    return roofline.table()


def roofline_predictions() -> str:
    return roofline.predictions()


def gpu_gate() -> str:
    """The gate's table, or that there is none: no figure without a measurement."""
    path = RESULTS / "gpu_gate.json"
    if not path.exists():
        return (
            "**No card has run or timed these kernels yet.** `python bench/gpu_gate.py` on a "
            "machine with a GPU checks them and writes the table that belongs here."
        )
    data = json.loads(path.read_text())
    env = data["environment"]
    right = sum(c["ok"] for c in data["checks"])
    lines = [
        f"{env.get('gpu', env['device'])}, driver {env.get('driver', 'unknown')}, torch "
        f"{env['torch']}, triton {env.get('triton', 'none')}, {env['date']}, commit "
        f"`{env['commit'][:10]}`; {right} of {len(data['checks'])} checks passed; median of "
        f"{env['rounds']} interleaved rounds, quartiles in brackets; `python bench/gpu_gate.py`.",
        "",
        "| measured | against | ratio | aim | ours, ms |",
        "|---|---|---|---|---|",
    ]
    for r in data["rows"]:
        aim = "–"
        if r["aim"] is not None:
            sign, met = ("≥" if r["at_least"] else "≤"), ("met" if r["met"] else "**missed**")
            aim = f"{sign} {r['aim']:g}, {met}"
        spread = f"{r['ratio']:.3f} ({r['low']:.3f}–{r['high']:.3f})"
        cells = (r["measured"], r["against"], spread, aim, f"{r['ours'] * 1e3:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _peers(name: str) -> list[str]:
    """The report of bench/finetune_arms.py, paragraph by paragraph, its figure where pages of the
    folder ``name`` find it."""
    text = (RESULTS / "finetune_arms" / "results.md").read_text()
    return text.replace("](", f"]({name}bench/results/finetune_arms/").strip().split("\n\n")


def peers_in_short() -> str:
    """The table, the aim and the origin."""
    parts = _peers("")
    table, origin = parts[0], parts[-1]
    aim = next(part for part in parts if part.startswith("**Aim"))
    figure = next(part for part in parts if part.startswith("!["))
    return "\n\n".join([table, aim, figure, origin])


def peers() -> str:
    return "\n\n".join(_peers("../"))


def optimizer_step() -> str:
    """Each contender's step over the peer's."""
    data = json.loads((RESULTS / "optim_step.json").read_text())
    env, settings = data["environment"], data["settings"]
    lines = [
        "| step | trained | weights | time | quartiles | aim |",
        "|:--|--:|:--|--:|:--|:--|",
    ]
    for dtype, rows in data["rows"].items():
        for r in rows:
            if r["ratio"] == 1 and r["aim"] is None and r["share"] == 1 and "AdamW" in r["step"]:
                continue
            aim = "–" if r["aim"] is None else (
                f"≤ {r['aim']:.2f}, {'met' if r['met'] else '**missed**'}"
            )  # fmt: skip
            lines.append(
                f"| {r['step']} | {r['share']:.1%} | {dtype} | {r['ratio']:.3f} | "
                f"{r['low']:.3f}–{r['high']:.3f} | {aim} |"
            )
    lines += [
        "",
        "Time of one step as a multiple of `torch.optim.AdamW(fused=True)` on all weights in "
        "float32; median of "
        f"{settings['rounds']} interleaved rounds"
        + (", processor time on one thread" if settings["cpu_time"] else "")
        + f". {env['date']}, {env['processor']}, {_threads(env)}, torch {env['torch']}; "
        f"`python bench/optim_step.py --rounds {settings['rounds']}"
        + (" --cpu-time`." if settings["cpu_time"] else "`."),
        "",
        "| whole training step, all weights trained | time | quartiles |",
        "|:--|--:|--:|",
        *(
            f"| {r['step'].removesuffix(', all weights')} | {r['ratio']:.3f} | "
            f"{r['low']:.3f}–{r['high']:.3f} |"
            for r in data["training"]
        ),
        "",
        "Forward and backward pass and update of the Llama model of `bench/step_overhead.py`, "
        f"{settings['examples']} x {settings['tokens']} tokens; the same run.",
    ]
    return "\n".join(lines)


def partial_step() -> str:
    """A training step with a share of the weights trained over one with all."""
    data = json.loads((RESULTS / "partial_step.json").read_text())
    env, settings = data["environment"], data["settings"]
    lines = [
        "| model | trained | share | step | quartiles | forward and backward | operations | "
        "saved bytes | gradients and moments |",
        "|:--|:--|--:|--:|:--|--:|--:|--:|--:|",
    ]
    for r in data["rows"]:
        if r["fraction"] < 1:
            lines.append(
                f"| {MODELS[r['model']]} | {r['contender'].rsplit(' ', 1)[0]} | "
                f"{r['fraction']:.1%} | {r['ratio']:.2f} | {r['low']:.2f}–{r['high']:.2f} | "
                f"{r['backward_ratio']:.2f} | {r['flop_ratio']:.2f} | {r['saved_ratio']:.2f} | "
                f"{r['kept_ratio']:.3f} |"
            )
    lines += [
        "",
        "Multiples of the step that trains all weights with `torch.optim.AdamW(fused=True)`: time "
        "of the whole step and of its forward and backward pass, products counted by "
        "`FlopCounterMode`, bytes that the graph holds after the forward pass, bytes of gradients "
        f"and optimizer state. {settings['layers']} layers of width {settings['width']}, "
        f"{settings['examples']} x {settings['tokens']} tokens, median of {settings['rounds']} "
        f"interleaved rounds. {env['date']}, {env['processor']}, {_threads(env)}, torch "
        f"{env['torch']}; `python bench/partial_step.py`.",
    ]
    return "\n".join(lines)


def plan_start() -> str:
    """One line per model: seconds of the command and of the import alone."""
    data = json.loads((RESULTS / "plan_start.json").read_text())
    env, rows = data["environment"], {(r["model"], r["what"]): r for r in data["rows"]}
    names, columns = (list(dict.fromkeys(key)) for key in zip(*rows, strict=True))
    cells = {k: f"{r['seconds']:.1f} ({r['cpu_seconds']:.1f})" for k, r in rows.items()}
    plans = [r["seconds"] for r in data["rows"] if r["what"] != columns[-1]]
    met = "met" if max(plans) < data["aim_seconds"] else "missed"
    lines = [
        f"| seconds (processor time) | {' | '.join(columns)} |",
        "|:--|" + "--:|" * len(columns),
        *(f"| {name} | {' | '.join(cells[name, c] for c in columns)} |" for name in names),
        "",
        "From the start of the process to its end, with nothing but a config.json; the slowest "
        f"takes {max(plans):.1f} s (aim: under {data['aim_seconds']:g} s, {met}). The import "
        "alone: a process that imports transformers' module of the model and does nothing else. "
        f"The fastest of {data['runs']} runs. {env['date']}, {env['processor']}, 1 thread, torch "
        f"{env['torch']}, transformers {env['transformers']}; `python bench/plan_start.py --runs "
        f"{data['runs']}`.",
    ]
    return "\n".join(lines)


def joint_cost() -> str:
    """What the joint choice takes at the size of the aim, a sentence."""
    data = json.loads((RESULTS / "joint_cost.json").read_text())
    env, settings, aim = data["environment"], data["settings"], data["aim"]
    met = all(r["seconds"] <= aim["seconds"] and r["peak_bytes"] <= aim["bytes"]
              for r in data["rows"])  # fmt: skip
    found = "; ".join(
        f"`{r['strategy']}` {r['seconds']:.0f} s and {r['peak_bytes'] / 2**30:.2f} GiB"
        for r in data["rows"]
    )
    return (
        f"{settings['blocks']:,} blocks x {settings['examples']:,} examples of generated "
        f"heavy-tailed influence, float32 in a file that the system holds in its cache: {found} at "
        f"most (aim: {aim['seconds']:.0f} s and {aim['bytes'] / 2**30:.0f} GiB on 2 cores, "
        f"{'met' if met else '**missed**'}). {env['date']}, {env['processor']}, {_threads(env)}, "
        f"torch {env['torch']}, NumPy {env['numpy']}; `python bench/joint_cost.py`."
    )


def experiment(name: str) -> Callable[[], str]:
    """Table and figure of ``bench/experiments/<name>.py``."""

    def section() -> str:
        table = (RESULTS / "experiments" / f"{name}.md").read_text().strip()
        return f"{table}\n\n![{name}](../bench/results/experiments/{name}.png)"

    return section


# Those with committed results; docs/findings.md has a section of each.
EXPERIMENTS = ("distribution", "partial_update", "transfer", "joint", "proxy", "mislabelled")

PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "quickstart": quickstart, "peers": peers_in_short, "step-overhead": step_overhead,
    },
    "docs/train.md": {
        "peers": peers, "optimizer-step": optimizer_step, "partial-step": partial_step,
    },
    "docs/selection.md": {"plan-start": plan_start},
    "docs/influence.md": {"joint-cost": joint_cost},
    "docs/findings.md": {name: experiment(name) for name in EXPERIMENTS},
    "docs/blueprint.md": {
        "callback-cost": callback_report.section, "minilm": minilm_report.section,
    },
    "docs/kernels.md": {
        "gpu-gate": gpu_gate,
        "roofline": roofline_floors,
        "predictions": roofline_predictions,
        "registers": registers,
    },
}


def rendered(page: str, text: str) -> str:
    """A page with every section made anew from its results file."""
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{page} lacks the markers of section {name}")
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        body = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile every kernel first")
    parser.add_argument("--take", type=Path, metavar="DIR", help="a quickstart's output folder")
    args = parser.parse_args()
    if args.take:
        take(args.take)
    if args.compile:
        compile_all()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = rendered(page, text)
        if args.check and new != text:
            sys.exit(f"{page} is out of date: run python bench/readme.py")
        if not args.check:
            path.write_text(new)


if __name__ == "__main__":
    main()
