"""SparseAdamW: AdamW with moments for the trained tensors alone, in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgrad.errors import NonFiniteGradientError
from fastgrad.sharded import agreed, local
from fastgrad_kernels import ops
from fastgrad_kernels.dispatch import keep, upload


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for the parameters of a partial model.

    At 100 % it computes what ``torch.optim.AdamW`` computes. Moments are float32 whatever the
    parameter's dtype (float64 for float64), and stay so through ``load_state_dict``. State is 8
    bytes per trained element, plus 4 bytes per tensor for the step count. Packed blocks are written
    through to the full weights in the same pass; on a GPU a step is two launches for all tensors
    of a dtype, and the learning rate may be a tensor there.

    Args:
        params: tensors, named tensors or groups; ``partial.parameters()`` as a rule.
        lr: learning rate, float or scalar tensor.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        check_finite: look for NaN or infinity in every gradient before anything is changed.
            Costs one read of the gradients and, on a GPU, one synchronisation per step. Under a
            GradScaler its own check takes this place: a step with infinite gradients is skipped.
        stochastic_rounding: round bfloat16 parameters that have no float32 master copy up or down
            at random, so that small updates are right on average (arXiv 2010.06192).
        seed: of stochastic rounding; the same seed and steps give the same bits on one device.

    Raises:
        ValueError: for impossible hyperparameters.
        NonFiniteGradientError: from :meth:`step`, naming the parameters; no parameter and no
            state has changed then.
    """

    # GradScaler hands its scale and its finding over instead of waiting for the device.
    _step_supports_amp_scaling = True

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
        stochastic_rounding: bool = False,
        seed: int = 0,
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
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        self._fastgrad_written: set[int] = set()  # ids of the blocks that the last step wrote
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
        try:
            self._step()
        except Exception:
            # GradScaler takes these back only after a step that returns; the next step would see
            # them as its own.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def _step(self) -> None:
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found is None:
            self._check_gradients()
        self._fastgrad_written = set()
        packed = [
            getattr(p, "_fastgrad_blocks", None) for g in self.param_groups for p in g["params"]
        ]
        for blocks in packed:
            if blocks is not None:
                blocks.check_untouched()
        for number, (group, params) in enumerate(
            (g, ps) for g in self.param_groups for ps in self._by_kind(g["params"])
        ):
            self._update(group, params, scale, found, number)

    def _update(
        self,
        group: dict[str, Any],
        params: Sequence[Any],
        scale: Tensor | None,
        found: Tensor | None,
        number: int,
    ) -> None:
        """One step of parameters of one device and dtype, the ``number``-th of these lists."""
        states = [self._state(p) for p in params]
        # Scalars lie where the update reads them: on a GPU, else on the host (some devices have
        # no float64).
        device = params[0].device if params[0].is_cuda else torch.device("cpu")
        targets, (beta1, beta2) = self._targets(params), group["betas"]
        rounding = group["stochastic_rounding"]
        # A step that is skipped for infinity writes nothing through.
        written = [
            full.numel() > 0 and (found is None or p._fastgrad_blocks.in_sync)
            for p, (full, _) in zip(params, targets, strict=False)
        ]
        ops.adamw_(
            [local(p) for p in params],
            [local(p.grad) for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [s["step"] for s in states],
            [full for full, _ in targets],
            [ids for _, ids in targets],
            _scalar(group["lr"], torch.float64, device),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            None if scale is None else scale.to(params[0].device),
            None if found is None else found.to(params[0].device),
            _scalar(group["seed"] + 1_000_003 * number, torch.int64, device) if rounding else None,
        )
        for p, (full, _), done in zip(params, targets, written, strict=False):
            if full.numel():
                blocks = p._fastgrad_blocks
                blocks.written() if done else blocks.write_again()
                self._fastgrad_written.add(id(blocks))

    def _targets(self, params: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Full weight and block numbers of each parameter, empty tensors where there is nothing to
        write through to; an empty list if that is so for all."""
        found = [
            None if (b := getattr(p, "_fastgrad_blocks", None)) is None else b.target()
            for p in params
        ]
        if all(f is None for f in found):
            return []
        return [
            (p.new_empty(0), p.new_empty(0, dtype=torch.int64)) if f is None else f
            for p, f in zip(params, found, strict=True)
        ]

    def _check_gradients(self) -> None:
        named = [
            (name, local(p.grad))
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
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, grad in named:
            by_device.setdefault(grad.device, []).append((name, grad))
        bad = agreed(
            [name for group in by_device.values() for name in _nonfinite(group)],
            [p for group in self.param_groups for p in group["params"]],
            lambda: [n for g in range(len(self.param_groups)) for n in self._names(g)],
        )
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
            # on a GPU a count on the host would have to be waited for, or copied each step
            device = p.device if p.is_cuda else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
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
            group.setdefault("stochastic_rounding", False)
            group.setdefault("seed", 0)
        self.__dict__["_fastgrad_written"] = set()

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
            if "step" in self.state[p]:
                count = torch.as_tensor(self.state[p]["step"])
                device = p.device if p.is_cuda else "cpu"
                self.state[p]["step"] = count.to(device, torch.float32, copy=True)

    def state_bytes(self) -> int:
        """Bytes of all state tensors; of this process' shards under ``fully_shard``."""
        return sum(
            local(t).numel() * t.element_size()
            for s in self.state.values()
            for t in s.values()
            if isinstance(t, Tensor)
        )


def _nonfinite(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """Names of gradients of one device that hold NaN or infinity; a GPU is waited for once."""
    grads = [g for _, g in named]
    if grads[0].is_cuda:
        whole = [1] * len(grads), [max(g.numel(), 1) for g in grads]
        counts = ops.grad_stats([g.reshape(-1) for g in grads], *whole)[1][3].tolist()
        return [name for (name, _), count in zip(named, counts, strict=True) if count]
    norms = torch._foreach_norm(grads)
    if bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()):
        return []
    # A norm can overflow where every entry is finite: only the entries decide.
    return [name for name, grad in named if not bool(torch.isfinite(grad).all())]


@keep
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return upload(torch.tensor(value, dtype=dtype, device="cpu"), device)


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A hyperparameter as a tensor on the device; the same number is copied there once."""
    if isinstance(value, Tensor):
        return value.to(device)
    return _constant(value, dtype, device)


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
