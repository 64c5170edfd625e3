"""Differentially private release of gradient norms: one Gaussian mechanism over all submodules.

Each example's gradient of the whole model is cut to length C and the cut gradients are added up.
With a public number n in the denominator, one example moves the vector of all submodule norms of
that mean by C/n at most (by 2C/n if it is replaced), however many submodules there are. Gaussian
noise on each norm therefore protects all of them at once. Derived in ``docs/maths.md``, section 10.

Everything that is written into a file is made of the noised norms and of what is public.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_coarse import Coarseness
from fastgrad.blueprint_fits import FitOptions, finish
from fastgrad.blueprint_make import DataSetLike
from fastgrad.blueprint_provenance import provenance, public_name
from fastgrad.blueprint_schema import finite_or_none
from fastgrad.errors import BlueprintError, MissingExtraError, PrivacyError
from fastgrad.release_noise import ABOVE
from fastgrad.resources import CostModel

if TYPE_CHECKING:
    from torch import nn

    from fastgrad.clipping import ExampleLosses

Array = NDArray[np.float64]
Adjacency = Literal["replace_one", "zero_out", "add_or_remove_one"]

#: How far one example moves the vector of norms, in units of clip/n.
_STEPS: dict[str, float] = {"replace_one": 2.0, "zero_out": 1.0, "add_or_remove_one": 1.0}

_MEANING = {
    "replace_one": "neighbouring data sets differ in one example, which is replaced by any other",
    "zero_out": "neighbouring data sets differ in one example, which is replaced by one without a "
    "gradient",
    "add_or_remove_one": "neighbouring data sets differ by the presence of one example; n is a "
    "public constant, not their size",
}

#: Released values are multiples of a power of two, this share of the noise or a little less: what
#: single bits of a floating-point sum would say about the exact value is rounded away.
_GRID = 2.0**-16


@dataclass(frozen=True, eq=False)
class PrivateNorms:
    """Noised submodule norms of the mean clipped gradient, with what they guarantee.

    Holds nothing else that depends on the examples' gradients, so it may be kept and published.

    Attributes:
        names: parameters that required a gradient, in the model's order.
        values: ``[P]`` ``‖(1/n) Σ_j clipped g_j‖`` plus noise, float64; negative where the noise
            outweighs the norm.
        clip: C, the length that each example's gradient of the whole model was cut to.
        n: the public number in the denominator.
        adjacency: which data sets count as neighbours.
        sensitivity: how far neighbours' vectors of norms lie apart at most, L2.
        noise_multiplier: standard deviation of the noise by the sensitivity.
        noise_std: standard deviation of the noise on each norm.
        epsilon, delta: the guarantee.
        accountant: what computed it.
        about: model, shapes and weight norms: public.
    """

    names: tuple[str, ...]
    values: Array
    clip: float
    n: int
    adjacency: Adjacency
    sensitivity: float
    noise_multiplier: float
    noise_std: float
    epsilon: float
    delta: float
    accountant: str
    about: Mapping[str, Any] = field(repr=False)

    @property
    def statement(self) -> str:
        """The guarantee in words."""
        return (
            f"({_upwards(self.epsilon)}, {_upwards(self.delta)})-differential privacy for one "
            "example (a row, whatever the other rows are): "
            f"{_MEANING[self.adjacency]}. Each example's gradient of all measured parameters was "
            f"cut to {self.clip:g} and their sum divided by n = {self.n}; the norms of all "
            "submodules were released once, with Gaussian noise. All numbers on the gradient are "
            "made of these. Weights, names and tags are taken for public. Another release from "
            "the same examples adds to epsilon and delta."
        )

    def blueprint(
        self,
        domain_tags: Sequence[str] = (),
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
        datasets: Sequence[DataSetLike] = (),
        tokens_per_step: int | None = None,
        costs: Sequence[CostModel] = (),
        created: str | None = None,
        command: str | None = None,
        n_bootstrap: int = 200,
        seed: int = 0,
        coarse: Coarseness | None = None,
    ) -> Blueprint:
        """A blueprint that is made of the noised norms alone.

        ``grad_norm`` of a submodule is ``√(v² − σ²)``, v its noised norm: the noise adds σ² to the
        expected square. It is 0 where v is not above σ. Shares, fits and k* follow from these. What
        a blueprint says of batches and single examples is null.

        Args:
            domain_tags, datasets: names, which have to be public.
            name_or_path, revision: of the model; by default what its config says.
            tokens_per_step, costs, created, command: see :meth:`Blueprint.from_stats`.
            n_bootstrap, seed: of the intervals, which resample submodules and not examples.
            coarse: ``ranks`` or ``deciles``: say these of the noised norms and nothing else. The
                guarantee is that of the norms.

        Raises:
            BlueprintError: if an argument does not fit the schema, or no norm rises above the
                noise.
        """
        if isinstance(domain_tags, str):
            raise BlueprintError(f"domain_tags is a list; write [{domain_tags!r}]")
        sizes = [d for d in datasets if not isinstance(d, str) and d.get("n_examples") is not None]
        if sizes and self.adjacency == "add_or_remove_one":
            raise BlueprintError(
                "the size of a data set is a secret under adjacency='add_or_remove_one', and "
                f"{sizes[0].get('name')!r} tells it. Remedy: leave n_examples out, or "
                "adjacency='replace_one'"
            )
        if not (self.values > self.noise_std).any():
            raise BlueprintError(
                f"no submodule's norm rises above the noise of {self.noise_std:.3g}. Remedy: more "
                "examples, a larger epsilon, or a clip nearer to the usual length of an example's "
                "gradient (known from public data)"
            )
        about = self.about
        model = dict(about["model"])
        if name_or_path is not None:
            model["name_or_path"] = public_name(name_or_path)
        if revision is not None:
            model["revision"] = revision
        document: dict[str, Any] = {
            "model": model,
            "data": {
                "n_examples": self.n,
                "n_batches": 0,  # how the examples were divided is nobody's business
                "n_label_tokens": None,
                "loss_reduction": "mean of clipped example losses' gradients over n",
                "example_scale": "example_mean",
                "dtypes": list(about["dtypes"]),
                "attention": about["attention"],
                "datasets": [
                    {"name": public_name(d)} if isinstance(d, str)
                    else dict(d) | {"name": public_name(d.get("name"))}
                    for d in datasets
                ],
                "clip": "per_example",
                "clip_norm": self.clip,
            },
            "domain_tags": list(domain_tags),
            "submodules": self._entries(),
            "dead": [],
            "noise": {"noise_scale_reason": "not released: protected by noise"},
            "checkpoints": [],
            "privacy": self.to_dict(),
            "provenance": provenance(created, command, about["torch"]),
        }  # fmt: skip
        options = FitOptions(n_bootstrap, seed, tokens_per_step, costs)
        made = Blueprint._of(finish(document, "module", {}, {}, options))
        return made if coarse is None else made.coarse(coarse)

    def to_dict(self) -> dict[str, Any]:
        """The ``privacy`` part of a blueprint."""
        return {
            "mechanism": "gaussian",
            "statement": self.statement,
            "unit": "example",
            "adjacency": self.adjacency,
            "clip_norm": self.clip,
            "n": self.n,
            "sensitivity": self.sensitivity,
            "noise_multiplier": self.noise_multiplier,
            "noise_std": self.noise_std,
            "n_submodules": len(self.names),
            "n_above_noise": int((self.values > ABOVE * self.noise_std).sum()),
            "epsilon": self.epsilon,
            "delta": self.delta,
            "accountant": self.accountant,
            "released": "norms",
        }

    def _entries(self) -> list[dict[str, Any]]:
        above = np.maximum(self.values, self.noise_std)
        corrected = np.sqrt((above - self.noise_std) * (above + self.noise_std))
        norms = dict(zip(self.names, corrected.tolist(), strict=True))
        noised = dict(zip(self.names, self.values.tolist(), strict=True))
        whole = math.fsum(x * x for x in norms.values())
        entries = []
        for name, shape, weight in self.about["parameters"]:
            entry = {"name": name, "shape": list(shape), "weight_norm": weight}
            if name not in norms:
                # That no gradient reached a parameter may depend on the examples; that it was
                # not to be measured does not.
                entries.append(entry | {"coverage": "frozen", "coverage_reason": "not measured"})
                continue
            norm, numel = norms[name], math.prod(shape)
            entries.append(entry | finite_or_none({
                "coverage": "exact",
                "noised_norm": noised[name],
                "grad_norm": norm,
                "rms": norm / math.sqrt(numel) if numel else None,
                "relative_norm": norm / weight if weight > 0 else None,
                "share": norm * norm / whole if whole > 0 else None,
            }))  # fmt: skip
        return entries


def private_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    clip: float,
    n: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    adjacency: Adjacency = "replace_one",
    loss: ExampleLosses | None = None,
    weights_hash: str | None = None,
    generator: random.Random | None = None,
) -> PrivateNorms:
    """Submodule norms of the mean clipped gradient, released with differential privacy.

    Reads the data twice: for the norm of each example's gradient of the whole model, and for the
    sum of the gradients cut to ``clip``. What is protected is one example, a row of a batch; a
    person of whom there are several is protected that much less. Rows have to be made one by one:
    where one text decides where the next one is cut (packed or chunked documents), changing it
    changes many rows. Padding must change nothing, which is checked for every example that has an
    ``attention_mask``.

    Args:
        model: with weights in float32 or float64. In evaluation mode meanwhile; nothing about it
            changes.
        batches: read twice, in the same order; each a mapping with ``labels``, or anything that
            ``loss`` takes.
        clip: C. A choice that looks at the examples' own norms would not be private: take it from
            public data.
        n: number of examples, known to everyone. It is what sums are divided by; nothing is ever
            divided by a number that depends on the data.
        delta: above 0 and below 1/n; under ``add_or_remove_one`` it has to lie below one by the
            true number of examples too, which is not looked at, for a refusal would tell it.
        epsilon: the guarantee that is wanted; the noise follows from it.
        noise_multiplier: instead of ``epsilon``: standard deviation of the noise by sensitivity.
        adjacency: which data sets are neighbours. ``replace_one``: one of the n examples is another
            one (sensitivity 2C/n). ``zero_out``: one of the n examples is one without a gradient
            (C/n). ``add_or_remove_one``: one example more or less, while n stays the public
            constant that it is (C/n); the data may then hold another number of examples than n,
            which is not released.
        loss: ``(model, batch) -> losses [B]``, each example's own; the cross-entropy of a
            transformers model by default (:func:`fastgrad.clipping.example_losses`).
        weights_hash: :func:`fastgrad.weights_hash` of the released weights, where they are stored
            in another precision than ``model`` has them in; the model's own by default.
        generator: of the noise. For tests: a release takes the operating system's, by default, and
            who knows the seed of any other knows the exact norms.

    Raises:
        PrivacyError: for arguments that promise nothing, a number of examples other than n, or
            as :func:`fastgrad.clipping.clipped_norms`.
        CoverageError: if examples meet in the model or in the loss, or a parameter's influence is
            not known.
        MissingExtraError: without ``dp-accounting``.
    """
    check_release(clip, n, delta, adjacency)
    multiplier, achieved, accountant = calibrated(delta, epsilon, noise_multiplier)
    from fastgrad.clipping import clipped_norms, example_losses

    exact = clipped_norms(model, batches, clip, loss or example_losses)
    if adjacency != "add_or_remove_one" and exact.n_examples != n:
        raise PrivacyError(
            f"n = {n} examples were announced and {exact.n_examples} are there. Remedy: exactly n, "
            "or adjacency='add_or_remove_one', where n is any public constant"
        )
    sensitivity = _STEPS[adjacency] * clip / n
    std = multiplier * sensitivity
    return PrivateNorms(
        names=tuple(exact.names),
        values=noised(exact.norms / n, std, generator or random.SystemRandom()),
        clip=float(clip),
        n=n,
        adjacency=adjacency,
        sensitivity=sensitivity,
        noise_multiplier=multiplier,
        noise_std=std,
        epsilon=achieved,
        delta=float(delta),
        accountant=accountant,
        about=_about(model, exact.stats.meta, weights_hash),
    )


def _upwards(x: float, digits: int = 4) -> str:
    """A bound in words is never below the bound."""
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(x)))
    return f"{math.ceil(x * scale - 1e-9) / scale:.{digits}g}"


def noised(values: Array, std: float, generator: random.Random) -> Array:
    """``values`` plus independent Gaussian noise, on a grid much finer than the noise.

    The noise is made of 53-bit uniform numbers and added in floating point, so the result's last
    bits could tell something about the exact value (Mironov, CCS 2012,
    doi:10.1145/2382196.2382264). Rounding to the grid removes those bits; it is a precaution, and
    no proof that the distribution is the Gaussian's to the last digit.
    """
    grid = 2.0 ** math.floor(math.log2(std * _GRID))
    noise = np.array([generator.gauss(0.0, std) for _ in range(values.size)])
    return np.round((values + noise) / grid) * grid


# -- accounting --------------------------------------------------------------------------------


def calibrated(
    delta: float, epsilon: float | None = None, noise_multiplier: float | None = None
) -> tuple[float, float, str]:
    """Noise multiplier, epsilon and what computed them, from one of the two.

    Exact for one Gaussian release (Balle and Wang, ICML 2018, arXiv 1805.06530).

    Raises:
        PrivacyError: unless exactly one is given, a finite positive number.
        MissingExtraError: without ``dp-accounting``.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise PrivacyError("give epsilon, or noise_multiplier; one follows from the other")
    given = epsilon if noise_multiplier is None else noise_multiplier
    if not _is_positive(given):
        what = "epsilon" if noise_multiplier is None else "noise_multiplier"
        raise PrivacyError(f"{what} must be a finite positive number; got {given!r}")
    accounting = _accounting()
    multiplier = float(
        # The search for it ends 1e-12 from the root, on either side.
        accounting.get_sigma_gaussian(epsilon, delta) * (1.0 + 1e-9)
        if noise_multiplier is None
        else noise_multiplier
    )
    return multiplier, float(accounting.get_epsilon_gaussian(multiplier, delta)), _name(accounting)


def composed_epsilon(noise_multipliers: Sequence[float], delta: float) -> float:
    """Epsilon of several Gaussian releases from the same examples, all of them together.

    Exact: together they are one release with ``1/z² = Σ 1/z_i²``.

    Args:
        noise_multipliers: of each release, as :attr:`PrivateNorms.noise_multiplier` has it.
        delta: of all together.

    Raises:
        PrivacyError: for no release, or a number that is not positive and finite.
        MissingExtraError: without ``dp-accounting``.
    """
    if not noise_multipliers or not all(map(_is_positive, noise_multipliers)):
        raise PrivacyError("noise_multipliers must be finite positive numbers, at least one")
    _check_delta(delta)
    together = 1.0 / math.sqrt(math.fsum(1.0 / z**2 for z in noise_multipliers))
    return float(_accounting().get_epsilon_gaussian(together, delta))


def _accounting() -> Any:
    try:
        return importlib.import_module("dp_accounting")
    except ImportError:
        raise MissingExtraError("dp-accounting", "privacy") from None


def _name(accounting: Any) -> str:
    from importlib.metadata import version

    return f"dp-accounting {version('dp-accounting')}, analytic Gaussian mechanism"


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and (
        0.0 < value < math.inf
    )  # fmt: skip


def _check_delta(delta: float) -> None:
    if not _is_positive(delta) or delta >= 1.0:
        raise PrivacyError(f"delta must lie between 0 and 1; got {delta!r}")


def check_release(clip: float, n: int, delta: float, adjacency: str) -> None:
    """Refuse what :func:`private_norms` refuses before any data is read.

    Raises:
        PrivacyError: naming it.
    """
    if not _is_positive(clip):
        raise PrivacyError(f"clip must be a finite positive number; got {clip!r}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise PrivacyError(f"n must be a whole number, at least 1; got {n!r}")
    _check_delta(delta)
    if delta * n >= 1.0:
        raise PrivacyError(
            f"delta = {delta:g} is not below 1/n = {1 / n:.3g}: to publish one example of {n} "
            "entirely would be allowed. Remedy: delta well below 1/n"
        )
    if adjacency not in get_args(Adjacency):
        raise PrivacyError(f"adjacency {adjacency!r}: use {', '.join(get_args(Adjacency))}")


def _about(
    model: nn.Module, meta: Mapping[str, Any], weights_hash: str | None
) -> dict[str, Any]:
    """What everybody knows who has the model."""
    from fastgrad import identity
    from fastgrad_kernels.layout import sum_of_squares

    parameters = identity.model_parameters(model)
    return {
        "model": {
            "class": meta.get("model_class") or None,
            "name_or_path": public_name(meta.get("name_or_path")),
            "revision": meta.get("model_revision") or None,
            "weights_hash": weights_hash or identity.weights_hash(model),
            "n_parameters": sum(p.numel() for p in parameters.values()),
        },
        "parameters": [
            (name, tuple(p.shape), math.sqrt(float(sum_of_squares(p.detach()))))
            for name, p in parameters.items()
        ],
        "dtypes": meta.get("dtypes") or [],
        "attention": meta.get("attention") or None,
        "torch": meta.get("torch"),
    }
