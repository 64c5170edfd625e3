"""Heads from measurement to delta: every room reads the granularity of a parameter alike."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastgrad as fg
from fastgrad.blocks import condensed
from fastgrad.blueprint import Blueprint
from fastgrad.errors import BlockSpecError, BlueprintError, DeltaError, SelectionError
from fastgrad.granularity import resolve
from fastgrad.identity import model_parameters, weights_hash
from fastgrad.stats import Coverage, GradientStats
from fastgrad_kernels.layout import block_sums, matrix_view
from tests.models import MODELS, batch_of, one_example, randomised

QUERY = "model.layers.0.self_attn.q_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"


def measured(model, blocks="head", seeds=(1, 2), n=3) -> GradientStats:
    """By definition: one backward pass per example and one per batch, cut into blocks."""
    own = model_parameters(model)
    names = list(own)
    spec, specs = condensed(resolve(model, blocks))
    stats = GradientStats(
        names=names,
        shapes=[tuple(p.shape) for p in own.values()],
        spec=spec,
        specs=specs,
        sq=np.zeros((len(names), n * len(seeds))),
        batch=np.repeat(np.arange(len(seeds)), n),
        label_tokens=np.full(n * len(seeds), 8),
        mean_factor=np.full(n * len(seeds), float(n)),
        sum_factor=np.full(n * len(seeds), 8.0 * n),
        batch_sq=np.zeros((len(names), len(seeds))),
        weight_sq=np.array([float(p.detach().square().sum()) for p in own.values()]),
        coverage_list=[Coverage(name, "exact") for name in names],
        meta={"weights_hash": weights_hash(model), "loss_reduction": "token_mean"},
    )

    def squares(batch, scale):
        model.zero_grad()
        (model(**batch).loss * scale).backward()
        for p, name in enumerate(names):
            grid = stats.grid(name)
            matrix = matrix_view(own[name].grad).double().square()
            yield p, name, grid, block_sums(matrix, grid.block_rows, grid.block_cols).numpy()

    for b, seed in enumerate(seeds):
        batch = batch_of(n, seed=seed)
        for p, name, grid, sums in squares(batch, 1.0):
            stats.batch_sq[p, b] = sums.sum()
            if not grid.is_whole:
                zero = np.zeros(grid.n_blocks)
                stats.block_batch_sq[name] = stats.block_batch_sq.get(name, zero) + sums
        for j in range(n):
            for p, name, grid, sums in squares(one_example(batch, j), 1 / n):
                stats.sq[p, b * n + j] = sums.sum()
                if not grid.is_whole:
                    empty = np.zeros((grid.n_blocks, n * len(seeds)), np.float32)
                    stats.block_sq.setdefault(name, empty)[:, b * n + j] = sums
    model.zero_grad()
    return stats


@pytest.fixture(scope="module")
def model():
    return randomised(MODELS["llama"])


@pytest.fixture(scope="module")
def stats(model):
    return measured(model)


def test_heads_roll_up_to_the_module(model, stats):
    whole = measured(model, "module")
    assert (stats.spec, stats.specs[QUERY], stats.specs[OUT]) == ("module", "8x*", "*x8")
    assert stats.blocks(QUERY).shape == (4, 6)
    for p, name in enumerate(stats.names):
        np.testing.assert_allclose((stats.blocks(name) ** 2).sum(0), whole.T[p] ** 2, rtol=1e-5)
        norm = stats.block_grad_norm(name)
        np.testing.assert_allclose((norm**2).sum(), whole.grad_norm[p] ** 2, rtol=1e-6)


# -- choosing ------------------------------------------------------------------------------------


def test_a_selection_takes_the_granularity_of_the_measurement(model, stats):
    chosen = fg.select(stats, model, count=5, ranking="norm", include=["*attn*"])
    assert chosen.grid(QUERY).spec == "8x*"
    assert chosen.grid("lm_head.weight").is_whole
    assert chosen == fg.select(
        stats, model, count=5, ranking="norm", include=["*attn*"], blocks="head"
    )
    # the five heads with the largest gradient norm, over all projections
    norms = {(n, i): x for n in stats.names if "attn" in n
             for i, x in enumerate(stats.block_grad_norm(n))}  # fmt: skip
    best = sorted(norms, key=lambda k: -norms[k])[:5]
    assert {(n, int(i)) for n, ids in chosen.blocks.items() for i in ids} == set(best)
    assert "granularity module (" in chosen.summary()
    assert "6 parameters 8x*, 2 parameters *x8" in chosen.summary()


def test_what_is_too_coarse_or_needs_a_model_is_refused(model, stats):
    with pytest.raises(SelectionError, match=r"granularity '8x\*', not '4x\*'.*blocks='8x\*'"):
        fg.select(stats, model, fraction=0.5, blocks={"*.q_proj.weight": "4x*"})
    with pytest.raises(SelectionError, match=r"blocks='head' depends on the model.*pass model="):
        fg.select(stats, fraction=0.5, blocks="head")
    with pytest.raises(BlockSpecError, match="matches no parameter"):
        fg.select(stats, model, fraction=0.5, blocks={"nope": "head"})
    with pytest.raises(SelectionError, match=r"granularity 'module', not '1x\*'"):
        fg.select(measured(model, "module"), model, fraction=0.5, blocks="1x*")
    # what is said in other words is the same, and coarser than measured is always possible
    fine = measured(model, {"*.q_proj.weight": "row"})
    assert fg.select(fine, model, fraction=0.5, blocks={"*.q_proj.weight": "1x*"}).specs == {
        n: "1x*" for n in fine.specs
    }
    assert fg.select(stats, model, fraction=0.5, blocks="module").specs == {}
    for ranking in ("random", "magnitude", "first"):
        control = fg.select(None, model, fraction=0.1, blocks="head", ranking=ranking)
        assert control.specs == stats.specs


def test_selection_files(tmp_path, model, stats):
    path = tmp_path / "s.json"
    chosen = fg.select(stats, model, fraction=0.3)
    chosen.save(path)
    assert fg.Selection.load(path) == chosen
    value = json.loads(path.read_text())
    assert value["format"] == "fastgrad.selection/2"  # a reader of /1 would misplace the blocks
    whole = fg.select(stats, model, fraction=0.3, blocks="module")
    assert whole != chosen
    whole.save(path)
    assert '"fastgrad.selection/1"' in path.read_text()
    assert "specs" not in json.loads(path.read_text())
    for specs in ({"nope": "row"}, {QUERY: "8x"}, [], {QUERY: 1}, {QUERY: "16x*"}):
        path.write_text(json.dumps(value | {"specs": specs}))
        with pytest.raises(SelectionError, match="damaged"):
            fg.Selection.load(path)
    # one way to say it: what does not differ is not listed
    same = fg.Selection(
        chosen.shapes, "row", {QUERY: [0]}, specs={QUERY: "row", OUT: "module"}
    )
    assert same.specs == {OUT: "module"}


# -- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_only_the_selected_heads_are_trained_and_shipped(tmp_path, architecture):
    model = randomised(MODELS[architecture])
    base = copy.deepcopy(model)
    stats = measured(model, seeds=(1,))
    chosen = fg.select(stats, model, count=7, ranking="norm", include=list(stats.specs))
    assert not all(chosen.is_whole(n) for n in chosen.names)
    plan = fg.plan_memory(model, chosen)
    assert plan.n_trained == chosen.n_parameters
    partial = fg.make_partial(model, chosen)
    optimizer = fg.SparseAdamW(partial.parameters(), lr=1e-2)
    for seed in range(2):
        model(**batch_of(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert plan.terms["gradients"] == sum(4 * p.numel() for p in partial.parameters())
    path = tmp_path / "d.safetensors"
    fg.save_delta(partial, path)
    partial.remove()
    before, after = model_parameters(base), model_parameters(model)
    for name in before:
        grid = chosen.grid(name)
        moved = {
            b
            for b in range(grid.n_blocks)
            for r0, r1, c0, c1 in [grid.bounds(b)]
            if not torch.equal(
                matrix_view(before[name])[r0:r1, c0:c1], matrix_view(after[name])[r0:r1, c0:c1]
            )
        }
        assert moved == set(chosen.blocks.get(name, ())), name
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastgrad"])
    assert header["format"] == "fastgrad.delta/2"
    fg.load_delta(base, path)
    assert weights_hash(base) == weights_hash(model)


def test_delta_files_of_the_first_version_load_and_hostile_ones_do_not(tmp_path, model, stats):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "d.safetensors"
    for blocks in ("8x8", "head"):
        copied = copy.deepcopy(model)
        chosen = fg.select(None, copied, fraction=0.2, ranking="random", blocks=blocks)
        fg.save_delta(fg.make_partial(copied, chosen), path)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["fastgrad"])
        tensors = load_file(path)
        assert header["format"] == ("fastgrad.delta/2" if blocks == "head" else "fastgrad.delta/1")
        if blocks == "8x8":
            del header["specs"]  # as fastgrad 0.1 wrote it
            save_file(tensors, path, metadata={"fastgrad": json.dumps(header)})
            fg.load_delta(copy.deepcopy(model), path)
    name = next(n for n in header["specs"] if f"blocks/{n}" in tensors)
    for change in ({"nope": "row"}, {name: "x"}, {name: "3x5"}, "row"):
        specs = header["specs"] | change if isinstance(change, dict) else change
        save_file(
            tensors, path, metadata={"fastgrad": json.dumps(header | {"specs": specs})}
        )
        with pytest.raises(DeltaError, match="damaged"):
            fg.load_delta(copy.deepcopy(model), path)


# -- releasing -----------------------------------------------------------------------------------


def test_a_blueprint_knows_the_heads(tmp_path, model, stats):
    released = Blueprint.from_stats(stats, model=model)
    assert released.specs == stats.specs
    assert "2 parameters *x8" in repr(released)
    released.save_pretrained(tmp_path)
    loaded = Blueprint.from_pretrained(tmp_path)
    assert (loaded.spec, loaded.specs) == ("module", stats.specs)
    assert loaded.to_json() == released.to_json()
    for name in stats.names:
        np.testing.assert_allclose(
            loaded.scores("norm")[name], stats.block_grad_norm(name), rtol=1e-6
        )
    wanted = fg.select(stats, model, fraction=0.2).blocks
    for blocks in (None, "head"):
        found = fg.select(loaded, model, fraction=0.2, blocks=blocks).blocks
        assert {n: ids.tolist() for n, ids in found.items()} == {
            n: ids.tolist() for n, ids in wanted.items()
        }
    assert released.k_star["memory"].granularity == (
        "module (6 parameters 8x*, 2 parameters *x8)"
    )
    assert set(loaded.scores(blocks="module")) == set(stats.names)
    with pytest.raises(BlueprintError, match="does not describe 'nope'"):
        loaded.grid("nope")
    path = tmp_path / "gradient_blueprint.json"
    value = json.loads(path.read_text())
    for specs in ({"nope": "row"}, {QUERY: "x"}, {QUERY: "16x*"}, {QUERY: 1}, [], {}):
        value["block_vectors"]["specs"] = specs
        path.write_text(json.dumps(value))
        with pytest.raises(BlueprintError):
            Blueprint.from_pretrained(tmp_path)


def test_blueprints_of_the_first_version_load(tmp_path, model):
    made = Blueprint.from_stats(measured(model, "8x8"), model=model)
    made.save_pretrained(tmp_path)
    path = tmp_path / "gradient_blueprint.json"
    value = json.loads(path.read_text())
    del value["block_vectors"]["specs"]
    value["schema_version"] = "1.0.0"
    path.write_text(json.dumps(value))
    loaded = Blueprint.from_pretrained(tmp_path)
    assert (loaded.spec, loaded.specs) == ("8x8", {})
    assert fg.select(loaded, fraction=0.2) == fg.select(made, fraction=0.2)


def test_a_blend_keeps_heads_where_both_have_them(model, stats):
    released, whole = Blueprint.from_stats(stats), measured(model, "module", seeds=(3, 4))
    for local in (measured(model, seeds=(3, 4)), whole):
        mixed = released.blend(local, weight=0.5)
        assert mixed.specs == stats.specs
        shares = {s.name: s.share for s in mixed.submodules}
        for name, blocks in mixed.block_sq.items():
            np.testing.assert_allclose(blocks.sum(), shares[name], rtol=1e-6)
    both = released.blend(measured(model, seeds=(3, 4)), weight=0.5)
    assert not np.allclose(both.block_sq[QUERY], mixed.block_sq[QUERY])
    rows = released.blend(measured(model, "row", seeds=(3, 4)), weight=0.5)
    assert (rows.spec, rows.specs) == ("row", {})  # the local granularity counts
