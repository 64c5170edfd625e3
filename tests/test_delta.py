"""Delta files: round trips bit for bit, refusals, nothing lost when a write fails."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.delta_files import DeltaFile, read_delta_file, write_delta_file
from fastgrad.errors import DeltaError
from fastgrad.partial import make_partial
from fastgrad_kernels.layout import gather_blocks, matrix_view
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


def trained(spec="8x8", architecture="llama", dtype=torch.float32, master=None):
    model = randomised(MODELS[architecture]).to(dtype)
    base = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, spec), master_dtype=master)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    for step in range(2):
        model(**batch_of(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model, partial, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["module", "row", "8x8"])
def test_delta_round_trip_and_revert(tmp_path, spec, dtype):
    base, model, partial, _ = trained(spec, "llama-tied", dtype, torch.float32)
    size = fg.save_delta(partial, tmp_path / "d.safetensors")
    assert size == (tmp_path / "d.safetensors").stat().st_size
    before = copy.deepcopy(base.state_dict())
    applied = fg.load_delta(base, tmp_path / "d.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(base.state_dict()[key], value), key
    applied.revert()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_delta_refuses_other_weights_and_damage(tmp_path):
    base, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with torch.no_grad():
        other = copy.deepcopy(base)
        other.lm_head.weight[0, 0] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(DeltaError, match="made for weights"):
        fg.load_delta(other, path)
    with pytest.raises(DeltaError, match="another model"):
        fg.load_delta(randomised(MODELS["gpt2"]), path)
    with pytest.raises(DeltaError, match="no delta file"):
        fg.load_delta(base, tmp_path / "none.safetensors")
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DeltaError, match="damaged"):
            fg.load_delta(other, path)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


HOSTILE = [
    {"shapes": {"lm_head.weight": [float("inf"), 2]}},
    {"shapes": {"lm_head.weight": "61"}},
    {"shapes": [1, 2]},
    {"base_hash": 5},
    {"base_hash": None},
    {"spec": "8x8\n"},
    {"spec": 3},
    {"format": None},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_hostile_delta_headers_are_refused(tmp_path, change):
    from safetensors import safe_open

    base, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastgrad"]) | change
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"fastgrad": json.dumps(header)})
    with pytest.raises(DeltaError):
        fg.load_delta(base, path)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([0.7, 3.2]),
        torch.tensor([2, 1]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        torch.tensor([-1, 1]),
        torch.tensor([0, 99999]),
    ],
    ids=str,
)
def test_hostile_block_numbers_and_values_are_refused(tmp_path, ids):
    from safetensors import safe_open

    base, _, partial, _ = trained()
    before = copy.deepcopy(base.state_dict())
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    name = "model.layers.0.mlp.up_proj.weight"
    changed = tensors | {f"blocks/{name}": ids, f"values/{name}": torch.zeros(2, 8, 8)}
    for content in (changed, tensors | {f"values/{name}": tensors[f"values/{name}"] * torch.nan}):
        save_file(content, path, metadata=metadata)
        with pytest.raises(DeltaError):
            fg.load_delta(base, path)
    metadata = {"fastgrad": "[" * 100_000}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(DeltaError):
        fg.load_delta(base, path)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    _, _, partial, _ = trained()
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    old = path.read_bytes()

    def full_disk(tensors, target, metadata=None):
        target.write_bytes(old[: len(old) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(DeltaError, match=r"No space left.*unchanged.*Remedy"):
        fg.save_delta(partial, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_a_disk_that_is_full_in_the_middle_of_the_file(tmp_path):
    """For real: the system refuses to let files grow, while safetensors writes."""
    code = f"""
import resource, signal
import fastgrad as fg
from fastgrad.errors import DeltaError
from tests.test_delta import trained
_, _, partial, _ = trained()
path = {str(tmp_path / "d.safetensors")!r}
size = fg.save_delta(partial, path)
old = open(path, "rb").read()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
try:
    fg.save_delta(partial, path)
except DeltaError as error:
    assert "cannot be written" in str(error), error
else:
    raise SystemExit("the write did not fail")
assert open(path, "rb").read() == old
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["row", "64x64", "module"])
def test_the_size_is_that_of_the_selected_weights(tmp_path, spec, dtype):
    model = nn.ModuleDict({f"l{i}": nn.Linear(768, 768, bias=False) for i in range(4)}).to(dtype)
    partial = make_partial(model, selection_of(model, spec))
    size = fg.save_delta(partial, tmp_path / "d.safetensors")
    selected = partial.n_parameters * dtype.itemsize
    assert selected < size <= 1.01 * selected


def chain(tmp_path, specs, dtype=torch.float32, architecture="llama", seed=0):
    """Deltas trained one on top of the other, the base, and the model after each."""
    model = randomised(MODELS[architecture]).to(dtype)
    states, paths = [copy.deepcopy(model)], []
    for number, spec in enumerate(specs):
        names = list(dict(model.named_parameters()))[number::2]
        selection = selection_of(model, spec, names=names, seed=seed + number)
        partial = make_partial(model, selection)
        optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
        model(**batch_of(seed=number)).loss.backward()
        optimizer.step()
        paths.append(tmp_path / f"{number}.safetensors")
        fg.save_delta(partial, paths[-1])
        partial.remove()
        states.append(copy.deepcopy(model))
    return paths, states


def same(model, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("specs", [["row", "row"], ["8x8", "row", "module"], ["16x4", "8x8"]])
def test_a_chain_is_applied_stacked_and_reverted(tmp_path, specs, dtype):
    paths, states = chain(tmp_path, specs, dtype)
    model = copy.deepcopy(states[0])
    with pytest.raises(DeltaError, match="made for weights"):
        fg.load_delta(model, paths[1])
    applied = []
    for path, state in zip(paths, states[1:], strict=True):
        applied.append(fg.load_delta(model, path))
        assert same(model, state)
    with pytest.raises(DeltaError, match="later delta"):
        applied[0].revert()
    assert same(model, states[-1])
    for one, state in zip(applied[::-1], states[-2::-1], strict=True):
        one.revert()
        assert same(model, state)
    with pytest.raises(DeltaError, match="reverted already"):
        applied[0].revert()
    size = fg.stack_deltas(paths, tmp_path / "all.safetensors")
    assert size == (tmp_path / "all.safetensors").stat().st_size
    fg.load_delta(model, tmp_path / "all.safetensors")
    assert same(model, states[-1])


def test_a_chain_is_checked_link_by_link(tmp_path):
    paths, states = chain(tmp_path, ["row", "row", "row"])
    out = tmp_path / "all.safetensors"
    for wrong in ([paths[1], paths[0]], [paths[0], paths[2]]):
        with pytest.raises(DeltaError, match="was trained on weights"):
            fg.stack_deltas(wrong, out)
    with pytest.raises(DeltaError, match="two or more"):
        fg.stack_deltas(paths[:1], out)
    with pytest.raises(DeltaError, match="two or more"):
        fg.stack_deltas(paths[0], out)
    assert not out.exists()
    # Two links as one, then the third on top of it: the result of a stack is known too.
    fg.stack_deltas(paths[:2], out)
    fg.stack_deltas([out, paths[2]], out)
    model = copy.deepcopy(states[0])
    fg.load_delta(model, out)
    assert same(model, states[-1])
    old = replace(read_delta_file(paths[0]), result_hash=None)
    write_delta_file(old, paths[0])
    with pytest.raises(DeltaError, match="older version"):
        fg.stack_deltas(paths, out)


def test_granularities_without_a_common_block_are_refused(tmp_path):
    model = nn.Linear(6, 6, bias=False)
    paths = []
    for number, spec in enumerate(["row", "column"]):
        partial = make_partial(model, selection_of(model, spec))
        paths.append(tmp_path / f"{number}.safetensors")
        fg.save_delta(partial, paths[-1])
        partial.remove()
    with pytest.raises(DeltaError, match=r"weight: .*column, row.*single weights"):
        fg.stack_deltas(paths, tmp_path / "all.safetensors")


def test_weights_changed_after_a_delta_are_not_reverted(tmp_path):
    base, _, partial, _ = trained()
    fg.save_delta(partial, tmp_path / "d.safetensors")
    applied = fg.load_delta(base, tmp_path / "d.safetensors")
    name = next(iter(applied.delta.shapes))
    with torch.no_grad():
        dict(base.named_parameters())[name].add_(1)
    before = copy.deepcopy(base)
    with pytest.raises(DeltaError, match="changed since"):
        applied.revert()
    assert same(base, before)


SPECS = ["module", "row", "column", "2x3", "4x2", "3x*", "*x2", "5x7"]


@st.composite
def layers(draw):
    """A weight's shape and, from first to last, granularity, blocks and new values."""
    shape = draw(st.sampled_from([(6,), (7, 5), (8, 6), (3, 4, 2)]))
    made = []
    for _ in range(draw(st.integers(2, 4))):
        spec = draw(st.sampled_from(SPECS))
        n = BlockGrid.of(shape, spec).n_blocks
        ids = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
        made.append((spec, sorted(ids), draw(st.integers(0, 2**31))))
    return shape, made


@given(layers(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=150, deadline=None)
def test_stacking_equals_writing_one_after_another(case, dtype):
    """Against element masks, which know nothing of blocks."""
    shape, made = case
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want, touched = weight.clone(), torch.zeros(shape, dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        paths, hashes = [], ["0"]
        for number, (spec, ids, seed) in enumerate(made):
            grid = BlockGrid.of(shape, spec)
            new = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for block in ids:
                r0, r1, c0, c1 = grid.bounds(block)
                for tensor, value in ((want, new), (touched, torch.ones(shape, dtype=torch.bool))):
                    matrix_view(tensor)[r0:r1, c0:c1] = matrix_view(value)[r0:r1, c0:c1]
            whole = len(ids) == grid.n_blocks
            numbers = torch.tensor(ids)
            values = new if whole else gather_blocks(
                matrix_view(new), numbers, grid.block_rows, grid.block_cols
            )  # fmt: skip
            hashes.append(str(number + 1))
            delta = DeltaFile(
                spec, {"w": shape}, {"w": None if whole else numbers}, {"w": values}, *hashes[-2:]
            )
            paths.append(f"{folder}/{number}.safetensors")
            write_delta_file(delta, paths[-1])
        if without_common_block(shape, made):
            with pytest.raises(DeltaError, match="single weights"):
                fg.stack_deltas(paths, f"{folder}/all.safetensors")
            return
        fg.stack_deltas(paths, f"{folder}/all.safetensors")
        merged = read_delta_file(f"{folder}/all.safetensors")
        model = nn.Module()
        model.w = nn.Parameter(weight.clone())
        fg.load_delta(model, f"{folder}/all.safetensors", check_base=False)
    assert (merged.base_hash, merged.result_hash) == ("0", str(len(made)))
    assert torch.equal(model.w, want)
    assert merged.n_parameters == int(touched.sum())


def without_common_block(shape, made):
    """Only single elements divide the blocks of all layers, and not all have the same blocks."""
    grids = [BlockGrid.of(shape, spec) for spec, _, _ in made]
    if len({(g.block_rows, g.block_cols) for g in grids}) == 1:
        return False
    high = math.gcd(*(g.block_rows for g in grids if g.block_rows < g.rows))
    wide = math.gcd(*(g.block_cols for g in grids if g.block_cols < g.cols))
    return high == wide == 1


@pytest.mark.parametrize("architecture", ["llama-tied", "bert"])
def test_a_delta_becomes_a_checkpoint(tmp_path, architecture):
    paths, states = chain(tmp_path, ["8x8"], torch.bfloat16, architecture)
    states[0].save_pretrained(tmp_path / "base", max_shard_size="10KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "gradient_blueprint.json").write_text("{}")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    made = [
        fg.merge_delta(tmp_path / "base", paths[0], tmp_path / "one", max_shard_size="10KB"),
        fg.merge_delta(states[0], paths[0], tmp_path / "two"),
    ]
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    assert (tmp_path / "one" / "tokenizer.json").exists()
    assert not (tmp_path / "one" / "gradient_blueprint.json").exists()
    for folder in made:
        loaded = type(states[0]).from_pretrained(folder, dtype="auto")
        assert same(loaded, states[1])
    with pytest.raises(DeltaError, match="made for weights"):
        fg.merge_delta(states[1], paths[0], tmp_path / "three")
    with pytest.raises(DeltaError, match="there already"):
        fg.merge_delta(states[0], paths[0], tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["base", "one", "two"]
    assert not same(states[0], states[1])  # the model that was given is what it was


def test_a_checkpoint_of_files_alone(tmp_path):
    """Without a config: tensor by tensor, in the same shards."""
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    partial = make_partial(model, selection_of(model, "8x8"))
    with torch.no_grad():
        for p in partial.parameters():
            p.add_(1)
    fg.save_delta(partial, tmp_path / "d.safetensors")
    folder = tmp_path / "base"
    folder.mkdir()
    keys = list(base)
    shards = {"a.safetensors": keys[:2], "b.safetensors": keys[2:]}
    for name, some in shards.items():
        save_file({k: base[k] for k in some}, folder / name, metadata={"format": "pt"})
    index = {"weight_map": {k: name for name, some in shards.items() for k in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    out = fg.merge_delta(folder, tmp_path / "d.safetensors", tmp_path / "out")
    for name, some in shards.items():
        found = load_file(out / name)
        assert list(found) == sorted(some)
        assert all(torch.equal(found[k], model.state_dict()[k]) for k in some)
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index

    save_file({k: base[k] + 1 for k in keys[:2]}, folder / "a.safetensors")
    with pytest.raises(DeltaError, match="made for weights"):
        fg.merge_delta(folder, tmp_path / "d.safetensors", tmp_path / "wrong")
    (folder / "b.safetensors").unlink()
    with pytest.raises(DeltaError, match="is no file beside it"):
        fg.merge_delta(folder, tmp_path / "d.safetensors", tmp_path / "wrong")
    with pytest.raises(DeltaError, match="is no checkpoint"):
        fg.merge_delta(tmp_path, tmp_path / "d.safetensors", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_failed_merge_leaves_nothing(tmp_path, monkeypatch):
    paths, states = chain(tmp_path, ["row"])
    model = copy.deepcopy(states[0])

    def full_disk(folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(DeltaError, match="No space left"):
        fg.merge_delta(model, paths[0], tmp_path / "out")
    assert same(model, states[0])
    assert [p.name for p in tmp_path.iterdir()] == [paths[0].name]


def test_a_model_that_was_changed_elsewhere_too_is_not_merged_silently(tmp_path):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8))
    base = copy.deepcopy(model)
    partial = make_partial(model, selection_of(model, "row", names=["1.weight"]))
    with torch.no_grad():
        model[0].bias.add_(1)
    fg.save_delta(partial, tmp_path / "d.safetensors")
    with pytest.raises(DeltaError, match="other weights than those of the selection"):
        fg.merge_delta(base, tmp_path / "d.safetensors", tmp_path / "out")


def test_the_commands(tmp_path, capsys):
    from fastgrad.cli import main

    def run(*args):
        code = 0
        try:
            main([str(a) for a in ("delta", *args)])
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    paths, states = chain(tmp_path, ["row", "8x8"], torch.bfloat16)
    states[0].save_pretrained(tmp_path / "base")
    code, out, _ = run("info", paths[0])
    assert code == 0
    assert "blocks of granularity row" in out
    code, out, _ = run("info", paths[1], "--json")
    first, second = read_delta_file(paths[0]), json.loads(out)
    assert second["base_hash"] == first.result_hash
    assert sum(second["changed"].values()) == second["n_parameters"]
    both = tmp_path / "both.safetensors"
    assert run("stack", *paths, "-o", both)[0] == 0
    assert run("apply", tmp_path / "base", both, "-o", tmp_path / "out")[0] == 0
    assert same(type(states[0]).from_pretrained(tmp_path / "out", dtype="auto"), states[2])
    code, _, err = run("apply", tmp_path / "base", paths[1], "-o", tmp_path / "wrong")
    assert code == 1
    assert "made for weights" in err
    code, _, err = run("stack", paths[1], paths[0], "-o", both)
    assert code == 1
    assert "in the order in which they were trained" in " ".join(err.split())
