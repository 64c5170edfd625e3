"""Hostile blueprint files: only the library's own error, in bounded time and memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fastgrad.blueprint import Blueprint
from fastgrad.blueprint_schema import MAX_DOMAINS, MAX_ENTRIES
from fastgrad.blueprint_strict_json import (
    MAX_BYTES,
    MAX_LISTS,
    MAX_OBJECTS,
    MAX_VALUES,
    parse_json,
)
from fastgrad.errors import BlueprintError
from tests.test_blueprint import NAME, _use, made, set_at, values, write
from tests.test_selection import synthetic_stats

ROOT = Path(__file__).parent.parent
OTHERS = "gradient_blueprint.domains.safetensors"


class Text(str):
    """Shown as its length where a test fails."""

    def __repr__(self):
        return f"<{len(self)} characters>"


@pytest.fixture(scope="module")
def text():
    """A file with everything in it: vectors, two domains, a merge, checkpoints."""
    stats = [synthetic_stats(spec="row", seed=s) for s in range(3)]
    one, two, three = (
        Blueprint.from_stats(s, domain_tags=[tag], checkpoints=[("100%", 9, s)],
                             datasets=[{"name": tag, "revision": "r"}])
        for s, tag in zip(stats, "abc", strict=True)
    )  # fmt: skip
    return one.merge(two).with_domain(three).to_json()


@pytest.fixture(scope="module")
def plain(text):
    """The same without vectors, so that it can be read alone."""
    content = json.loads(text)
    content["block_vectors"] = content["domains"][0]["block_vectors"] = None
    return Text(json.dumps(content))


def refused(tmp_path, content, match=None):
    with pytest.raises(BlueprintError, match=match):
        Blueprint.from_pretrained(write(tmp_path, content))


# -- time and memory -----------------------------------------------------------------------------

# Peak memory and processor time of a process that reads one file, beyond what the imports took.
READER = """
import resource, sys, time
from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlueprintError
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before, start = peak(), time.process_time()
try:
    Blueprint.from_pretrained(sys.argv[1])
    print("accepted", end=" ")
except BlueprintError as error:
    assert len(str(error)) < 2000, len(str(error))
    print("refused", end=" ")
print((peak() - before) // 1024, time.process_time() - start)
"""


def _large(change):
    content = json.loads(made().to_json())
    change(content)
    return json.dumps(content).encode()


def _domains(content):
    entry = content["submodules"][0]
    many = [entry | {"name": str(i), "shape": [1]} for i in range(400)]
    domain = content | {"submodules": many, "dead": [], "k_star": {}}
    content |= {"submodules": many, "dead": [], "domains": [domain] * MAX_DOMAINS}
    content["model"]["n_parameters"] = domain["model"]["n_parameters"] = 400


CASES = {
    "no more than read": lambda: b" " * (MAX_BYTES + 1),
    "objects": lambda: b'{"a":[' + b'{"":0},' * (MAX_OBJECTS - 2) + b"0]}",
    "too many objects": lambda: b'{"a":[' + b"{}," * (9 * MAX_OBJECTS) + b"0]}",
    "too many lists": lambda: b'{"a":[' + b"[]," * (9 * MAX_LISTS) + b"0]}",
    "values": lambda: b'{"a":[' + b"0," * (MAX_VALUES // 4) + b"0]}",
    "too many values": lambda: b'{"a":[' + b"0," * (2 * MAX_VALUES) + b"0]}",
    "digits": lambda: b'{"a":' + b"9" * (MAX_BYTES // 2) + b"}",
    "decimals": lambda: b'{"a":0.' + b"9" * (MAX_BYTES // 2) + b"}",
    "wide letters": lambda: b'{"a":"' + "\U0001f600".encode() * (MAX_BYTES // 8) + b'"}',
    "wrong submodules": lambda: _large(set_at("submodules", [{}] * MAX_ENTRIES)),
    "wrong names": lambda: _large(set_at("dead", [0] * MAX_ENTRIES)),
    "wrong k": lambda: _large(set_at("fits", "norm", "lorenz", "k", ["x"] * MAX_ENTRIES)),
    "million k": lambda: _large(set_at("fits", "norm", "lorenz", "k", [0.5] * 1_000_000)),
    "wrong mapping": lambda: _large(set_at("k_star", {str(i): 0 for i in range(MAX_ENTRIES)})),
    "domains": lambda: _large(_domains),
}


QUICK = ("too many objects", "wrong submodules")  # the others with the slow tests: seconds each


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_time_and_memory_are_bounded(tmp_path, case):
    path = write(tmp_path, CASES[case]())
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, cwd=ROOT,
        check=True, timeout=120,
    )  # fmt: skip
    outcome, mebibytes, seconds = done.stdout.split()
    assert outcome == ("accepted" if case == "domains" else "refused")
    assert int(mebibytes) < 700
    assert float(seconds) < 15


# -- single attacks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("submodules", 0, "shape", [2**63 - 1] * 16), "more than"),
        (set_at("submodules", 0, "shape", [2**63]), "shape"),
        (set_at("submodules", 0, "shape", [-1]), "shape"),
        (set_at("submodules", 0, "batch_sum_sq", 10**300), "contradicts"),
        (set_at("submodules", 0, "batch_sum_sq", 10**390), "batch_sum_sq"),
        (set_at("submodules", 0, "n_batches", 10**399), "n_batches"),
        (set_at("submodules", 0, "name", ""), "name"),
        (set_at("domains", 0, "submodules", 0, "shape", [3, 3, 3, 3, 10**9]), "domains"),
        (set_at("domains", 0, "domains", 7), None),  # a key that a domain does not know: kept
        (set_at("merge", "sources", []), "sources"),
        (set_at("merge", "not_merged", [1]), "not_merged"),
        (set_at("data", "datasets", [{"name": ""}]), "datasets"),
        (set_at("k_star", "memory", "paper", {"value": -1}), "paper"),
        (set_at("schema_version", "1.2.0\n"), "schema_version"),
        (set_at("schema_version", "١.٢.٠"), "schema_version"),
    ],
)
def test_single_attacks(tmp_path, plain, change, message):
    content = json.loads(plain)
    change(content)
    if message is None:
        Blueprint.from_pretrained(write(tmp_path, json.dumps(content)))
    else:
        refused(tmp_path, json.dumps(content), message)


def test_halves_of_surrogate_pairs(tmp_path, plain):
    """JSON can escape half a surrogate pair, which no encoding of text can say."""
    half = "half of a surrogate pair"
    refused(tmp_path, plain.replace("layers.1.norm.weight", "layers\\ud800"), half)
    refused(tmp_path, plain.replace('"merge"', '"future": "\\ud800", "merge"'), half)


def test_limits_of_the_parser():
    assert parse_json(b"[" + b"9" * 400 + b"]") == [10**400 - 1]
    with pytest.raises(ValueError, match="401 digits"):
        parse_json(b"[" + b"9" * 401 + b"]")
    with pytest.raises(ValueError, match=r"more than .* objects"):
        parse_json(b"{" * (MAX_OBJECTS + 1))


# -- vectors -------------------------------------------------------------------------------------


def _with_others(folder, text, raw):
    """The file, and ``raw`` as the vectors of its other domain, under the right hash."""
    content = json.loads(text)
    content["domains"][0]["block_vectors"] = {
        "file": OTHERS, "sha256": hashlib.sha256(raw).hexdigest(), "spec": "row", "prefix": "0/",
    }  # fmt: skip
    (folder / OTHERS).write_bytes(raw)
    return write(folder, json.dumps(content))


def _safetensors(header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw


ENTRY = {"dtype": "F64", "shape": [7], "data_offsets": [0, 56]}


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 100) + b"{}",
        _safetensors(b"[" * 5000),
        _safetensors(b"{}" + b" " * 100) + b"surplus",
        _safetensors({"0/head.weight": ENTRY}),  # no data
        _safetensors({"0/head.weight": ENTRY | {"shape": [2**63]}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY | {"shape": [2**32, 2**32]}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY | {"data_offsets": [56, 0]}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY | {"data_offsets": [0, 2**60]}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY | {"dtype": "BF16"}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY | {"dtype": "O"}}) + bytes(56),
        _safetensors({"0/head.weight": ENTRY, "0/embed.weight": ENTRY}) + bytes(56),  # overlap
        _safetensors(b'{"0/a": %b, "0/a": %b}' % ((json.dumps(ENTRY).encode(),) * 2)) + bytes(56),
        save({"0/head.weight": np.full(7, np.inf)}),
        save({"0/head.weight": np.ones((7, 1))}),
        save({"0/" + "n" * 10_000: np.ones(7)}),
        b"\x80\x04cos\nsystem\n",  # a pickle
    ],
)  # fmt: skip
def test_attacks_on_the_vectors_of_a_domain(tmp_path, plain, raw):
    with pytest.raises(BlueprintError) as caught:
        Blueprint.from_pretrained(_with_others(tmp_path, plain, raw))
    assert len(str(caught.value)) < 1000


def test_good_vectors_are_read_by_the_same_way(tmp_path, plain):
    raw = save({"0/head.weight": np.arange(7.0), "1/head.weight": np.ones(3)})
    blueprint = Blueprint.from_pretrained(_with_others(tmp_path, plain, raw))
    np.testing.assert_array_equal(blueprint.domain("c").block_sq["head.weight"], np.arange(7.0))


def test_files_of_vectors_are_no_way_out_of_the_folder(tmp_path, plain):
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".safetensors",
                 "x.safetensors\n", "..\\x.safetensors", "x.pt"):  # fmt: skip
        content = json.loads(plain)
        content["domains"][0]["block_vectors"] = {"file": name, "sha256": "0" * 64, "spec": "row"}
        refused(tmp_path, json.dumps(content), r"domains\.0\.block_vectors\.file")


# -- fuzz ----------------------------------------------------------------------------------------


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else (
        list(enumerate(value))[:1] if isinstance(value, list) else ()
    )  # fmt: skip
    for key, child in items:
        yield from _places(child, (*path, key))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_fuzz_a_file_with_everything(tmp_path_factory, plain, data):
    content = json.loads(plain)
    places = [p for p in _places(content) if p]
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places))
        target = content
        try:
            for key in path:
                target = target[key]
            if data.draw(st.booleans()):
                target[last] = data.draw(values)
            else:
                del target[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
    path = write(tmp_path_factory.mktemp("f"), json.dumps(content))
    try:
        blueprint = Blueprint.from_pretrained(path)
    except BlueprintError:
        return
    _use(blueprint)
    for domain in blueprint.domains:
        domain.summary()
        assert domain.diff(blueprint).text()
    blueprint.nearest_domain(synthetic_stats()).to_dict()
    other = made(seed=11)
    for one, two in ((blueprint, other), (other, blueprint)):
        for action in (one.merge, one.with_domain):
            with contextlib.suppress(BlueprintError):
                action(two)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_fuzz_vectors_of_a_domain(tmp_path_factory, plain, data):
    raw = bytearray(save({"0/head.weight": np.arange(7.0)}, {"fastgrad": "{}"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        if not raw:
            break
    try:
        found = Blueprint.from_pretrained(
            _with_others(tmp_path_factory.mktemp("f"), plain, bytes(raw))
        )
    except BlueprintError:
        return
    for values_of_blocks in found.domains[1].block_sq.values():
        assert np.isfinite(values_of_blocks).all()


def test_truncations_of_a_file_with_everything(tmp_path, plain):
    for cut in range(0, len(plain) - 2, 997):
        refused(tmp_path, plain[:cut])
    assert (tmp_path / NAME).exists()
