"""What the experiments share: a pretrained model, real texts, adaptation, and the files written.

The model is the quickstart's: a small Llama that learns the source of the standard library. It is
adapted to texts that the installation of Python carries as well: the prose of the help topics, and
the C headers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastgrad as fg
from arms_verdict import Difference, difference
from fastgrad.blueprint_schema import finite_or_none
from fastgrad.errors import FastgradError
from fastgrad.files import write_text
from fastgrad.quickstart.arms import WEIGHT_DECAY, Prepared
from fastgrad.quickstart.arms import prepare as prepare_own
from fastgrad.quickstart.corpus import PARTS, build_data, read_corpus, token_rows
from fastgrad.quickstart.pretrain import new_model
from fastgrad.quickstart.settings import FRACTION, THREADS, Arm, Settings, Spec, next_rate
from fastgrad.quickstart.worker import CLIP, Run, data_order, rate_factor
from timing import environment

RESULTS = Path(__file__).parent.parent / "results" / "experiments"
WORK = Path("experiments-out")
CHECKPOINTS = (0.1, 0.5, 1.0)  # shares of the pre-training steps at which the model is kept
DOMAINS = ("prose", "headers")
HELD_OUT = {"valid": 0.12, "test": 0.15}  # share of the headers, in characters
PRETRAINING_SEED = 0
FURTHER = 4  # rates tried beyond the ends of the list, until the best lies between two others

Prepare = Callable[[nn.Module, int], Prepared]


def sizes(name: str) -> Settings:
    """``full``: the quickstart's own; ``small``: for many runs; ``gpu``; ``fast``: for tests."""
    full = Settings.full()
    if name == "full":
        return full
    if name == "small":
        return replace(
            full, name="small", vocab=512, width=96, feed_forward=256, layers=4, heads=4,
            code_bytes=2_000_000, length=64, pretrain_steps=800, pretrain_rows=8, steps=40,
            eval_rows=128,
        )  # fmt: skip
    if name == "gpu":
        return replace(
            full, name="gpu", vocab=8192, width=768, feed_forward=2048, layers=12, heads=12,
            code_bytes=30_000_000, length=512, pretrain_steps=4000, pretrain_rows=32,
            pretrain_rate=6e-4, steps=200, rows=16, probe_batches=16, probe_rows=16,
            tile="128x128", rates=(1e-4, 4e-4, 1.6e-3),
        )  # fmt: skip
    assert name == "fast"
    return replace(
        Settings.fast(), vocab=272, width=32, feed_forward=64, layers=2, heads=2,
        code_bytes=40_000, length=32, pretrain_steps=10, pretrain_rows=4, steps=4, eval_rows=8,
        probe_batches=4, probe_rows=4, rates=(1e-2,), refine=False,
    )  # fmt: skip


# -- texts and model -------------------------------------------------------------------------


def read_headers(root: Path | None = None) -> dict[str, list[str]]:
    """C headers of this Python, split by file: ``{"train": [...], "valid": ..., "test": ...}``.

    Raises:
        FastgradError: if they are not installed.
    """
    root = root or Path(sysconfig.get_paths()["include"])
    texts = [p.read_text("utf-8", errors="replace") for p in sorted(root.rglob("*.h"))]
    if len(texts) < 20:
        raise FastgradError(f"no C headers under {root}: they are the second specialised text. "
                            "Remedy: install Python's development files (python3-dev)")
    random.Random(0).shuffle(texts)
    room = {part: share * sum(map(len, texts)) for part, share in HELD_OUT.items()}
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for text in texts:
        part = next((p for p in HELD_OUT if 0 < len(text) <= room[p]), "train")
        if part != "train":
            room[part] -= len(text)
        parts[part].append(text)
    return parts


class Base:
    """A pretrained model with its checkpoints, and token rows of three texts.

    Everything is made once for each set of sizes and kept in a folder of ``work``; remove the
    folder after a change of the code that makes it.

    Attributes:
        rows: ``code_train`` and so on, int64 ``[n, length]``.
    """

    def __init__(self, work: Path, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, device
        told = json.dumps({"settings": vars(settings), "seed": PRETRAINING_SEED, "device": device})
        self.folder = work / f"{settings.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        mark = self.folder / "made.json"
        if not mark.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make()
            write_text(mark, told + "\n")
        self.rows = load_file(self.folder / "data.safetensors")

    def _make(self) -> None:
        settings = self.settings
        data = build_data(settings, read_corpus(settings))
        rows = dict(data.rows)
        for part, texts in read_headers().items():
            made = token_rows(data.tokenizer, texts, settings.length)
            keep = len(made) if part == "train" else min(len(made), settings.eval_rows)
            rows[f"headers_{part}"] = made[torch.linspace(0, len(made) - 1, keep).long()]
        save_file({k: v.contiguous() for k, v in rows.items()}, self.folder / "data.safetensors")
        self._pretrain(rows["code_train"])

    def _pretrain(self, rows: Tensor) -> None:
        """The quickstart's pre-training as a plain loop that keeps the model on the way."""
        settings = self.settings
        model: Any = new_model(settings, PRETRAINING_SEED).to(self.device).train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        steps = settings.pretrain_steps
        order = data_order(len(rows), settings.pretrain_rows, steps, PRETRAINING_SEED)
        keep = {self.step(share) for share in CHECKPOINTS}
        for step, index in enumerate(order, 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.pretrain_rate * rate_factor(step - 1, steps)
            part = rows[index].to(self.device)
            model(input_ids=part, labels=part).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if step in keep:
                model.save_pretrained(self.folder / f"step-{step}")

    def step(self, share: float) -> int:
        return max(1, round(share * self.settings.pretrain_steps))

    def checkpoint(self, share: float = 1.0) -> Path:
        return self.folder / f"step-{self.step(share)}"

    def model(self, share: float = 1.0) -> Any:
        model: Any = LlamaForCausalLM.from_pretrained(self.checkpoint(share), dtype=torch.float32)
        model.config.use_cache = False
        return model.to(self.device).train()

    def sample(self, name: str, seed: int, count: int | None = None) -> list[dict[str, Tensor]]:
        """Batches to measure on: rows of a training part, drawn without replacement."""
        s, rows = self.settings, self.rows[f"{name}_train"]
        index = data_order(len(rows), s.probe_rows * (count or s.probe_batches), 1, seed)[0]
        return [{"input_ids": p, "labels": p}
                for p in rows[index].to(self.device).split(s.probe_rows)]  # fmt: skip


# -- adaptation ------------------------------------------------------------------------------


class Adaptation(Run):
    """The quickstart's training of one arm, in this process, on any of the texts.

    The rates are those of the settings, and beyond an end of them while that end is the best, each
    as far from the last as that from the one before; then, with ``refine``, one more between the
    best and its neighbours.

    Args:
        base: model and texts.
        domain: the text that the model is adapted to.
        prepare: ``(model, seed) -> Prepared``.
        seed: of the order of the batches.
        rows: numbers of the training rows that may be used; all by default.
        steps: instead of the settings'.
        rate: the only one to try, found with another seed.
    """

    def __init__(
        self, base: Base, domain: str, prepare: Prepare, seed: int, *,
        rows: Any = None, steps: int | None = None, rate: float | None = None,
    ) -> None:  # fmt: skip
        settings = base.settings if steps is None else replace(base.settings, steps=steps)
        if rate is not None:
            settings = replace(settings, rates=(rate,), refine=False)
        nowhere = Path("not-written")
        self.spec = Spec(Arm("arm", "arm", "sparse"), settings, seed, FRACTION,
                         base.checkpoint(), nowhere, nowhere, nowhere)  # fmt: skip
        # The worker calls the text that is adapted to "prose".
        own = {f"prose_{p}": base.rows[f"{domain}_{p}"].to(base.device) for p in PARTS}
        self.data = {**own, "code_test": base.rows["code_test"].to(base.device)}
        if rows is not None:
            self.data["prose_train"] = self.data["prose_train"][torch.as_tensor(rows)]
        self.base, self._prepare = base, prepare
        self.result: dict[str, Any] = {}
        self.tried: list[dict[str, float]] = []

    def load(self) -> nn.Module:
        return self.base.model()

    def prepare(self, model: nn.Module) -> Prepared:
        return self._prepare(model, self.spec.seed)

    def all_rates(self) -> dict[str, Any]:
        refine = self.spec.settings.refine
        self.spec = replace(self.spec, settings=replace(self.spec.settings, refine=False))
        super().all_rates()
        for _ in range(FURTHER):
            further = beyond({t["rate"]: t["valid"] for t in self.tried})
            if further is None:
                break
            self._one_more(further)
        if refine:
            losses = {t["rate"]: t["valid"] for t in self.tried}
            rates = sorted(losses)
            middle = min(max(rates.index(self.result["rate"]), 1), len(rates) - 2)
            self._one_more(next_rate({r: losses[r] for r in rates[middle - 1 : middle + 2]}))
        return self.result

    def _one_more(self, rate: float) -> None:
        prepared, outcome = self.one_rate(len(self.tried), rate)
        self.tried.append(outcome)
        if outcome["valid"] < self.result["valid"]:
            self.keep(prepared, outcome)

    def run(self) -> dict[str, Any]:
        """Losses at the rate that is best on the validation part."""
        with contextlib.redirect_stdout(io.StringIO()):  # progress lines
            return {**self.all_rates(), "seed": self.spec.seed}


def beyond(tried: Mapping[float, float]) -> float | None:
    """The next rate outwards (rate -> validation loss), while the best is the first or last of
    them; None where it lies between two others, or was the only one to try."""
    rates = sorted(tried)
    best = min(rates, key=lambda rate: tried[rate])
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.3g}")


def at_the_end(run: Mapping[str, Any]) -> bool:
    """Whether the best rate of a run is the lowest or the highest of those that it tried."""
    rates = [t["rate"] for t in run["tried"]]
    return len(rates) > 1 and run["rate"] in (min(rates), max(rates))


def rates_told(arms: Sequence[Mapping[str, Any]]) -> str:
    """How many learning rates were tried, and what the star means, for the text under a table."""
    counts = {len(r["tried"]) for arm in arms for r in arm["runs"] if len(r["tried"]) > 1} or {1}
    many = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    return (f"{many} learning rates (three in equal ratios, and further ones while the best is "
            "the lowest or highest; * marks arms where it still is)")  # fmt: skip


def whole(kind: str, base: Base) -> Prepare:
    """Full tuning (``full``) or LoRA with as many weights as the budget (``lora``)."""

    def prepare(model: nn.Module, seed: int) -> Prepared:
        nowhere = Path("not-read")
        spec = Spec(Arm(kind, kind, kind), base.settings, seed, FRACTION, *[nowhere] * 4)
        return prepare_own(spec, model)

    return prepare


def sparse(selection: fg.Selection | Callable[[nn.Module, int], fg.Selection]) -> Prepare:
    """SparseAdamW on a selection, or on one that is made anew for each seed."""

    def prepare(model: nn.Module, seed: int) -> Prepared:
        chosen = selection if isinstance(selection, fg.Selection) else selection(model, seed)
        partial = fg.make_partial(model, chosen)
        trained = list(partial.parameters())
        return Prepared(
            model, trained, partial.n_parameters,
            lambda rate: fg.SparseAdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY),
            partial=partial,
            note=f"{len(chosen.blocks)} of {len(chosen.shapes)} submodules, "
            f"{chosen.n_blocks} blocks",
        )  # fmt: skip

    return prepare


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one arm over the seeds. Losses are nats per token; ``edge``: in some seed
    the best rate was the lowest or highest tried."""

    label: str
    test: float
    sd: float | None
    gain: float
    forgetting: float
    trained: float
    rates: tuple[float, ...]
    edge: bool

    @classmethod
    def of(
        cls, label: str, runs: Sequence[Mapping[str, Any]], before: Mapping[str, float],
        total: int,
    ) -> Summary:  # fmt: skip
        tests = [r["test"] for r in runs]
        return cls(
            label, fmean(tests), stdev(tests) if len(tests) > 1 else None,
            before["test"] - fmean(tests), fmean(r["code"] for r in runs) - before["code"],
            fmean(r["n_trained"] for r in runs) / total,
            tuple(sorted({r["rate"] for r in runs})), any(map(at_the_end, runs)),
        )  # fmt: skip

    @property
    def loss(self) -> str:
        return f"{self.test:.3f}" + ("" if self.sd is None else f" ±{self.sd:.3f}")


def before(base: Base, domain: str) -> dict[str, float]:
    """Losses of the model before it is adapted."""
    run = Adaptation(base, domain, lambda *_: None, 0)  # type: ignore[arg-type,return-value]
    model = base.model()
    return {"test": run.loss(model, "prose_test"), "code": run.loss(model, "code_test")}


def compared(runs: Sequence[Mapping[str, Any]], to: Sequence[Mapping[str, Any]]) -> Difference:
    """Difference of test losses, paired over rows and seeds."""
    return difference([r["test_rows"] for r in runs], [r["test_rows"] for r in to])


def told(found: Difference) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


# -- commands and files ----------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    name: str
    settings: Settings
    device: str
    seeds: tuple[int, ...]
    out: Path
    work: Path
    fast: bool

    def base(self) -> Base:
        return Base(self.work, self.settings, self.device)

    @property
    def command(self) -> str:
        return f"python bench/experiments/{self.name}.py"


def asked(name: str, doc: str | None, size: str, argv: Sequence[str] | None = None) -> Asked:
    """Arguments that every experiment takes; ``size`` is the CPU's.

    Raises:
        SystemExit: for ``--gpu`` without one.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fast", action="store_true", help="a tiny model: does the command work?")
    kind.add_argument("--gpu", action="store_true", help="a larger model, on a CUDA device")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (2 with --fast)")
    parser.add_argument("--out", type=Path, help="folder of the results "
                        "(default: bench/results/experiments; with --fast, --work)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models and texts")
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device. Remedy: leave it out for the CPU's sizes")
    torch.set_num_threads(THREADS)
    transformers_logging.disable_progress_bar()
    seeds = min(args.seeds, 2) if args.fast else args.seeds
    return Asked(
        name, sizes("fast" if args.fast else "gpu" if args.gpu else size),
        "cuda" if args.gpu else "cpu", tuple(range(seeds)),
        args.out or (args.work if args.fast else RESULTS), args.work, args.fast,
    )  # fmt: skip


def origin(ask: Asked) -> dict[str, Any]:
    """What every record begins with."""
    return {
        "format": f"fastgrad.experiments.{ask.name}/1",
        "environment": environment() | {"transformers": version("transformers"),
                                        "fastgrad": fg.__version__, "device": ask.device},
        "command": ask.command,
        "settings": vars(ask.settings),
        "seeds": list(ask.seeds),
        "pretraining_seed": PRETRAINING_SEED,
    }  # fmt: skip


def footer(record: Mapping[str, Any]) -> str:
    """Date, device, versions and command, under a table."""
    env = record["environment"]
    threads = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
    device = env.get("gpu", f"{env['processor']}, {threads}")
    return (f"{env['date']}, {device}, torch {env['torch']}, transformers {env['transformers']}, "
            f"Python {env['python']}; {record['seconds']:.0f} s of processor time; "
            f"`{record['command']}`.")


def write(ask: Asked, record: dict[str, Any], table: Callable[[Mapping[str, Any]], str],
          draw: Callable[[Mapping[str, Any]], Any]) -> None:  # fmt: skip
    """Record, table and figure."""
    from fastgrad.plots_base import save_figure

    plain = json.loads(json.dumps(finite_or_none(record), default=_plain))
    ask.out.mkdir(parents=True, exist_ok=True)
    write_text(ask.out / f"{ask.name}.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    write_text(ask.out / f"{ask.name}.md", table(plain) + "\n")
    figure = draw(plain)
    if ask.fast:
        figure.set_layout_engine("none")  # nobody looks at it, and layout is half of the time
    save_figure(figure, ask.out / ask.name, dpi=50 if ask.fast else 150)
    print(f"wrote {ask.out / ask.name}.json, .md, .png and .svg")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


class Clock:
    """Processor seconds since it was made; the command that is first also pretrains."""

    def __init__(self) -> None:
        self._start = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self._start
