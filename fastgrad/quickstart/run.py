"""The quickstart from start to end: five stages, each saying what it does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fastgrad.blueprint_schema import finite_or_none
from fastgrad.errors import MissingExtraError
from fastgrad.files import atomic_path, write_text
from fastgrad.quickstart import report, screen
from fastgrad.quickstart.settings import (
    FRACTION,
    SIDE_BY_SIDE,
    THREADS,
    Arm,
    Settings,
    Spec,
    arms,
    cores,
)
from fastgrad.quickstart.supervise import run_arm

_NEEDED = {
    "transformers": "hf", "tokenizers": "hf", "accelerate": "hf", "peft": "hf",
    "matplotlib": "plots",
}  # fmt: skip


class Quickstart:
    """One run and what it has found so far."""

    def __init__(self, output: Path, settings: Settings, seed: int, console: Console) -> None:
        self.output, self.settings, self.seed, self.console = output, settings, seed, console
        output = output.resolve()  # a worker may start in another folder
        self.model_dir = output / "model"
        self.data_file = output / "data.safetensors"
        self.local_file = output / "local-sample.safetensors"
        self.delta_file = output / "delta.safetensors"
        self.figure_file = output / "quickstart.png"
        self.seconds: dict[str, float] = {}
        self.record: dict[str, Any] = {}
        self.running: list[subprocess.Popen[str]] = []

    @contextmanager
    def stage(self, number: int, key: str, title: str) -> Iterator[None]:
        screen.heading(self.console, f"{number}/5  {title}")
        started = time.perf_counter()
        yield
        self.seconds[key] = time.perf_counter() - started

    def run(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(THREADS)
        self.console.print(
            f"fastgrad quickstart ({self.settings.name}): learn one text, adapt to another with "
            f"{FRACTION:.0%} of the weights, and compare. Seed {self.seed}, results in "
            f"{self.output}/"
        )
        started = time.perf_counter()
        with self.stage(1, "corpus", "Text: Python's own source, and the prose of its help"):
            self.corpus()
        with self.stage(2, "pretraining", "A small Llama learns the source"):
            self.pretrain()
        with self.stage(3, "probing", "Probe: which submodules does the new text ask for?"):
            self.probe()
        with self.stage(4, "arms", "Adapt: every arm sees the same batches in the same order"):
            results = self.adapt()
        with self.stage(5, "report", "Result"):
            self.conclude(results, started)

    # -- stages --------------------------------------------------------------------------

    def corpus(self) -> None:
        from safetensors.torch import save_file

        from fastgrad.quickstart.corpus import build_data, read_corpus

        with self.console.status("reading files, training the tokenizer"):
            self.data = build_data(self.settings, read_corpus(self.settings))
            with atomic_path(self.data_file) as temporary:
                save_file(dict(self.data.rows), temporary)
        screen.splits(self.console, self.data)

    def pretrain(self) -> None:
        from fastgrad.quickstart.pretrain import pretrain

        steps = self.settings.pretrain_steps
        with screen.bar(self.console) as bar:
            task = bar.add_task("training", total=steps, note="")

            def progress(step: int, loss: float | None) -> None:
                note = {} if loss is None else {"note": f"loss {loss:.3f}"}
                bar.update(task, completed=step, **note)  # type: ignore[arg-type]

            callback = pretrain(
                self.settings, self.data.rows["code_train"], self.data.rows["code_valid"],
                self.data.tokenizer, self.model_dir, self.seed, progress,
            )  # fmt: skip
        self.record["checkpoints"] = [
            {"at": m.fraction, "step": m.step, "heldout_loss": m.loss,
             "grad_norm": dict(zip(m.stats.names, m.stats.grad_norm.tolist(), strict=True))}
            for m in callback.measurements
        ]  # fmt: skip
        screen.measurements(self.console, callback.measurements)

    def probe(self) -> None:
        from transformers import LlamaForCausalLM

        from fastgrad import Blueprint, GradientStats, select
        from fastgrad.integrations.transformers import measure
        from fastgrad.quickstart.measure import row_losses
        from fastgrad.quickstart.pretrain import batches
        from fastgrad.quickstart.worker import data_order

        settings = self.settings
        model = LlamaForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)
        model.config.use_cache = False
        with self.console.status("measuring losses before adaptation"):
            self.before = {
                part: float(row_losses(model, self.data.rows[part], settings.rows).mean())
                for part in ("prose_valid", "prose_test", "code_test")
            }
        rows = self.data.rows["prose_train"]
        size = settings.probe_rows
        sample = data_order(len(rows), size * settings.probe_batches, 1, self.seed + 1)[0]
        with self.console.status("one backward pass over each batch of the local sample"):
            started = time.perf_counter()
            local: GradientStats
            local, _ = measure(
                model, batches(rows[sample], size, settings.probe_batches), blocks=settings.tile
            )
            seconds = time.perf_counter() - started
        local.save(self.local_file)
        self.local = local
        released = Blueprint.from_pretrained(self.model_dir)
        self.mixed = released.blend(local, weight="auto")
        self.staleness = released.staleness(local)
        choices = {
            name: select(source, model=model, fraction=FRACTION, blocks="module")
            for name, source in
            (("blueprint", released), ("local sample", local), ("blend", self.mixed))
        }  # fmt: skip
        self.total = sum(p.numel() for p in model.parameters())
        self.record["probe"] = screen.probed(
            self.console, released, self.mixed, self.staleness, local, choices, seconds
        )

    def adapt(self) -> list[dict[str, Any]]:
        settings = self.settings
        plan = arms(settings)
        folder = self.delta_file.parent / "arms"
        folder.mkdir(exist_ok=True)
        with screen.bar(self.console) as bar:
            whole = bar.add_task("all arms", total=len(plan), note="")

            def one(arm: Arm) -> dict[str, Any]:
                result = self.run_arm(arm, folder, bar)
                bar.advance(whole)
                return result

            with ThreadPoolExecutor(min(SIDE_BY_SIDE, cores())) as pool:
                try:
                    return list(pool.map(one, plan))
                except BaseException:  # Ctrl-C above all: no arm goes on without its parent
                    for process in self.running:
                        process.kill()
                    raise

    def run_arm(self, arm: Arm, folder: Path, bar: Progress) -> dict[str, Any]:
        steps = self.settings.steps
        rates = len(self.settings.rates) + self.settings.refine
        task = bar.add_task(arm.label, total=rates * steps, note="starting")
        spec = Spec(
            arm=arm, settings=self.settings, seed=self.seed,
            fraction=FRACTION, model=self.model_dir, data=self.data_file, local=self.local_file,
            result=folder / f"{arm.key}.json",
            delta=self.delta_file if arm.key == "blueprint" else None,
        )  # fmt: skip

        def progress(rate: int, step: int, loss: float) -> None:
            note = f"rate {rate + 1} of {rates}, loss {loss:.3f}"
            bar.update(task, completed=rate * steps + step, note=note)

        result = run_arm(spec, folder / f"{arm.key}.log", progress, self.running)
        bar.update(task, note=f"test loss {result['test']:.3f}")
        return result

    def conclude(self, results: list[dict[str, Any]], started: float) -> None:
        table = report.rows(results, self.before, self.total)
        checkpoint = self.model_dir / "model.safetensors"
        blueprint = next(r for r in results if r["key"] == "blueprint")
        self.draw(table, blueprint["selected"])
        self.seconds["total"] = time.perf_counter() - started
        self.record |= {
            "format": "fastgrad.quickstart/1",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": report.machine(),
            "versions": report.versions(),
            "threads_per_process": THREADS,
            "arms_at_a_time": min(SIDE_BY_SIDE, cores()),
            "seed": self.seed,
            "fraction": FRACTION,
            "settings": vars(self.settings),
            "n_parameters": self.total,
            "loss_before": self.before,
            "arms": results,
            "verdict": report.verdict(table),
            "delta_bytes": blueprint["delta_bytes"],
            "delta_restores": blueprint["delta_restores"],
            "checkpoint_bytes": checkpoint.stat().st_size,
            "seconds": self.seconds,
        }
        numbers = json.dumps(finite_or_none(self.record), indent=1)
        write_text(self.output / "results.json", numbers + "\n")
        write_text(
            self.output / "results.md",
            report.markdown(self.record, table, self.figure_file.name),
        )
        screen.result(self.console, self.record, table)
        screen.files(self.console, self.output, {
            "model, tokenizer and gradient_blueprint.json": self.model_dir.name,
            "table for a README": "results.md",
            "all numbers": "results.json",
            "figure": self.figure_file.name,
            "delta checkpoint": self.delta_file.name,
        })  # fmt: skip

    def draw(self, table: list[report.Row], selected: dict[str, float]) -> None:
        from fastgrad.heavytail import fit_gamma, lorenz
        from fastgrad.plots import ArmPoint, summary_figure

        stats = self.local
        mass = stats.grad_norm**2
        values = stats.grad_norm / stats.numel**0.5
        by_time = "processor time of training (s)"
        if all(row.above is not None for row in table):
            by_memory = "peak memory above the loaded model (MB)"
            amounts = {row.key: (row.above or 0) / report.MB for row in table}
        else:
            by_memory = "gradients and optimizer state (MB)"
            amounts = {
                row.key: (row.gradient_bytes + row.state_bytes) / report.MB for row in table
            }
        figure = summary_figure(
            curve=lorenz(mass, stats.numel),
            gamma_fit=fit_gamma(mass, stats.numel, seed=self.seed),
            names=stats.names,
            values=values.tolist(),
            panels={
                by_memory: [ArmPoint(r.group, amounts[r.key], r.loss) for r in table],
                by_time: [ArmPoint(r.group, r.cpu_seconds, r.loss) for r in table],
            },
            before=self.before["prose_test"],
            marked=selected,
            title=f"fastgrad quickstart: a Llama of {self.total / 1e6:.1f} million weights, "
            "from Python source to English prose",
            value_label="gradient rms on the prose sample",
        )
        with atomic_path(self.figure_file) as temporary:
            figure.savefig(temporary, dpi=110, format="png")


def run_quickstart(
    output: Path, fast: bool, seed: int = 0, *, to_stderr: bool = False
) -> int:
    """Run everything and write the results below ``output``; show it on standard output, or on
    standard error. Returns the exit code.

    Raises:
        MissingExtraError: before anything is done, if a package is not installed.
        FastgradError: if this Python lacks the texts, or an arm fails.
    """
    for package, extra in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # loading a dozen tensors needs no bar
    console = screen.console(to_stderr)
    quickstart = Quickstart(Path(output), Settings.fast() if fast else Settings.full(), seed,
                            console)  # fmt: skip
    try:
        quickstart.run()
    except KeyboardInterrupt:
        console.print("\nstopped; nothing runs on in the background")
        return 130
    return 0
