"""What the compiler makes of every shipped kernel, for chips that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest

from fastgrad_kernels import compile_check
from fastgrad_kernels.compile_check import SHARED_LIMIT, TARGETS, Facts

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# The other modules are checked beside their own tests, and all in the slow test below.
PRODUCTS = ("cross_influence", "gram", "sparse_wgrad")
# fp16 differs from bf16 in the name of the matrix instruction alone, and float32 uses none: the
# slow tests see to both.
QUICK = r"^(?!.*fp(16|32))"


def check_all(facts):
    assert facts
    for f in facts:
        assert f.stack == 0, f"{f.name} on {f.target} spills {f.stack} bytes per thread"
        assert f.fits, f"{f.name} on {f.target} wants {f.shared} bytes of shared memory"
        if f.name.startswith(("cross_influence", "gram", "sparse_wgrad")):
            check_products(f)


def check_products(f):
    small = "/16x16" in f.name  # less than one instruction of the newest units
    # Newer units take 32-bit factors only with tokens side by side, ours have features so: TF32
    # turns them on the way to shared memory, 32 bits at a time.
    if not small and "tf32" not in f.name:
        assert f.wide_loads, f"{f.name} on {f.target} has no 128-bit loads"
    if "fp32" in f.name:
        # float32 stays float32: no tf32 on the matrix units of an NVIDIA chip.
        assert f.target.startswith("hip") or not f.matrix, f
        return
    unit = {
        "cuda:80": "mma.sync",
        "cuda:90": "wgmma",
        "cuda:100": "tcgen05",
        "hip:gfx942": "mfma",
    }[f.target]
    if small and unit in ("wgmma", "tcgen05"):
        unit = "mma.sync"
    assert set(f.matrix) == {unit}, f
    if unit == "wgmma":
        # The flat loop must not wait for each product before it loads on.
        assert f.overlapped, f"{f.name}: products wait for one another"


def test_hopper():
    check_all(compile_check.check(PRODUCTS, ["cuda:90"], QUICK))


def test_ampere():
    check_all(
        compile_check.check(
            PRODUCTS, ["cuda:80"], r"(cross_influence/(grad|norms)|sparse_wgrad|gram)/bf16/(128|64)"
        )
    )


@pytest.mark.slow
def test_every_form_on_every_target():
    facts = compile_check.check()
    check_all(facts)
    assert {f.target for f in facts} == set(TARGETS)
    assert len({(f.name, f.target) for f in facts}) == len(facts)
    committed = json.loads((ROOT / "bench" / "results" / "compile.json").read_text())
    if committed["environment"]["triton"] == version("triton"):
        # what docs/kernels.md shows is what the compiler makes of today's kernels
        fresh = [{**asdict(f), "seconds": 0.0} for f in facts]
        assert fresh == committed["facts"], "run python bench/readme.py --compile"


def test_a_kernel_that_does_not_compile_is_reported():
    """The message of the compiler's process arrives, not a bare exit status."""
    with pytest.raises(RuntimeError, match="invalid choice"):
        compile_check.check(["gram"], ["cuda:1"])


def test_the_table_has_a_row_per_form():
    facts = [
        Facts("a/bf16", "cuda:90", 8, 4, 131072, 200, 0, {"wgmma": 4}, 32),
        Facts("b", "hip:gfx942", 4, 2, 70000, 64, 8),
    ]
    table = compile_check.markdown(facts).splitlines()
    assert len(table) == 4
    assert table[2] == "| a/bf16 | cuda:90 | 8 | 4 | 200 | 0 | 128.0 | wgmma x4 | 32 |"
    assert "| 8 | 68.4 | none | 0 |" in table[3]
    assert facts[0].fits
    assert not facts[1].fits
    assert set(SHARED_LIMIT) == set(TARGETS)


def test_kernels_import_without_a_driver():
    """Importing compiles nothing and touches no device."""
    code = (
        "import torch, fastgrad_kernels.cross_influence, fastgrad_kernels.sparse_wgrad;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
