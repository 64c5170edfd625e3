"""What the callback costs, for docs/blueprint.md, out of ``results/callback_cost.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "evaluation": "evaluation, forward without gradients",
    "forward and backward": "forward and backward",
    "measuring, norms alone": "measuring, norms alone (`per_example=False`)",
    "measuring": "measuring, each example's influence too (the default)",
}


def section() -> str:
    data = json.loads((RESULTS / "callback_cost.json").read_text())
    size, env, readings = data["size"], data["environment"], data["readings"]
    parts = {p["name"]: p for p in data["same_batches"]}
    evaluation = parts["evaluation"]["seconds"]
    lines = [
        "| the same batches | by forward and backward (quartiles) | by evaluation |",
        "|:--|--:|--:|",
    ]
    for name, shown in NAMES.items():
        p = parts[name]
        spread = "" if p["low"] == p["high"] else f" ({p['low']:.2f}–{p['high']:.2f})"
        lines.append(f"| {shown} | {p['ratio']:.2f}{spread} | {p['seconds'] / evaluation:.2f} |")
    default, one, share = data["runs"]

    def row(what: str, value: float, digits: int = 3) -> str:
        verdict = "met" if value <= data["aim"] else "**missed**"
        return f"| {what} | {100 * value:.{digits}g} % | {verdict} |"

    def run(r: dict[str, Any]) -> str:
        return (
            f"{r['measurements']} x {r['measured_batches']} batches beside {r['evaluations']} "
            f"evaluations of {r['evaluated_batches']}"
        )

    threads = "one thread" if env["threads"] == 1 else f"{env['threads']} threads"
    idle = readings["the idle callback in a whole run"]
    lines += [
        "",
        f"| the callback by evaluation, in a whole run | | aim: {100 * data['aim']:g} % |",
        "|:--|--:|:--|",
        row(f"`evaluation_share={data['aim']}`: {run(share)}", share["share"]),
        row(f"the default: {run(default)}", default["share"], 2),
        row(
            "of that, beyond the forward and backward passes",
            readings["what it adds to its passes in a whole run, defaults"],
            2,
        ),
        row(f"`examples=1`: {run(one)}", one["share"], 2),
        row(f"where nothing is due: {data['idle_seconds'] * 1e6:.1f} µs a step", idle, 1),
        "",
        "In the first of these runs a measured batch took "
        f"{readings['evaluated examples that a measured one took in it']:.2f} evaluated ones, all "
        f"that the callback does included, and is planned with {data['planned_cost']:g}. What does "
        "not grow with the batches, on that run's model: "
        + "; ".join(f"{name} {1e3 * s:.0f} ms" for name, s in data["fixed_seconds"].items())
        + ". The default costs 2 % where evaluations read about "
        f"{readings['evaluated batches for which defaults cost 2 %']:,.0f} batches in all. "
        f"Batches of {size['rows']} x {size['tokens']} tokens; {size['layers']} layers of width "
        f"{size['width']}, the run's model {size['run_layers']} of width {size['run_width']}; "
        f"one run of each kind, processor time on {threads}. "
        f"{env['date']}, {env['processor']}, torch {env['torch']}; `{data['command']}`.",
    ]
    return "\n".join(lines)
