"""JSON read and written strictly: no loophole of the format, and equal content in equal bytes.

Read in bounded time and memory whatever the bytes are. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_BYTES = 64 * 2**20

#: An object takes about 40 times the bytes in memory that it takes in the file, a list 30 times:
#: they are counted before any is made. A file of :data:`MAX_BYTES` in the form that
#: :func:`canonical_json` writes stays far below.
MAX_OBJECTS = 2**19
MAX_LISTS = 2**19
MAX_VALUES = 2**23
MAX_DIGITS = 400  # the largest double has 309; conversion takes the square of the digits
MAX_DEPTH = 64  # the blueprint's schema itself needs 7 levels; extra keys get the rest

# Few files have any, so that the strings of most need not be looked at.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """JSON without its loopholes: no NaN, infinity, overflow, repeated key, deep
    nesting or half of a surrogate pair.

    Raises:
        ValueError: with the reason in words; nothing else, whatever the bytes are.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; no such file is larger than {MAX_BYTES}")
    for sign, what, most in ((b"{", "objects", MAX_OBJECTS), (b"[", "lists", MAX_LISTS),
                             (b",", "values", MAX_VALUES)):  # fmt: skip
        if data.count(sign) > most:
            raise ValueError(f"more than {most} {what}; no such file has as many")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_whole,
            object_pairs_hook=_unique_keys,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    if _SURROGATE.search(data):
        check_text(value)
    return value


def check_text(value: Any) -> None:
    """Refuse strings, keys too, that no text can hold: JSON can say half of a surrogate pair.

    Raises:
        ValueError: with such a string.
    """
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node
            waiting += node.values()
        elif isinstance(node, list | tuple):
            waiting += node
        elif isinstance(node, str) and not node.isascii():
            try:
                node.encode("utf-8")
            except UnicodeEncodeError as error:
                around = node[max(0, error.start - 20) : error.end + 20]
                raise ValueError(
                    f"half of a surrogate pair, which is no Unicode text: {around!a}"
                ) from None


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; no such file holds one")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} overflows")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} is repeated")
            seen.add(key)
    return result


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def canonical_json(value: Any) -> str:
    """Equal content gives equal bytes: sorted keys, shortest exact floats, ASCII, one newline.

    Raises:
        ValueError: for NaN or infinity.
    """
    text = json.dumps(
        _without_negative_zero(value), sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False
    )
    return text + "\n"


def _without_negative_zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_negative_zero(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_negative_zero(v) for v in value]
    return 0.0 if isinstance(value, float) and value == 0.0 else value


def finite_or_none(value: Any) -> Any:
    """The same JSON value with None for NaN and infinity, which JSON cannot say."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
