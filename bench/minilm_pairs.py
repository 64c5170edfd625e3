"""Pairs of real texts that belong together: two domains that every Python carries, both about
Python, and one of the law: licences of packages that this library needs."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution

from fastgrad.quickstart.corpus import read_code, read_prose

_CODE_BYTES = 5_000_000  # in files drawn from the whole library
_SHORTEST = 8  # words of a docstring's first paragraph, and of a paragraph of prose
_LICENSED = ("accelerate", "matplotlib", "numpy", "pillow", "scipy", "torch")
_BODY = (60, 4000)  # characters of a function without its docstring


@dataclass(frozen=True)
class Pairs:
    """Pairs of a domain, in a random order that depends on the seed alone.

    Attributes:
        name: of the domain.
        source: what the texts were taken from, in words.
        pairs: ``(text, text that belongs to it)``.
        n_all: how many there are in the source.
    """

    name: str
    source: str
    pairs: list[tuple[str, str]]
    n_all: int


def code_pairs(n: int, seed: int) -> Pairs:
    """Docstring and code of functions of the standard library: the first paragraph of the one,
    and the other without it."""
    found: list[tuple[str, str]] = []
    for documents in read_code(_CODE_BYTES).values():
        for text in documents:
            found += _functions(text)
    return _drawn("code", "Python standard library, docstrings and code", found, n, seed)


def prose_pairs(n: int, seed: int) -> Pairs:
    """Neighbouring paragraphs of Python's help topics; each paragraph is in one pair."""
    found: list[tuple[str, str]] = []
    for documents in read_prose().values():
        for text in documents:
            found += _neighbours([" ".join(p.split()) if _is_prose(p) else ""
                                  for p in _paragraphs(text)])  # fmt: skip
    return _drawn("prose", "Python help topics, neighbouring paragraphs", found, n, seed)


def licence_pairs(n: int, seed: int) -> Pairs:
    """Neighbouring paragraphs of licences; each paragraph is in one pair, though many packages
    have it."""
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name in _LICENSED:
        for file in sorted(distribution(name).files or (), key=str):
            inside = ".dist-info" in str(file)
            if not (inside and re.match(r"(?i)licen[cs]e|copying|notice", file.name)):
                continue
            run: list[str] = []
            for paragraph in _paragraphs(file.read_text()):
                text = " ".join(paragraph.split())
                new = _is_prose(text, ends=".;:,") and text not in seen and text not in run
                run.append(text if new else "")
            pairs = _neighbours(run)
            seen.update(text for pair in pairs for text in pair)
            found += pairs
    source = f"licences of {', '.join(_LICENSED)}, neighbouring paragraphs"
    return _drawn("licences", source, found, n, seed)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _neighbours(run: list[str]) -> list[tuple[str, str]]:
    """Each text with the next one; "" is none, and none is in two pairs."""
    found, at = [], 0
    while at + 1 < len(run):
        if run[at] and run[at + 1]:
            found.append((run[at], run[at + 1]))
            at += 1
        at += 1
    return found


def _functions(text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
        if len(words) < _SHORTEST or len(node.body) < 2:
            continue
        node.body = node.body[1:]
        code = ast.unparse(node)
        if _BODY[0] <= len(code) <= _BODY[1]:
            yield " ".join(words), code


def _is_prose(paragraph: str, ends: str = ".") -> bool:
    """No listing, table or grammar: whole sentences of words, and few marks."""
    text = " ".join(paragraph.split())
    letters = sum(c.isalpha() or c in " ,.'" for c in text)
    whole = len(text.split()) >= _SHORTEST and text.endswith(tuple(ends))
    return whole and letters >= 0.85 * len(text)


def _drawn(name: str, source: str, found: list[tuple[str, str]], n: int, seed: int) -> Pairs:
    unique = sorted(set(found))
    if len(unique) < n:
        raise SystemExit(f"{name}: {n} pairs are wanted and there are {len(unique)}")
    random.Random(seed).shuffle(unique)
    return Pairs(name, source, unique[:n], len(unique))
