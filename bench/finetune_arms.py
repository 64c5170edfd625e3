"""Against the peers: one model, the same batches in the same order, and every way to train it.

    python bench/finetune_arms.py                # three seeds, about twenty minutes on two cores
    python bench/finetune_arms.py --fast         # small model, two seeds, under three minutes
    python bench/finetune_arms.py --only submodules lora galore      # full tuning is always there

The quickstart's model and texts: a Llama learns Python source and is adapted to English prose.
Each arm runs in a process of its own, once for each training seed; it tries the same number of
learning rates, keeps the best on the validation part, and reads the test rows with that one. A
run that was interrupted goes on where it stopped: finished arms lie in the work folder, with the
commit that they ran on. Remove the folder after a change of the code that is compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import arms_report as report
import arms_setup
from arms_peers import missing
from arms_verdict import Verdict, aim
from fastgrad.blueprint_schema import finite_or_none
from fastgrad.errors import FastgradError
from fastgrad.files import atomic_path, write_text
from fastgrad.quickstart.report import machine
from fastgrad.quickstart.run import Quickstart
from fastgrad.quickstart.settings import FRACTION, SIDE_BY_SIDE, THREADS, Arm, Settings, Spec, cores
from fastgrad.quickstart.supervise import run_arm
from timing import environment

HERE = Path(__file__).parent
WORKER = (str(HERE / "arms_worker.py"),)
PRETRAINING_SEED = 0
LOCAL_SEED = 1000  # the local sample's rows are drawn apart from the order of training


class Comparison:
    """All runs, and what was found so far."""

    def __init__(
        self, output: Path, settings: Settings, seeds: Sequence[int], console: Console
    ) -> None:
        self.settings, self.seeds, self.console = settings, seeds, console
        self.output = output.resolve()
        self.base = Quickstart(output, settings, PRETRAINING_SEED, console)
        self.runs = self.output / "runs"
        self.commit = str(environment()["commit"])
        self.running: list[subprocess.Popen[str]] = []

    # -- the model and what is known about it --------------------------------------------

    def model(self) -> None:
        """Pretrain, or take over what an interrupted run has left."""
        mark = self.output / "model.json"
        wanted = json.dumps({"settings": vars(self.settings), "seed": PRETRAINING_SEED}, indent=1)
        if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
            self.console.print("  model: from an earlier run in this folder")
            return
        mark.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        for old in self.runs.glob("*.json"):  # of another model
            old.unlink()
        self.base.corpus()
        self.base.pretrain()
        write_text(mark, wanted)

    def sources(self) -> None:
        """Losses before adaptation; a blueprint by rows; each seed's local sample."""
        from safetensors.torch import load_file
        from transformers import LlamaForCausalLM

        from fastgrad import Blueprint
        from fastgrad.integrations.transformers import measure
        from fastgrad.quickstart.measure import row_losses
        from fastgrad.quickstart.pretrain import batches
        from fastgrad.quickstart.worker import data_order

        settings, data = self.settings, load_file(self.base.data_file)
        size, count = settings.probe_rows, settings.probe_batches
        model = LlamaForCausalLM.from_pretrained(self.base.model_dir, dtype=torch.float32)
        model.config.use_cache = False
        self.before = {
            part: float(row_losses(model, data[part], settings.rows).mean())
            for part in ("prose_valid", "prose_test", "code_test")
        }
        self.total = sum(p.numel() for p in model.parameters())
        self.test_rows = len(data["prose_test"])
        by_row, _ = measure(model, batches(data["code_valid"], size, count), blocks="row")
        Blueprint.from_stats(by_row, model=model).save_pretrained(self.released("row"))
        rows = data["prose_train"]
        for seed in self.seeds:
            sample = data_order(len(rows), size * count, 1, LOCAL_SEED + seed)[0]
            for blocks in ("row", settings.tile):
                local, _ = measure(model, batches(rows[sample], size, count), blocks=blocks)
                local.save(self.local(blocks, seed))

    def released(self, blocks: str) -> Path:
        """Folder of the blueprint with this detail."""
        return self.output / "released-rows" if blocks == "row" else self.base.model_dir

    def local(self, blocks: str, seed: int) -> Path:
        return self.output / f"local-{blocks}-{seed}.safetensors"

    # -- runs ----------------------------------------------------------------------------

    def spec(self, arm: Arm, seed: int) -> Spec:
        blocks = arms_setup.granularity(arm, self.settings)
        return Spec(
            arm=arm, settings=self.settings, seed=seed, fraction=FRACTION,
            model=self.base.model_dir, data=self.base.data_file, local=self.local(blocks, seed),
            result=self.runs / f"{arm.key}-{seed}.json", released=self.released(blocks),
        )  # fmt: skip

    def earlier(self, spec: Spec) -> dict[str, Any] | None:
        """The result of exactly this run, if it was finished before."""
        told = spec.result.with_suffix(".spec.json")
        if not (spec.result.exists() and told.exists()):
            return None
        if json.loads(told.read_text(encoding="utf-8")) != json.loads(json.dumps(spec.as_json())):
            return None
        found: dict[str, Any] = json.loads(spec.result.read_text(encoding="utf-8"))
        return found if "commit" in found else None

    def run_all(
        self, plan: Sequence[Arm]
    ) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, str]]]:
        """Results by arm for every seed, and the arms that did not run, with the reason."""
        self.runs.mkdir(parents=True, exist_ok=True)
        why = {arm.key: reason for arm in plan if (reason := missing(arm.kind)) is not None}
        jobs = [(arm, seed) for seed in self.seeds for arm in plan if arm.key not in why]
        found: dict[tuple[str, int], dict[str, Any]] = {}
        columns = (
            TextColumn("  {task.description:<30}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("arms, each with every seed", total=len(jobs), note="")

            def one(job: tuple[Arm, int]) -> None:
                arm, seed = job
                spec = self.spec(arm, seed)
                result = self.earlier(spec)
                if result is None and arm.key not in why:
                    try:
                        result = run_arm(
                            spec, self.runs / f"{arm.key}-{seed}.log", lambda *_: None,
                            self.running, WORKER,
                        )  # fmt: skip
                        result |= {"commit": self.commit, "seed": seed}
                        write_text(spec.result, json.dumps(result, indent=1) + "\n")
                    except FastgradError as error:
                        why[arm.key] = f"seed {seed}: {str(error).splitlines()[-1]}"
                if result is not None:
                    found[arm.key, seed] = result
                note = f"{arm.label}: " + (
                    "failed" if result is None else f"{result['test']:.3f}"
                )  # fmt: skip
                bar.update(task, advance=1, note=note)

            with ThreadPoolExecutor(min(SIDE_BY_SIDE, cores())) as pool:
                try:
                    list(pool.map(one, jobs))
                except BaseException:  # Ctrl-C above all: no arm goes on without its parent
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in self.running:
                        process.kill()
                    raise
        results = {
            arm.key: [found[arm.key, seed] for seed in self.seeds]
            for arm in plan if arm.key not in why
        }  # fmt: skip
        labels = {arm.key: arm.label for arm in plan}
        return results, [{"key": k, "label": labels[k], "why": w} for k, w in why.items()]


def show(
    console: Console, record: Mapping[str, Any], rows: Sequence[report.Summary],
    verdicts: Sequence[Verdict],
) -> None:  # fmt: skip
    """Table in three parts, legend, verdicts."""
    by_key = {v.key: v for v in verdicts}
    for columns in ((0, 1, 2, 3, 13), (0, 4, 5, 6, 7, 8), (0, 9, 10, 11, 12)):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i in columns:
            table.add_column(report.HEADINGS[i], justify="left" if i in (0, 13) else "right",
                             no_wrap=True)  # fmt: skip
        for row in rows:
            text = report.cells(row, by_key.get(row.key))
            table.add_row(*(text[i] for i in columns),
                          style="bold" if row.role == arms_setup.OURS else None)  # fmt: skip
        console.print(Padding(table, (0, 0, 0, 2)))
    for gone in record["absent"]:
        console.print(f"  {gone['label']} did not run: {gone['why']}")
    console.print(Padding(report.legend(record, rows), (0, 2)), style="dim")
    console.print()
    for verdict in verdicts:
        console.print(Padding(verdict.sentence(), (0, 2)))
    console.print()
    console.print(Padding(f"Aim {record['aim']}.", (0, 2)), style="bold")


def compare(
    work: Path, output: Path, settings: Settings, seeds: Sequence[int],
    only: Sequence[str] | None, console: Console,
) -> int:  # fmt: skip
    """Run everything in ``work``, write the results to ``output``. The exit code is 1 if an arm of
    ours failed, 0 whatever the verdicts are."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # loading a dozen tensors needs no bar
    started = time.perf_counter()
    torch.set_num_threads(THREADS)
    roles = arms_setup.arms(settings)
    plan = [arm for arm in roles if only is None or arm.key in {"full", *only}]
    comparison = Comparison(work, settings, seeds, console)
    comparison.model()
    comparison.sources()
    prepared = time.perf_counter() - started
    results, absent = comparison.run_all(plan)
    by_key = {arm.key: role for arm, role in roles.items()}
    failed = [a for a in absent if by_key[a["key"]] in (arms_setup.OURS, arms_setup.FULL)]
    if "full" not in results or arms_setup.OURS not in {by_key[key] for key in results}:
        for gone in absent:
            console.print(f"{gone['label']} did not run: {gone['why']}")
        return 1
    rows = report.summarise(results, by_key, comparison.before, comparison.total)
    verdicts = report.judge(rows, results)
    record: dict[str, Any] = {
        "format": "fastgrad.finetune_arms/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": report.all_versions(),
        "commits": sorted({r["commit"] for runs in results.values() for r in runs}),
        "threads_per_process": THREADS,
        "at_a_time": min(SIDE_BY_SIDE, cores()),
        "settings": vars(settings),
        "seeds": list(seeds),
        "fraction": FRACTION,
        "rates_tried": len(settings.rates) + settings.refine,
        "n_parameters": comparison.total,
        "test_rows": comparison.test_rows,
        "loss_before": comparison.before,
        "summary": [asdict(row) | {"memory": row.memory} for row in rows],
        "verdicts": [asdict(v) | {"word": v.found.word} for v in verdicts],
        "aim": aim(verdicts, arms_setup.PEER),
        "absent": absent,
        "arms": results,
        "seconds": {
            "preparation": prepared,
            "total": time.perf_counter() - started,
            "processes": sum(r["process_seconds"] for runs in results.values() for r in runs),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", json.dumps(finite_or_none(record), indent=1) + "\n")
    write_text(output / "results.md", report.markdown(record, rows, verdicts, "finetune_arms.png"))
    redraw(output)
    show(console, record, rows, verdicts)
    console.print(f"\n  results.md, results.json and finetune_arms.png are in {output}/")
    return 1 if failed else 0


def redraw(output: Path) -> None:
    """The figure, from results.json alone."""
    drawn = report.figure_of(json.loads((output / "results.json").read_text("utf-8")))
    with atomic_path(output / "finetune_arms.png") as temporary:
        drawn.savefig(temporary, dpi=120, format="png", metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = [arm.key for arm in arms_setup.arms(arms_setup.settings(True)) if arm.key != "full"]
    parser.add_argument("--fast", action="store_true", help="small model, few steps")
    parser.add_argument("--seeds", type=int, help="number of training seeds (3; 2 with --fast)")
    parser.add_argument("--only", nargs="+", choices=keys, metavar="ARM",
                        help=f"of {', '.join(keys)}")  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for the model and for finished arms "
                        "(default: finetune-arms-out/full or finetune-arms-out/fast)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for table, figure and numbers "
                        "(default: bench/results/finetune_arms; with --fast, --work)")  # fmt: skip
    parser.add_argument("--redraw", action="store_true", help="only make the figure anew")
    args = parser.parse_args()
    seeds = args.seeds if args.seeds is not None else (2 if args.fast else 3)
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    work = args.work or Path("finetune-arms-out") / ("fast" if args.fast else "full")
    output = args.output or (work if args.fast else HERE / "results" / "finetune_arms")
    if args.redraw:
        redraw(output)
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        return compare(
            work, output, arms_setup.settings(args.fast), range(seeds), args.only, console
        )
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
