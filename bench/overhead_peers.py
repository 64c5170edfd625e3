"""The peers of the step-overhead benchmark: steps that give each example's gradient norm.

Each maker returns a step, or one line that says why there is none. A step fills ``.grad`` as the
plain step does and returns the examples' norms ``[n_examples]`` over all parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]
TOLERANCE = 1e-3  # relative; looser than our own, since Opacus' sums are


def opacus_step(
    model: nn.Module, inputs: dict[str, Tensor], norms: np.ndarray | None = None
) -> Step | str:
    """A step with Opacus' ghost norms. It changes ``model``: pass one of its own.

    Args:
        norms: what the step must return; not checked if None.
    """
    try:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
    except ImportError:
        return "not installed (pip install 'fastgrad[bench]')"

    def make() -> Step:
        wrapped = GradSampleModuleFastGradientClipping(
            model,
            batch_first=True,
            loss_reduction="mean",
            max_grad_norm=1.0,
            use_ghost_clipping=True,
            strict=False,
        )

        def step() -> Tensor:
            model.zero_grad()
            wrapped(**inputs).loss.backward()
            return wrapped.get_norm_sample()

        return step

    return _tried(make, norms)


def for_opacus(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change model and batch so that Opacus can take them; returns the batch.

    Its embedding wants position ids per example, and a module that holds a second name of
    another's parameter (BERT's head has the decoder's bias) goes astray in it.
    """
    head = getattr(getattr(model, "cls", None), "predictions", None)
    if head is None:
        return inputs
    del head.bias  # still there as head.decoder.bias
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).repeat(ids.shape[0], 1)
    return inputs | {"position_ids": positions, "token_type_ids": torch.zeros_like(ids)}


def torch_func_step(
    model: nn.Module, inputs: dict[str, Tensor], norms: np.ndarray | None = None
) -> Step | str:
    """A step with ``torch.func``: vmap of grad, every example's gradient in memory at once.

    Attention has no batching rule on CPUs, so that vmap loops over examples there; the attention
    that has one (eager, or SDPA's math) was slower and larger at 64, 512 and 2048 tokens.

    Args:
        norms: what the step must return; not checked if None.
    """
    parameters = dict(model.named_parameters())
    n = inputs["input_ids"].shape[0]
    # the gradients, and half as much for activations and temporaries
    needed = int(1.5 * n * sum(p.numel() * p.element_size() for p in parameters.values()))
    if needed > (free := available_memory()):
        return f"would need {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"

    def make() -> Step:
        def loss(values: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
            batch = {name: tensor.unsqueeze(0) for name, tensor in example.items()}
            return torch.func.functional_call(model, values, (), batch).loss

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

        def step() -> Tensor:
            model.zero_grad()
            values = {name: p.detach() for name, p in parameters.items()}
            found = []
            for name, each in gradients(values, inputs).items():
                found.append(torch.linalg.vector_norm(each.flatten(1), dim=1))
                parameters[name].grad = each.mean(0)
            return torch.linalg.vector_norm(torch.stack(found), dim=0)

        return step

    return _tried(make, norms)


def available_memory() -> int:
    """Bytes that can be taken without swapping; without limit where Linux does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**63


def _tried(make: Callable[[], Step], norms: np.ndarray | None) -> Step | str:
    """The step, run once; or the first line of what is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step = make()
            found = step()
        except Exception as error:
            return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:70]}"
    if norms is not None:
        error = float((abs(found.double().numpy() - norms) / norms).max())
        if not error <= TOLERANCE:  # also if it is not a number
            return f"wrong: its norms are off by {error:.1e} relative"
    return step


__all__ = ["for_opacus", "opacus_step", "torch_func_step"]
