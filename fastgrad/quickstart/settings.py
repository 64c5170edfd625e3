"""Every number that the quickstart's experiment depends on, in one place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FRACTION = 0.2

# One thread a process, two arms at a time. At this size a second thread makes a step 1.6 times
# faster on an idle machine and ten times slower on a busy one, where it waits for its partner by
# spinning; two processes use two cores in either case. Processor time then compares the arms.
THREADS = 1
SIDE_BY_SIDE = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; :meth:`full` for the real thing, :meth:`fast` for tests."""

    name: str
    vocab: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    code_bytes: int  # how much standard-library source to read for training
    length: int  # tokens in a row
    pretrain_steps: int
    pretrain_rows: int  # rows in a batch
    pretrain_rate: float
    steps: int  # adaptation steps of every arm, at every rate
    rows: int
    eval_rows: int  # most rows of any held-out split that are used
    probe_batches: int
    probe_rows: int  # rows in a batch that is probed
    tile: str
    rates: tuple[float, ...]  # learning rates that every arm tries
    refine: bool  # and one more, where those point to
    draws: int  # random selections

    @classmethod
    def full(cls) -> Settings:
        return cls(
            name="full", vocab=1024, width=192, feed_forward=512, layers=6, heads=6,
            code_bytes=4_000_000, length=128, pretrain_steps=1000, pretrain_rows=4,
            pretrain_rate=3e-3, steps=64, rows=4, eval_rows=96, probe_batches=8, tile="32x32",
            probe_rows=8,
            rates=(1e-3, 4e-3, 1.6e-2), refine=True, draws=3,
        )  # fmt: skip

    @classmethod
    def fast(cls) -> Settings:
        return cls(
            name="fast", vocab=384, width=64, feed_forward=160, layers=3, heads=4,
            code_bytes=600_000, length=64, pretrain_steps=80, pretrain_rows=8,
            pretrain_rate=5e-3, steps=20, rows=4, eval_rows=32, probe_batches=4, tile="16x16",
            probe_rows=8,
            rates=(4e-3, 1.6e-2), refine=False, draws=3,
        )  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to adapt the model; everything else is equal between arms."""

    key: str
    label: str
    kind: str  # a key of :data:`fastgrad.quickstart.arms.KINDS`
    source: str | None = None  # "blend" uses the blueprint and the local sample
    ranking: str = "rms"
    blocks: str = "module"
    draw: int = 0
    keep: tuple[str, ...] = ()  # parameters that are trained whatever the ranking says


@dataclass(frozen=True)
class Spec:
    """What a worker process is told: one JSON file."""

    arm: Arm
    settings: Settings
    seed: int
    fraction: float
    model: Path
    data: Path
    local: Path  # statistics of the local sample
    result: Path
    delta: Path | None = None
    released: Path | None = None  # folder of the blueprint, where it is not beside the model

    def as_json(self) -> dict[str, Any]:
        raw = asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in raw.items()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Spec:
        settings = {**raw["settings"], "rates": tuple(raw["settings"]["rates"])}
        return cls(
            arm=Arm(**{**raw["arm"], "keep": tuple(raw["arm"]["keep"])}),
            settings=Settings(**settings),
            seed=raw["seed"],
            fraction=raw["fraction"],
            model=Path(raw["model"]),
            data=Path(raw["data"]),
            local=Path(raw["local"]),
            result=Path(raw["result"]),
            delta=Path(raw["delta"]) if raw["delta"] else None,
            released=Path(raw["released"]) if raw["released"] else None,
        )


def arms(settings: Settings) -> list[Arm]:
    """The arms of the experiment, in the order of the table."""
    return [
        Arm("full", "full AdamW", "full"),
        Arm("blueprint", "blueprint, submodules", "sparse", "blend"),
        Arm("blueprint-tiles", f"blueprint, {settings.tile} tiles", "sparse", "blend",
            blocks=settings.tile),
        *(
            Arm(f"random-{d + 1}", f"random submodules {d + 1}", "sparse", None, "random", draw=d)
            for d in range(settings.draws)
        ),
        # The blueprint always chooses the embedding; what is the rest of its choice worth?
        Arm("embedding", "embedding + random", "sparse", None, "random",
            keep=("model.embed_tokens.weight",)),
        Arm("last", "last layers", "sparse", None, "last"),
        Arm("lora", "LoRA (peft)", "lora"),
    ]  # fmt: skip


def next_rate(tried: Mapping[float, float]) -> float:
    """One more rate, from three in equal ratios (rate -> validation loss).

    The minimum of the parabola through the three losses over log(rate), but no further out than
    half a ratio; where there is no such minimum, half a ratio from the best rate, towards the
    better neighbour or outwards. Two significant digits.
    """
    low, middle, high = sorted(tried)
    a, b, c = (tried[rate] for rate in (low, middle, high))
    if math.isfinite(a + b + c) and a - 2 * b + c > 0:
        place = 0.5 * (a - c) / (a - 2 * b + c)
    elif b <= min(a, c):
        place = -0.5 if a < c else 0.5
    else:
        place = -1.5 if a < c else 1.5
    place = max(-1.5, min(1.5, place))
    return float(f"{middle * (high / middle) ** place:.1e}")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
