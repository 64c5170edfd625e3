"""LISA: layers drawn at random take turns, embedding and head are always trained.

Written from the description in the paper (Pan et al., "LISA: Layerwise Importance Sampling for
Memory-Efficient Large Language Model Fine-Tuning", arXiv 2403.17919, Algorithm 1): every
``period`` steps all layers are frozen except ``active`` of them, drawn uniformly, and AdamW
trains those together with what lies outside the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class LisaAdamW(torch.optim.AdamW):
    """AdamW over a part of the layers that is drawn anew every ``period`` steps.

    A layer that is frozen loses its moments, so that memory is that of ``active`` layers; one
    that is drawn twice in a row keeps them. ``requires_grad`` of the layers' parameters follows
    the draw: the backward pass computes no gradient for the others.

    Args:
        always: parameters that are trained at every step.
        layers: the parameters of each layer.
        active: layers trained at a time.
        period: steps between draws.
        seed: of the draws.
        kwargs: as for ``torch.optim.AdamW``.

    Raises:
        ValueError: if there are fewer than ``active`` layers, or a count is below 1.
    """

    def __init__(
        self,
        always: Sequence[nn.Parameter],
        layers: Sequence[Sequence[nn.Parameter]],
        *,
        active: int,
        period: int,
        seed: int,
        **kwargs: Any,
    ) -> None:
        if not 1 <= active <= len(layers) or period < 1:
            raise ValueError(
                f"active is {active} of {len(layers)} layers and period is {period}. Remedy: at "
                "least one of each, and no more layers than there are"
            )
        super().__init__([*always, *(p for layer in layers for p in layer)], **kwargs)
        self._layers, self._active, self._period = layers, active, period
        self._generator = torch.Generator().manual_seed(seed)
        self._done = 0
        self.drawn: list[int] = []
        self._draw()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self._done += 1
        if self._done % self._period == 0:
            self._draw()
        return loss

    def _draw(self) -> None:
        order = torch.randperm(len(self._layers), generator=self._generator)
        self.drawn = sorted(order[: self._active].tolist())
        for i, layer in enumerate(self._layers):
            for p in layer:
                p.requires_grad_(i in self.drawn)
                if i not in self.drawn:
                    p.grad = None
                    self.state.pop(p, None)
