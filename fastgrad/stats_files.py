"""One file of statistics: safetensors, with everything that is not an array in its header."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastgrad.errors import StatsError
from fastgrad.files import atomic_path
from fastgrad.stats import Coverage, GradientStats

FORMAT = "fastgrad.stats/1"
#: With granularities that differ by parameter: an older reader would take the blocks for others.
FORMAT_BY_NAME = "fastgrad.stats/2"

_ARRAYS = (
    "sq",
    "batch",
    "label_tokens",
    "mean_factor",
    "sum_factor",
    "batch_sq",
    "weight_sq",
    "alignment_by_direction",
)
_BLOCKS, _BATCH_BLOCKS = "block_sq/", "block_batch_sq/"
# Not in older files; older readers pass over them.
_BATCH_ABS, _ALIGNMENT = "block_batch_abs/", "block_alignment/"

#: What reading a file may raise that is damaged in any way.
DAMAGE = (
    KeyError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    OSError,
)


def write(stats: GradientStats, path: str | os.PathLike[str]) -> None:
    """See :meth:`fastgrad.GradientStats.save`."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(getattr(stats, name)) for name in _ARRAYS}
    arrays["example_ids"] = np.ascontiguousarray(stats.example_ids)
    arrays |= {_BLOCKS + n: np.ascontiguousarray(v) for n, v in stats.block_sq.items()}
    arrays |= {_BATCH_BLOCKS + n: v for n, v in stats.block_batch_sq.items()}
    arrays |= {_BATCH_ABS + n: v for n, v in stats.block_batch_abs.items()}
    arrays |= {_ALIGNMENT + n: np.ascontiguousarray(v) for n, v in stats.block_alignment.items()}
    header = {
        "format": FORMAT_BY_NAME if stats.specs else FORMAT,
        "names": stats.names,
        "shapes": stats.shapes,
        "spec": stats.spec,
        "specs": stats.specs,
        "directions": stats.directions,
        "coverage": [asdict(c) for c in stats.coverage_list],
        "meta": stats.meta,
        "running_ids": stats.running_ids,
    }
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"fastgrad": json.dumps(header)})


def read(path: str | os.PathLike[str], blocks: bool | Sequence[str] = True) -> GradientStats:
    """See :meth:`fastgrad.GradientStats.load`."""
    return read_chosen(path, lambda detailed: wanted_blocks(detailed, blocks))


def read_chosen(
    path: str | os.PathLike[str], choose: Callable[[list[str]], Collection[str]]
) -> GradientStats:
    """The statistics in a file; ``choose`` says of which parameters the block detail is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="np") as file:
            header = json.loads((file.metadata() or {})["fastgrad"])
            if header["format"] not in (FORMAT, FORMAT_BY_NAME):
                raise StatsError(
                    f"{path} has format {header['format']!r}, this version reads {FORMAT!r} and "
                    f"{FORMAT_BY_NAME!r}"
                )
            keys = list(file.keys())
            detailed = [k[len(_BLOCKS) :] for k in keys if k.startswith(_BLOCKS)]
            wanted = choose(detailed)
            # An array that is not wanted must not cost the time and memory to read it.
            arrays = {
                key: file.get_tensor(key)
                for key in keys
                if not key.startswith(_BLOCKS) or key[len(_BLOCKS) :] in wanted
            }
        stats = _stats(header, arrays, tuple(n for n in detailed if n not in wanted))
        stats._validate()
        return stats
    except FileNotFoundError:
        raise StatsError(
            f"no statistics file at {path}. Remedy: what `fastgrad probe -o` or stats.save wrote"
        ) from None
    except (SafetensorError, *DAMAGE) as error:
        if isinstance(error, StatsError):
            raise
        raise StatsError(
            f"{path} is damaged or no statistics file: {error}. Remedy: what `fastgrad probe -o` "
            "or stats.save wrote; if it is that, probe again"
        ) from error


def wanted_blocks(detailed: Sequence[str], blocks: bool | Sequence[str]) -> set[str]:
    """The parameters, of those with block detail, that ``blocks`` asks for.

    Raises:
        StatsError: for a pattern that matches none of them.
    """
    if isinstance(blocks, bool):
        return set(detailed) if blocks else set()
    if isinstance(blocks, str):
        raise StatsError(f"blocks is a list of patterns; write [{blocks!r}]")
    found: set[str] = set()
    for pattern in blocks:
        matching = {n for n in detailed if fnmatch.fnmatchcase(n, pattern)}
        if not matching:
            raise StatsError(
                f"blocks: the pattern {pattern!r} matches no parameter with block detail; there is "
                f"{'some for ' + ', '.join(detailed[:3]) if detailed else 'none'}"
            )
        found |= matching
    return found


def _stats(header: Any, arrays: dict[str, Any], unloaded: tuple[str, ...]) -> GradientStats:
    more: dict[str, Any] = {}
    if "example_ids" in arrays:  # not in the files of fastgrad 0.1
        more = {"example_ids": arrays["example_ids"], "running_ids": bool(header["running_ids"])}
    return GradientStats(
        names=header["names"],
        shapes=[tuple(s) for s in header["shapes"]],
        spec=header["spec"],
        specs=header.get("specs", {}),
        directions=header["directions"],
        coverage_list=[Coverage(**c) for c in header["coverage"]],
        meta=header["meta"],
        block_sq=_below(arrays, _BLOCKS),
        block_batch_sq=_below(arrays, _BATCH_BLOCKS),
        block_batch_abs=_below(arrays, _BATCH_ABS),
        block_alignment=_below(arrays, _ALIGNMENT),
        unloaded=unloaded,
        **{name: arrays[name] for name in _ARRAYS},
        **more,
    )


def _below(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
