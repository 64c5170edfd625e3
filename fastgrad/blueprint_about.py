"""What a run says about itself in the blueprint that it makes: checked before the run begins."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_make import DataSetLike
from fastgrad.blueprint_provenance import public_command
from fastgrad.blueprint_schema import DataSet
from fastgrad.errors import FastgradError

# What a run knows itself, or says in an argument of its own.
_OWN = ("stats", "model", "domain_tags", "checkpoints", "datasets", "revision", "seed")


@dataclass(frozen=True)
class About:
    """Provenance of a measurement that a training run makes.

    Attributes:
        domain_tags, datasets, revision: see :meth:`fastgrad.Blueprint.from_stats`.
        seed: of the run.
        options: further arguments of ``from_stats``.
    """

    domain_tags: Sequence[str] = ()
    datasets: Sequence[DataSetLike] = ()
    revision: str | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises FastgradError for what would be refused when the run is over."""
        known = [n for n in inspect.signature(Blueprint.from_stats).parameters if n not in _OWN]
        for name in self.options:
            if name not in known:
                raise FastgradError(
                    f"{name!r} is no argument here, nor one of Blueprint.from_stats. Remedy: one "
                    f"of {', '.join(known)}, or an argument of this class"
                )
        for what in ("domain_tags", "datasets"):
            value = getattr(self, what)
            if isinstance(value, str | Mapping):
                raise FastgradError(f"{what} is a list. Remedy: {what}=[{value!r}]")
        for one in self.datasets:
            try:
                DataSet.model_validate({"name": one} if isinstance(one, str) else dict(one))
            except (ValidationError, TypeError, ValueError) as error:
                raise FastgradError(
                    f"datasets: {one!r} does not name a data set. Remedy: its name, or a mapping "
                    "with name, revision, subset, split and n_examples"
                ) from error
        for what, value, kind, remedy in (
            ("revision", self.revision, str, "commit, tag or branch of the model as text"),
            ("seed", self.seed, int, "the run's seed, a whole number"),
        ):
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise FastgradError(f"{what} is {value!r}. Remedy: {remedy}")

    def data(self) -> dict[str, Any]:
        """``meta["data"]`` of what is measured now."""
        command = self.options.get("command")
        datasets = [{"name": d} if isinstance(d, str) else dict(d) for d in self.datasets]
        return {
            "datasets": datasets, "seed": self.seed,
            "command": public_command(sys.argv) if command is None else command,
        }  # fmt: skip

    def for_blueprint(self) -> dict[str, Any]:
        """Arguments of ``Blueprint.from_stats``."""
        return {
            "domain_tags": list(self.domain_tags), "datasets": self.datasets,
            "revision": self.revision, **self.options,
        }  # fmt: skip


__all__ = ["About"]
