"""Training on the rows that matter now: scores from the model as it is choose among candidates."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgrad.concentration import FloatArray, IntArray
from fastgrad.errors import FastgradError, ProbeError
from fastgrad.identity import model_parameters
from fastgrad.measuring import (
    Loss,
    gradients_on,
    on_device,
    own_loss,
    stand_ins,
    untouched,
    whole_weights,
)
from fastgrad.partial import Partial
from fastgrad.probe import Probe, Reduction
from fastgrad.scores import Score, diverse_top, example_scores, profiles


@dataclass(frozen=True, eq=False)
class Chosen:
    """Rows of a candidate batch.

    Attributes:
        batch: the chosen rows, best first; what has no row for each candidate is as it was.
        rows: int64, their positions among the candidates.
        scores: float64, of all candidates.
    """

    batch: Any
    rows: IntArray
    scores: FloatArray


class BatchChooser:
    """Chooses from each candidate batch the rows with the most to teach.

        chooser = fg.BatchChooser(model, share=0.25, params=["lm_head.*"])
        for candidates in loader:                       # four times as many rows as are trained on
            batch = chooser.choose(candidates).batch
            model(**batch).loss.backward()
            ...

    Scoring costs a forward pass of the candidates and a backward pass down to the lowest parameter
    of ``params``. With the output layer alone that is little more than the forward pass, as in
    importance sampling by the last layer's gradient (Katharopoulos and Fleuret, ICML 2018). Nothing
    about the model changes: gradients, train mode, buffers and random state are what they were. The
    model is in evaluation mode meanwhile.

    Args:
        model: a transformers model, or any with ``loss`` given. Partial models are suspended.
        share: of the candidates that is chosen, 0 < share <= 1, rounded to at least one row.
        by: score, see :func:`fastgrad.example_scores`.
        params: name patterns (``fnmatch``) of the parameters whose gradients count; all by default.
        targets: target direction for ``alignment`` and ``cosine``, see :class:`fastgrad.Probe`;
            assign to :attr:`targets` to renew it.
        similarity: pass over near-duplicates, see :func:`fastgrad.diverse_top`; needs at least
            :data:`fastgrad.scores.MIN_BLOCKS` parameters that every candidate touches.
        largest: False takes the lowest scores, as a control.
        partial: what is trained, if the model is partial.
        loss: ``(model, batch) -> loss``; by default the one that a transformers model returns.
        loss_reduction: see :class:`fastgrad.Probe`.

    Raises:
        ProbeError: for a share or similarity outside its range, an unknown score or one without
            the direction it needs, or a pattern that matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        share: float = 0.25,
        *,
        by: Score = "norm",
        params: Sequence[str] | None = None,
        targets: Mapping[str, Any] | None = None,
        similarity: float | None = None,
        largest: bool = True,
        partial: Partial | None = None,
        loss: Loss = own_loss,
        loss_reduction: Reduction = "token_mean",
    ) -> None:
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ProbeError(f"share is a fraction of the candidates in (0, 1], got {share!r}")
        if by not in ("norm", "alignment", "cosine"):
            raise ProbeError(f"unknown score {by!r}; use norm, alignment or cosine")
        if by != "norm" and targets is None:
            raise ProbeError(f"by={by!r} needs a target direction. Remedy: targets=...")
        if similarity is not None and not 0 < similarity <= 1:
            raise ProbeError(f"similarity must lie in (0, 1], got {similarity}")
        if isinstance(params, str):
            raise ProbeError(f"params is a list of patterns; write [{params!r}]")
        self.model, self.share, self.by = model, float(share), by
        self.params = list(params) if params is not None else None
        self.targets, self.similarity, self.largest = targets, similarity, largest
        self.partial, self.loss, self.loss_reduction = partial, loss, loss_reduction
        names = list(model_parameters(model))
        for pattern in self.params or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ProbeError(f"params: the pattern {pattern!r} matches no parameter; names "
                                 f"look like {', '.join(names[:3])}")

    def choose(self, batch: Any) -> Chosen:
        """The best rows of a batch: a mapping of tensors and sequences with a row for each
        candidate, a tuple or list of them, or one tensor.

        Raises:
            FastgradError: if the batch has no rows, or not as many as the model saw examples.
            NonFiniteGradientError: if a gradient is NaN or infinite.
        """
        scores, features = self._scores(batch)
        # as the decimal number that was written: 0.29 of 100 rows is 29
        count = max(1, int(Fraction(repr(self.share)) * scores.size))
        wanted = scores if self.largest else -scores
        if features is not None and self.similarity is not None:
            rows = diverse_top(wanted, features, count, self.similarity)
        else:
            rows = np.argsort(-wanted, kind="stable")[:count].astype(np.int64)
        return Chosen(take_rows(batch, rows, scores.size), rows, scores)

    def _scores(self, batch: Any) -> tuple[FloatArray, FloatArray | None]:
        device = next(self.model.parameters()).device
        with (
            whole_weights(self.model, self.partial),
            gradients_on(),
            untouched(self.model),
            stand_ins(self.model),
        ):
            for name, p in model_parameters(self.model).items():
                others = self.params is not None and not any(
                    fnmatch.fnmatchcase(name, pattern) for pattern in self.params
                )
                if others and type(p) is nn.Parameter:  # a stand-in: nothing to put back
                    p.requires_grad_(False)
            probe = Probe(
                self.model, params=self.params, targets=self.targets, detail=(),
                loss_reduction=self.loss_reduction, hash_weights=False,
            )  # fmt: skip
            with probe:
                self.loss(self.model, on_device(device, batch)).backward()
            stats = probe.stats()
        features = profiles(stats) if self.similarity is not None else None
        return example_scores(stats, self.by), features


def take_rows(batch: Any, rows: IntArray, n: int) -> Any:
    """Rows of a batch of ``n``: of every tensor and array that has a row for each, and of lists
    and tuples of ``n`` entries inside a mapping or sequence (texts, say, or a tensor a row). A
    sequence of arrays that have ``n`` rows each, and the batch itself, is one of fields.

    Raises:
        FastgradError: if nothing in it has ``n`` rows.
    """
    found = False

    def take(value: Any, outer: bool = False) -> Any:
        nonlocal found
        if isinstance(value, Tensor | np.ndarray):
            if value.ndim == 0 or len(value) != n:
                return value
            found = True
            index = torch.from_numpy(rows).to(value.device) if isinstance(value, Tensor) else rows
            return value[index]
        if isinstance(value, Mapping):
            return {k: take(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            fields = all(isinstance(v, Tensor | np.ndarray) and v.ndim and len(v) == n
                         for v in value)  # fmt: skip
            if not outer and len(value) == n and not fields:
                found = True
                return type(value)([value[i] for i in rows.tolist()])
            parts = [take(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    taken = take(batch, outer=True)
    if not found:
        raise FastgradError(f"the model saw {n} examples, and nothing in the batch has as many "
                            "rows. Remedy: batches with the examples in the leading dimension")
    return taken


__all__ = ["BatchChooser", "Chosen", "take_rows"]
