"""Bytes of live tensors while code runs, by what they are: exact, on real and on fake tensors.

Every storage that an operation returns counts from then until nobody holds it. What an operator's
kernel allocates and frees inside is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEMPORARY = "temporary"


class LiveBytes(TorchDispatchMode):
    """Follows storages while it is active; innermost of all modes.

    Attributes:
        live: bytes alive now, by kind; what was not marked is ``temporary``.
        most: most bytes alive at once since :meth:`restart`.
        at_most: bytes by kind at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self._kinds: dict[int, tuple[str, int, Any]] = {}  # storage: kind, bytes, weak reference
        self.restart()

    def restart(self) -> None:
        """Forget the largest amount so far."""
        self.most, self.at_most = self.live.total(), Counter(self.live)

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of these tensors as ``kind``, unless they are of a kind already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._kinds.get(storage._cdata)
            if known is None:
                self._follow(storage, kind)
            elif known[0] == TEMPORARY:
                self.live[TEMPORARY] -= known[1]
                self.live[kind] += known[1]
                self._kinds[storage._cdata] = (kind, *known[1:])

    def _follow(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(reference: Any) -> None:
            last, bytes_, _ = self._kinds.pop(key)
            self.live[last] -= bytes_

        self._kinds[key] = kind, size, weakref.ref(storage, gone)
        self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._kinds:
                    self._follow(storage, TEMPORARY)
                    new = True
        if new and (total := self.live.total()) > self.most:
            self.most, self.at_most = total, Counter(self.live)
        return out
