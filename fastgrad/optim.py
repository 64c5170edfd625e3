"""SparseAdamW: AdamW with moments for the trained tensors alone, in full precision."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgrad.errors import NonFiniteGradientError, PartialError
from fastgrad.optim_arguments import (
    MOMENTS,
    OptimizerError,
    check_fits,
    checked,
    moment_dtype,
    pairs,
    refuse,
)
from fastgrad.optim_prepared import PreparedStep, prepare, signature
from fastgrad.sharded import agreed, is_sharded, local
from fastgrad_kernels import ops
from fastgrad_kernels.dispatch import capturing, keep, upload

Key = TypeVar("Key")


class SparseAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for the parameters of a partial model.

    At 100 % it computes what ``torch.optim.AdamW`` computes, takes AdamW's arguments in AdamW's
    order and loads AdamW's state. Moments are float32 whatever the parameter's dtype (float64 for
    float64), and stay so through ``load_state_dict``. State is 8 bytes per trained element, plus 4
    bytes per tensor for the step count, or per block where each block has its own. Packed blocks
    are written through to the full weights in the same pass; on a GPU a step is two launches for
    all tensors of a dtype, and the learning rate may be a tensor there.

    Args:
        params: tensors, named tensors or groups; ``partial.parameters()`` as a rule.
        lr: learning rate, float or scalar tensor.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; complex parameters too.
        amsgrad, differentiable: AdamW's, False alone.
        foreach, fused: AdamW's; they choose an implementation there. Here is one, which is both.
        capturable: steps will be captured in a CUDA graph. All state lies on the GPU in any case;
            this turns ``check_finite`` off, for which the host would have to wait.
        check_finite: look for NaN or infinity in every gradient before anything is changed.
            Costs one read of the gradients and, on a GPU, one synchronisation per step. Under a
            GradScaler its own check takes this place: a step with infinite gradients is skipped.
            On by default, unless ``capturable``.
        stochastic_rounding: round bfloat16 parameters that have no float32 master copy up or down
            at random, so that small updates are right on average (arXiv 2010.06192).
        seed: of stochastic rounding; the same seed and steps give the same bits on one device.

    A first step at learning rate zero with nothing but zero gradients makes the state and is not
    counted: ``torch.distributed.checkpoint`` does that to see what it has to save or load.

    Raises:
        ValueError, RuntimeError: AdamW's own, for impossible hyperparameters.
        OptimizerError: for options of AdamW that this optimizer does not have, and from
            :meth:`load_state_dict` for a state of other tensors; nothing has changed then.
        NonFiniteGradientError: from :meth:`step`, naming the parameters; no parameter and no
            state has changed then.
    """

    # GradScaler hands its scale and its finding over instead of waiting for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        check_finite: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        betas = checked(
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        if capturable and check_finite:
            raise OptimizerError(
                "check_finite=True waits for the GPU at each step, which a CUDA graph cannot hold "
                "(capturable=True). Remedy: check_finite=False"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "check_finite": not capturable if check_finite is None else check_finite,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        # ids of the blocks that the last step wrote
        self._fastgrad_written: set[int] | frozenset[int] = set()
        self.forget_step()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch.

        Raises:
            OptimizerError: for options that SparseAdamW does not have.
        """
        if isinstance(param_group, dict):  # else PyTorch says what is wrong
            refuse(param_group)
        super().add_param_group(param_group)

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
        usual = scale is None and found is None and not torch.compiler.is_compiling()
        if usual and self._step_again():
            return
        self._check_layouts()
        if found is None:
            if self._initialised_for_a_checkpoint():
                return
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
        if usual:
            self._prepare()

    def forget_step(self) -> None:
        """Let go of what is kept for steps with the same tensors; the next one finds it anew.

        Never needed for a right result, only to free the memory of tensors that were taken out of
        the optimizer by hand before the next step does.
        """
        self._prepared: PreparedStep | None = None
        self._stepped: list[Any] = []

    def _prepare(self) -> None:
        """Keep what a step like the one before and this one needs."""
        stepped = signature(self)
        self._prepared = prepare(self) if stepped == self._stepped else None
        self._stepped = stepped

    def _step_again(self) -> bool:
        """The step before once more, with new gradients, if nothing else has changed."""
        if self._prepared is None:
            return False
        grads = self._prepared.gradients(self)
        if grads is None:
            self.forget_step()
            return False
        looked_at = [
            (key, grad)
            for key, grad in zip(self._prepared.keys, grads, strict=True)
            if self.param_groups[key[0]]["check_finite"]
        ]
        if looked_at:
            self._raise_for([self._names(g)[i] for g, i in _nonfinite(looked_at)])
        self._fastgrad_written = set()
        for blocks in self._prepared.blocks:
            blocks.check_untouched()
        self._prepared(self, grads, _host_number)
        self._fastgrad_written = self._prepared.written
        return True

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
            [_real(local(p)) for p in params],
            [_real(local(p.grad).resolve_conj()) for p in params],
            [_real(local(s["exp_avg"])) for s in states],
            [_real(local(s["exp_avg_sq"])) for s in states],
            [s["step"] for s in states],
            [full for full, _ in targets],
            [ids for _, ids in targets],
            _scalar(group["lr"], torch.float64, device),
            float(beta1),
            float(beta2),
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
                self._fastgrad_written |= {id(blocks)}

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

    def _initialised_for_a_checkpoint(self) -> bool:
        """Make the state and do nothing else, if that is all that is wanted."""
        if self.state or any(bool(g["lr"] != 0) for g in self.param_groups):
            return False
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        some = [f"parameter {i}" for i, p in enumerate(params) if bool(local(p.grad).any())]
        if agreed(some, params, lambda: [f"parameter {i}" for i in range(len(params))]):
            return False
        for p in params:
            self._state(p)
        self._fastgrad_written = set()
        return bool(params)

    def _check_layouts(self) -> None:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        f"SparseAdamW does not support sparse gradients ({self._names(g)[i]}); "
                        "its sparsity is in the choice of blocks"
                    )

    def _check_gradients(self) -> None:
        by_device: dict[torch.device, list[tuple[tuple[int, int], Tensor]]] = {}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"] if group["check_finite"] else ()):
                if p.grad is not None:
                    grad = local(p.grad)
                    by_device.setdefault(grad.device, []).append(((g, i), grad))
        for device in by_device:
            if capturing(device):
                raise RuntimeError(
                    "SparseAdamW looks for NaN in the gradients, for which the host waits: this "
                    "cannot be captured in a CUDA graph. Remedy: SparseAdamW(..., capturable=True)"
                )
        bad = agreed(
            [self._names(g)[i] for named in by_device.values() for g, i in _nonfinite(named)],
            [p for group in self.param_groups for p in group["params"]],
            lambda: [n for g in range(len(self.param_groups)) for n in self._names(g)],
        )
        self._raise_for(bad)

    @staticmethod
    def _raise_for(bad: Sequence[str]) -> None:
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
            dtype = moment_dtype(p)
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
            group.setdefault("capturable", False)
            group.setdefault("check_finite", not group["capturable"])
            group.setdefault("stochastic_rounding", False)
            group.setdefault("seed", 0)
        self.__dict__["_fastgrad_written"] = set()
        self.forget_step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but moments keep their precision: the base class would round them to
        the parameter's dtype.

        Raises:
            OptimizerError: if the state was saved for tensors of other shapes, or with options
                that SparseAdamW does not have; nothing has changed then.
        """
        final = state_dict

        def look(_: Optimizer, found: dict[str, Any]) -> None:
            nonlocal final
            final = found
            check_fits(found, self.param_groups)

        # After the user's hooks, which may exchange the state, and before those that see it loaded
        before = self.register_load_state_dict_pre_hook(look)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(final), True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Moments and counts of a saved state in full precision, as tensors of our own."""
        for p, state in pairs(saved, self.param_groups):
            for key in MOMENTS:
                if key in state:
                    moment = torch.empty_like(p, dtype=moment_dtype(p))
                    self.state[p][key] = moment.copy_(state[key])
            if "step" in state:
                count = torch.as_tensor(state["step"])
                device = p.device if p.is_cuda else "cpu"
                self.state[p]["step"] = count.to(device, torch.float32, copy=True)

    def count_by_block(self) -> None:
        """Give each packed block a step count of its own, as a re-selection does where it has to.

        Nothing else changes, but a ``torch.distributed.checkpoint`` of a run that has re-selected
        can be loaded: it loads into tensors of the shapes that it saved, and a fresh optimizer
        counts by tensor. Makes the state of all parameters. Costs 4 bytes per block.

        Raises:
            PartialError: under ``fully_shard``, where re-selection is refused too.
        """
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if is_sharded(p):
                    raise PartialError(
                        f"{self._names(g)[i]} is sharded: a count of each block would not fit the "
                        "blocks of one process. Remedy: count by tensor, as fully_shard does"
                    )
        for group in self.param_groups:
            for p in group["params"]:
                state = self._state(p)
                blocks = getattr(p, "_fastgrad_blocks", None)
                if blocks is not None and p.ndim == 3 and state["step"].ndim == 0:
                    state["step"] = state["step"].repeat(p.shape[0])

    def state_bytes(self) -> int:
        """Bytes of all state tensors; of this process' shards under ``fully_shard``."""
        return sum(
            local(t).numel() * t.element_size()
            for s in self.state.values()
            for t in s.values()
            if isinstance(t, Tensor)
        )


def _nonfinite(named: Sequence[tuple[Key, Tensor]]) -> list[Key]:
    """Keys of gradients of one device that hold NaN or infinity; a GPU is waited for once."""
    grads = [g for _, g in named]
    if grads[0].is_cuda:
        flat = [_real(g.resolve_conj()).reshape(-1) for g in grads]
        whole = [1] * len(flat), [max(g.numel(), 1) for g in flat]
        counts = ops.grad_stats(flat, *whole)[1][3].tolist()
        return [key for (key, _), count in zip(named, counts, strict=True) if count]
    # NaN and infinity stay in a sum, and no reading is faster. The last gradients first: the
    # update begins with the others, which are in cache then. A sum can overflow where every entry
    # is finite: only the entries decide.
    suspects = [(k, g) for k, g in reversed(named) if not cmath.isfinite(g.sum().item())]
    return [key for key, g in reversed(suspects) if not bool(torch.isfinite(g).all())]


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones: AdamW treats the parts as weights of their own."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@keep
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return upload(torch.tensor(value, dtype=dtype, device="cpu"), device)


def _host_number(value: float | Tensor) -> Tensor:
    return _scalar(value, torch.float64, torch.device("cpu"))


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A hyperparameter as a tensor on the device; the same number is copied there once."""
    if isinstance(value, Tensor):
        return value.to(device)
    return _constant(value, dtype, device)
