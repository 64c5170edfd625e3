"""Which parameters have no gradient but rounding.

Some gradients are zero by an invariance of the model: the bias of a key (softmax does not change
when all logits of a query grow by the same), the bias of a convolution in front of batch norm.
What is measured there is what rounding left of terms that cancel, in no direction that means
anything, and yet it is above any bar that is set beside the largest gradient of the model: in
float32 1e-8 of it, in bfloat16 1e-4. A tiny gradient alone is no sign of it either: floating point
keeps its relative precision where a deep layer's gradient has shrunk by 1e-8.

**Size.** Let g = Σ_i x_i be the gradient of a bias over n tokens, x_i the gradient at the layer's
output, and w = Σ_i x_i a_iᵀ that of the weight beside it, a_i its input. Each element of x_i
carries a relative error of about ε of independent sign, so that what is left of a sum that is zero
in exact arithmetic has an rms of

    e = ε √n x̄,       x̄ the rms of the x_i,

and where nothing cancels, w has one of √n x̄ ā, ā the rms of the inputs. Inputs that a norm made
are of order one, hence e ≈ ε · rms(w): measured next to the terms that cancel, and with no need to
know n. ε has two parts. A backward pass rounds each element a few times to the dtype of the
arithmetic, with unit roundoff u; and each element is itself a sum over up to m terms (features),
whose errors add up to √m u' (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), u' the unit roundoff
of the accumulator: float32, or float64 for float64. So

    e ≤ c (u + √m u') rms(w),      c = 8,

m the longest side of w and c for the number of roundings and inputs that are not quite of order
one. The key biases of a real checkpoint (all-MiniLM-L6-v2, 384 features, float32; made by
``bench/minilm_blueprint.py``, docs/examples/minilm-code) lie at 4 to 17 u, where the bar is 165 u,
the other biases of linear layers at 1.6 to 6 times rms(w).

**Direction.** Smaller than that, a gradient may still be real. Rounding of one example does not
know of that of another: contributions c_j to a batch's gradient g then have E‖g‖² = Σ_j E‖c_j‖²,
so

    R = Σ_batches ‖g‖² / Σ_examples ‖c_j‖²

is one but for chance. Of N batches its standard deviation is √(2/N) at most (that of Gaussian
contributions in one dimension; in d it is √d times less). A parameter whose R is further from
one than three of them is alive, however small; where nothing is known of examples, or every batch
has one, the size alone decides.

So *dead* means: nothing that was measured tells this gradient from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

#: A norm below this fraction of the largest is dead whatever made it so small: at 1e-18 of the
#: largest square no sum would notice it, and a logarithm would notice nothing else. For norms,
#: not squares.
DEAD_RELATIVE = 1e-9

#: c of the module's docstring.
ROUNDINGS = 8.0

#: Standard deviations by which R has to differ from one.
SIGMAS = 3.0

#: Unit roundoff by the name of a dtype: half the distance from 1 to the next larger number.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8,
}  # fmt: skip


def rounding_level(dtypes: Iterable[str], longest: int) -> float:
    """Rms of a gradient that is rounding, by the rms of that of the weight beside it, at most.

    Args:
        dtypes: of the measurement, as ``torch.bfloat16``; the coarsest counts. Names that are none
            of ``UNIT_ROUNDOFF`` say nothing; float32 if no other is there.
        longest: the longest side of that weight.
    """
    known = [UNIT_ROUNDOFF[n] for d in dtypes if (n := d.removeprefix("torch.")) in UNIT_ROUNDOFF]
    u = max(known, default=UNIT_ROUNDOFF["float32"])
    return ROUNDINGS * (u + math.sqrt(longest) * min(u, UNIT_ROUNDOFF["float32"]))


def has_direction(batch_sum_sq: float, example_sum_sq: float, n_batches: int) -> bool:
    """Whether examples agree, or disagree, on a gradient's direction more than by chance.

    Args:
        batch_sum_sq: squared norms of batch gradients, summed over the batches.
        example_sum_sq: squared norms of the examples' contributions to them, summed.
    """
    if not example_sum_sq > 0:
        return False
    return abs(batch_sum_sq / example_sum_sq - 1.0) > SIGMAS * math.sqrt(2.0 / n_batches)


def dead_parameters(
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    norms: Sequence[float],
    *,
    dtypes: Iterable[str],
    batch_sum_sq: Sequence[float | None],
    example_sum_sq: Sequence[float | None],
    n_examples: int,
    n_batches: int,
) -> list[str]:
    """Names of the parameters whose gradient nothing tells from rounding, in the order given.

    These are parameters below ``DEAD_RELATIVE`` of the largest norm, and biases (torch's and
    transformers' word for what is added) that are at rounding level beside the weights of their
    module, and whose examples have no direction in common: see the module. A module all of whose
    gradients are rounding, or a bias without a weight beside it, is found by the first rule alone.

    Args:
        names, shapes, norms: ``[P]`` of the parameters that were measured.
        dtypes: see :func:`rounding_level`.
        batch_sum_sq, example_sum_sq: ``[P]``, see :func:`has_direction`; None where not known.
        n_examples, n_batches: of the measurement; n_examples is 0 without per-example norms.
    """
    top = max(norms, default=0.0)
    dtypes = list(dtypes)
    reference = _weights_beside(names, shapes, norms)
    several = n_examples > n_batches  # a batch of one example is that example
    found = []
    for p, name in enumerate(names):
        if norms[p] <= DEAD_RELATIVE * top:
            found.append(name)
            continue
        module, _, own = name.rpartition(".")
        if "bias" not in own or module not in reference:
            continue
        beside, longest = reference[module]
        if norms[p] / math.sqrt(max(math.prod(shapes[p]), 1)) > (
            rounding_level(dtypes, longest) * beside
        ):
            continue
        together, apart = batch_sum_sq[p], example_sum_sq[p]
        known = several and together is not None and apart is not None and math.isfinite(apart)
        if not (known and has_direction(together or 0.0, apart or 0.0, n_batches)):
            found.append(name)
    return found


def _weights_beside(
    names: Sequence[str], shapes: Sequence[Sequence[int]], norms: Sequence[float]
) -> dict[str, tuple[float, int]]:
    """Module -> largest rms of its parameters that are no biases, and the longest side of that."""
    found: dict[str, tuple[float, int]] = {}
    for name, shape, norm in zip(names, shapes, norms, strict=True):
        module, _, own = name.rpartition(".")
        numel = math.prod(shape)
        if "bias" in own or not numel:
            continue
        rms = norm / math.sqrt(numel)
        if rms > found.get(module, (0.0, 0))[0]:
            found[module] = (rms, max(shape, default=1))
    return found


__all__ = ["DEAD_RELATIVE", "dead_parameters", "has_direction", "rounding_level"]
