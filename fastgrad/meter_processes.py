"""What several processes spent together, each of which meters itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from fastgrad.errors import ResourceError
from fastgrad.meter import Meter

_REMEDY = "Remedy: the same Meter(...) on every process"


@dataclass(frozen=True)
class Together:
    """What all processes spent.

    Attributes:
        processes: how many they are.
        spent: by resource: of ``seconds`` the most of any process, as they run side by side; of
            all others the sum over processes. Of ``peak_bytes`` too, although the peaks need not
            be at the same moment.
        left_out: resources that cannot be added up, and why.
    """

    processes: int
    spent: dict[str, float]
    left_out: dict[str, str]


def over_processes(meter: Meter, group: dist.ProcessGroup | None = None) -> Together:
    """Add up the meters of all processes; all of them have to call this, and get the same.

    Args:
        meter: this process' own.
        group: the processes; all by default.

    Raises:
        ResourceError: if torch.distributed is not running, or the processes did not take the same
            number of steps.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ResourceError(
            "there are no processes to add up: torch.distributed is not running. Remedy: "
            "meter.spent is all"
        )
    found: list[tuple[int, dict[str, float], dict[str, str]] | None]
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (meter.steps, meter.spent, meter.modes), group=group)
    all_ = [f for f in found if f is not None]
    steps = sorted({f[0] for f in all_})
    if len(steps) > 1:
        raise ResourceError(f"the processes' meters have {steps} steps. {_REMEDY}, in each step")
    spent: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in sorted({n for _, s, _ in all_ for n in s}):
        amounts = [s[name] for _, s, _ in all_ if name in s]
        if len(amounts) < len(all_):
            left_out[name] = f"measured by {len(amounts)} of {len(all_)} processes. {_REMEDY}"
        elif any("whole machine" in modes[name] for _, _, modes in all_):
            left_out[name] = (
                "the counter is the whole machine's, and a sum would hold it once for each of its "
                "processes. Remedy: read it from one process of each machine, or energy='nvml', "
                "with a GPU for each process"
            )
        else:
            spent[name] = max(amounts) if name == "seconds" else sum(amounts)
    return Together(len(all_), spent, left_out)
