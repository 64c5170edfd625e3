"""SparseAdamW: AdamW with moments for the trained tensors alone, in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgrad.errors import NonFiniteGradientError
from fastgrad_kernels import ops


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for the parameters of a partial model.

    At 100 % it computes what ``torch.optim.AdamW`` computes. Moments are float32 whatever the
    parameter's dtype (float64 for float64), and stay so through ``load_state_dict``. State is 8
    bytes per trained element, plus 4 bytes per tensor for the step count.

    Args:
        params: tensors, named tensors or groups; ``partial.parameters()`` as a rule.
        lr: learning rate, float or scalar tensor.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        check_finite: look for NaN or infinity in every gradient before anything is changed.
            Costs one read of the gradients and, on a GPU, one synchronisation per step.

    Raises:
        ValueError: for impossible hyperparameters.
        NonFiniteGradientError: from :meth:`step`, naming the parameters; no parameter and no
            state has changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        check_finite: bool = True,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "check_finite": check_finite,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient.

        Raises:
            NonFiniteGradientError: if a gradient holds NaN or infinity; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr = torch.as_tensor(group["lr"], dtype=torch.float64, device="cpu")
            for params in self._by_kind(group["params"]):
                states = [self._state(p) for p in params]
                ops.adamw_(
                    params,
                    [p.grad for p in params],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [s["step"] for s in states],
                    lr,
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                    group["maximize"],
                )
        return loss

    def _check_gradients(self) -> None:
        named = [
            (name, p.grad)
            for g, group in enumerate(self.param_groups)
            if group["check_finite"]
            for name, p in zip(self._names(g), group["params"], strict=True)
            if p.grad is not None
        ]
        for name, grad in named:
            if grad.is_sparse:
                raise RuntimeError(
                    f"SparseAdamW does not support sparse gradients ({name}); its "
                    "sparsity is in the choice of blocks"
                )
        if not named:
            return
        norms = torch._foreach_norm([g for _, g in named])
        if not bool(torch.isfinite(torch.stack([n.float().cpu() for n in norms])).all()):
            # A norm can overflow where every entry is finite: only the entries decide.
            bad = [name for name, grad in named if not bool(torch.isfinite(grad).all())]
            if bad:
                raise NonFiniteGradientError(bad, "No parameter and no state was changed.")

    def _names(self, group: int) -> list[str]:
        known = self.param_groups[group].get("param_names")
        if known:
            return list(known)
        return [
            getattr(p, "_fastgrad_name", f"parameter {i} of group {group}, shape {tuple(p.shape)}")
            for i, p in enumerate(self.param_groups[group]["params"])
        ]

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            dtype = _moment_dtype(p)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        return state

    def _by_kind(self, params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
        """Parameters with a gradient, grouped by what one update call can take."""
        kinds: dict[Any, list[Tensor]] = {}
        for p in params:
            if p.grad is not None:
                kinds.setdefault((p.device, p.dtype, p.grad.dtype), []).append(p)
        return kinds.values()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # state of torch.optim.AdamW lacks what is ours alone
            group.setdefault("maximize", False)
            group.setdefault("check_finite", True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but moments keep their precision: the base class would round them to
        the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved_ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(saved_ids, params, strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                if i in state_dict["state"] and key in state_dict["state"][i]:
                    value = state_dict["state"][i][key]
                    moment = torch.empty_like(p, dtype=_moment_dtype(p))
                    self.state[p][key] = moment.copy_(value)

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(
            t.numel() * t.element_size()
            for s in self.state.values()
            for t in s.values()
            if isinstance(t, Tensor)
        )


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
