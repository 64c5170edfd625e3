"""Put the committed results into the README: every figure there comes from a results file.

python bench/readme.py                          # rewrite the sections between the markers
python bench/readme.py --take quickstart-out    # first take over a run of make quickstart
python bench/readme.py --check                  # exit 1 if the README is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURE = "quickstart.png"


def step_overhead() -> str:
    data = json.loads((RESULTS / "step_overhead.json").read_text())
    env, settings = data["environment"], data["settings"]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in data["rows"]:
        rows.setdefault(row["step"], {})[row["tokens"]] = row
    tokens = settings["tokens"]
    examples = {t: next(iter(rows.values()))[t]["examples"] for t in tokens}
    lines = [
        "Time of forward and backward pass, as a multiple of the plain step (median of "
        f"{settings['rounds']} interleaved rounds, quartiles in brackets):",
        "",
        "| step | " + " | ".join(f"{examples[t]} x {t} tokens" for t in tokens) + " |",
        "|---|" + "---|" * len(tokens),
    ]
    for name, by_tokens in rows.items():
        cells = [
            f"{r['ratio']:.2f} ({r['low']:.2f}–{r['high']:.2f})" if (r := by_tokens.get(t)) else "–"
            for t in tokens
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Llama architecture, {settings['layers']} layers of width {settings['width']}; "
        f"{env['date']}, {env['processor']}, {env['threads']} threads, torch {env['torch']}; "
        f"`python bench/step_overhead.py --rounds {settings['rounds']}`.",
    ]
    return "\n".join(lines)


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


SECTIONS: dict[str, Callable[[], str]] = {"quickstart": quickstart, "step-overhead": step_overhead}


def rendered(text: str) -> str:
    """The README with every section made anew from its results file."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md lacks the markers of section {name}")
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        body = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", type=Path, metavar="DIR", help="a quickstart's output folder")
    args = parser.parse_args()
    if args.take:
        take(args.take)
    path = ROOT / "README.md"
    text = path.read_text()
    new = rendered(text)
    if args.check:
        sys.exit(0 if new == text else "README.md is out of date: run python bench/readme.py")
    path.write_text(new)


if __name__ == "__main__":
    main()
