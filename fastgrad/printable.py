"""Text of unknown origin, made safe to print. Standard library only."""

from __future__ import annotations

import re

# C0, DEL and C1 steer a terminal; line and paragraph separators and marks of direction make a line
# read as another one; lone surrogates cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """One line of text with what a terminal would obey, line breaks too, in Python's escapes."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """The same for text of several lines: line feeds and tabs stay."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)
