"""docs/coverage.md: which model is exact in which situation, found out by running the checks.

python -m tests.coverage_matrix            print the page
python -m tests.coverage_matrix --write    write it
python -m tests.coverage_matrix --check    compare what it says with what is; exit 1 if they differ
python -m tests.coverage_matrix llama t5   print the part on these models
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tests.conftest  # noqa: F401  (the same threads and silence as under pytest)
from tests.exactness import Outcome, check
from tests.scenarios import SCENARIOS
from tests.zoo import ZOO

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
Matrix = Mapping[str, Mapping[str, Outcome]]

HEAD = """\
# What is exact

Written by `python -m tests.coverage_matrix --write`, and compared with what the checks find by
`tests/test_zoo.py`: do not edit it.

Each cell is one run of a small random model with Hugging Face's own code for that architecture
(`tests/zoo.py`). The probe's numbers (`T` at both scales, block norms, gradient norms, label
tokens) are compared with one example at a time, for every parameter.

| cell | meaning |
|---|---|
| exact | every parameter is measured and agrees; the number is the worst relative error |
| contribution | examples meet in the loss, and the probe says so: see "router loss" |
| missing | the probe names parameters that it cannot measure, listed below; all others agree |
| refused | the probe raises an error of its own that says why |
| wrong | the probe calls something exact that is not: a bug |
| fails | the probe breaks with some other error: a bug |
| mixes | the model itself lets the examples of such a batch see each other, without any probe |
| – | does not apply to this model |

In float32 the error allowed is 1e-4 of the largest example's norm. In bfloat16 and float16 it is
one unit in the last place and twice the distance between the rounded and the float32 gradient of
the same example: both sides round, and neither can be nearer than that.
"""


def measured(models: Iterable[str]) -> Matrix:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {m: {s: check(ZOO[m], s) for s in SCENARIOS} for m in models}


# -- the page ----------------------------------------------------------------------------------


def page(matrix: Matrix) -> str:
    parts = [HEAD]
    for group, title in (("data", "Kinds of data"), ("training", "Ways to train")):
        names = [n for n, s in SCENARIOS.items() if s.group == group]
        parts += [f"## {title}\n", _table(matrix, names)]
        parts += ["\n".join(f"- **{n}**: {SCENARIOS[n].meaning}" for n in names) + "\n"]
    notes = {m: _notes(row) for m, row in matrix.items()}
    parts.append("## What is not exact, and why\n")
    parts += [f"**{m}**\n\n" + "\n".join(lines) + "\n" for m, lines in notes.items() if lines]
    if not any(notes.values()):
        parts.append("Nothing: every cell that applies is exact.\n")
    return "\n".join(parts)


def _table(matrix: Matrix, names: Sequence[str]) -> str:
    lines = [("model", *names), ("---",) * (len(names) + 1)]
    lines += [(m, *(_cell(row[n]) for n in names)) for m, row in matrix.items()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _cell(outcome: Outcome) -> str:
    agrees = outcome.status in ("exact", "contribution")
    return f"{outcome.status} {outcome.error:.0e}" if agrees else outcome.status


def _notes(row: Mapping[str, Outcome]) -> list[str]:
    """One line for each reason, with all scenarios that it holds in."""
    found: dict[str, list[str]] = {}
    for name, outcome in row.items():
        for reason in _reasons(outcome):
            found.setdefault(reason, []).append(name)
    return [f"- {', '.join(names)}: {reason}" for reason, names in found.items()]


def _reasons(outcome: Outcome) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in outcome.missing.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"missing {_some(names)}: {reason}" for reason, names in by_reason.items()]
    if outcome.detail:
        lines.append(f"{outcome.status}: {outcome.detail}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{n}`" for n in names[:3]) + more


def documented() -> dict[str, dict[str, str]]:
    """Model -> scenario -> status, as the page has it."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in PAGE.read_text().splitlines():
        first, *cells = [c.strip() for c in line.strip("|").split("|")]
        if first == "model":
            columns = cells
        elif len(cells) == len(columns) > 1 and not first.startswith("---"):
            statuses = (c.split()[0] for c in cells)
            found.setdefault(first, {}).update(zip(columns, statuses, strict=True))
    return found


# -- the command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.coverage_matrix", description=__doc__.splitlines()[0]
    )
    parser.add_argument("models", nargs="*", metavar="model", help="only these")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    what.add_argument("--check", action="store_true", help=f"compare with {PAGE.name}")
    options = parser.parse_args(arguments)
    unknown = set(options.models) - set(ZOO)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; the zoo has {', '.join(ZOO)}")
    if options.models and options.write:
        parser.error("the page has all models: --write takes none")
    matrix = measured(options.models or ZOO)
    if options.check:
        said = documented()
        drift = [
            f"{m}, {s}: the page says {said.get(m, {}).get(s, 'nothing')}, it is {outcome.status}"
            for m, row in matrix.items()
            for s, outcome in row.items()
            if said.get(m, {}).get(s) != outcome.status
        ]
        print("\n".join(drift) or f"{PAGE.name} is right")
        return int(bool(drift))
    if options.write:
        PAGE.write_text(page(matrix))
    else:
        print(page(matrix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
