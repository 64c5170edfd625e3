"""Bytes of live tensors while code runs, by what they are: exact, on real and on fake tensors.

Every storage that an operation returns counts from then until nobody holds it. What an operator's
kernel allocates and frees inside is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgrad.mode_queries import DEVICE, answer_of_class

TEMPORARY = "temporary"


@dataclass
class Section:
    """What happened to live bytes in a stretch of the run.

    Attributes:
        change: of the bytes of each kind, from its beginning to its end.
        most: the bytes of each kind beyond those at its beginning, when most were alive; None if
            nothing was allocated.
        freed: bytes of each kind that earlier sections had allocated, by section; of an input of
            the section's own code only if :meth:`LiveBytes.adopt` was not told.
        early: sections of which something was freed before something else was allocated.
    """

    change: Counter[str] = field(default_factory=Counter)
    most: Counter[str] | None = None
    freed: dict[Any, Counter[str]] = field(default_factory=dict)
    early: set[Any] = field(default_factory=set)


class LiveBytes(TorchDispatchMode):
    """Follows storages while it is active; innermost of all modes.

    Attributes:
        live: bytes alive now, by kind; what was not marked is ``temporary``.
        most: most bytes alive at once since :meth:`restart`.
        at_most: bytes by kind at that moment.
        sections: what happened since each :meth:`begin`, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        # storage: kind, bytes, section that it belongs to, weak reference
        self._kinds: dict[int, tuple[str, int, Any, Any]] = {}
        self.sections: dict[Any, Section] = {}
        self._name: Any = None
        self._section: Section | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the largest amount so far."""
        self.most, self.at_most = self.live.total(), Counter(self.live)

    def begin(self, name: Any, owner: Any = None) -> None:
        """A new section begins, and the one before it ends.

        Args:
            name: of the section.
            owner: what storages allocated in it belong to; the name by default.
        """
        self.end()
        self._name, self._section = name if owner is None else owner, Section()
        self.sections[name] = self._section
        self._before, self._most = Counter(self.live), -1

    def end(self) -> None:
        """The section ends."""
        if self._section is not None:
            self._section.change = _difference(self.live, self._before)
        self._name = self._section = None

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """The present section's code was given these: they count as its own."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._kinds:
                kind, size, _, reference = self._kinds[key]
                self._kinds[key] = kind, size, self._name, reference

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
            last, bytes_, owner, _ = self._kinds.pop(key)
            self.live[last] -= bytes_
            if self._section is not None and owner != self._name:
                self._section.freed.setdefault(owner, Counter())[last] += bytes_

        self._kinds[key] = kind, size, self._name, weakref.ref(storage, gone)
        self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return answer_of_class(func, types, args)
        out = func(*args, **(kwargs or {}))
        new = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._kinds:
                    self._follow(storage, TEMPORARY)
                    new = True
        if new:
            self._look()
        return out

    def _look(self) -> None:
        total = self.live.total()
        if total > self.most:
            self.most, self.at_most = total, Counter(self.live)
        if self._section is not None:
            self._section.early.update(self._section.freed)
            if total > self._most:
                self._most = total
                self._section.most = _difference(self.live, self._before)


def _difference(after: Counter[str], before: Counter[str]) -> Counter[str]:
    """``after - before``, negative numbers kept."""
    found = Counter(after)
    found.subtract(before)
    return found
