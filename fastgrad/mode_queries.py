"""What a dispatch mode is asked and has nothing to say to.

Every ``tensor.device`` of a fake tensor, from Python and from PyTorch's own code alike, passes
through all modes that are active, and is most of what a mode sees of a training step. No tensor
comes out of it, so a mode that follows tensors hands the question to the tensor's class at once,
which is where it ends up in any case.
"""

from __future__ import annotations

from typing import Any

import torch

#: Asks a tensor for its device.
DEVICE = torch.ops.prim.device.default


def answer_of_class(func: Any, types: Any, args: Any) -> Any:
    """What the class of the tensor ``args[0]`` answers to ``func``: what comes out behind the last
    mode."""
    return type(args[0]).__torch_dispatch__(func, types, args, {})
