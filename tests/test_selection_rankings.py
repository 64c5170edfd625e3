"""What l1, alignment and mixed granularities rank by: recorded, merged, stored, compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.choosing import select
from fastgrad.errors import BlockSpecError, SelectionError, StatsError
from fastgrad.stats import Coverage, GradientStats
from tests.models import MODELS, batch_of, randomised
from tests.test_selection import SHAPES, Toy, as_set, synthetic_stats


def cut(matrix, grid):
    """The blocks of a matrix, one by one."""
    matrix = matrix.reshape(grid.rows, grid.cols)
    for b in range(grid.n_blocks):
        r0, r1, c0, c1 = grid.bounds(b)
        yield matrix[r0:r1, c0:c1]


def directions(model, names=("toward", "away")):
    g = torch.Generator().manual_seed(5)
    return {
        name: {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters()}
        for name in names
    }


def probed(model, batches, **options):
    """Statistics, and the gradients of the batches as autograd has them."""
    gradients = []
    with fg.Probe(model, **options) as probe:
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            gradients.append({n: p.grad.double() for n, p in model.named_parameters()})
    return probe.stats(), gradients


BATCHES = [batch_of(2, seed=s) for s in (1, 2)]


# -- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("blocks", ["module", "row", "8x12", "head"])
def test_l1_and_block_alignment_are_autograds(kind, blocks):
    model = randomised(MODELS[kind])
    targets = directions(model)
    stats, gradients = probed(model, BATCHES, blocks=blocks, l1=True, targets=targets)
    for name in stats.names:
        grid = stats.grid(name)
        want = [
            [float(block.abs().mean()) for block in cut(g[name], grid)] for g in gradients
        ]  # fmt: skip
        np.testing.assert_allclose(stats.mean_abs(name), np.mean(want, 0), rtol=1e-5, atol=1e-12)
        if grid.is_whole:
            assert name not in stats.block_alignment
            continue
        for k, target in enumerate(targets.values()):
            products = sum(g[name] * target[name].double() for g in gradients)
            want = np.array([float(block.sum()) for block in cut(products, grid)])
            got = stats.block_alignment[name][k]
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
            # and the blocks add up to what the examples have
            row = stats.alignment_by_direction[k, stats.index(name)]
            assert got.sum() == pytest.approx(row.sum(), rel=1e-3, abs=1e-5 * np.abs(row).max())


def test_large_l1_sums_are_right():
    """Two million equal entries: one float32 lane after another would lose some."""
    from fastgrad.measurement import absolute_blocks

    x = torch.full((2**11, 2**10), 0.1)
    found = absolute_blocks(x, BlockGrid.of(x.shape, "module"))
    assert float(found) == pytest.approx(2**21 * float(x[0, 0]), rel=1e-9)
    z = torch.tensor([[3 + 4j, 0], [1j, -2]])
    for spec, want in (("module", [8.0]), ("row", [5.0, 3.0])):
        assert absolute_blocks(z, BlockGrid.of(z.shape, spec)).tolist() == want


def test_without_l1_nothing_is_recorded_and_the_refusal_names_the_remedy():
    model = randomised(MODELS["llama"])
    stats, _ = probed(model, BATCHES[:1])
    assert stats.block_batch_abs == {}
    with pytest.raises(StatsError, match=r"Remedy.*Probe\(model, l1=True\)"):
        stats.mean_abs(stats.names[0])
    for source in (stats, fg.Blueprint.from_stats(stats)):
        with pytest.raises(SelectionError, match=r"not hold absolute.*Probe\(model, l1=True\)"):
            select(source, count=1, ranking="l1")


def test_a_skipped_batch_is_in_no_sum():
    model = randomised(MODELS["llama"])
    options = {"blocks": "row", "l1": True, "targets": directions(model), "on_nonfinite": "skip"}
    clean, _ = probed(model, BATCHES, **options)
    with fg.Probe(model, **options) as probe:
        for batch in (BATCHES[0], None, BATCHES[1]):
            loss = model(**(batch or BATCHES[0])).loss
            (loss if batch else loss * torch.nan).backward()
    found = probe.stats()
    assert found.meta["skipped_batches"] == 1
    for name in clean.names:
        np.testing.assert_array_equal(found.block_batch_abs[name], clean.block_batch_abs[name])
    for name, sums in clean.block_alignment.items():
        np.testing.assert_array_equal(found.block_alignment[name], sums)


# -- merging and files ---------------------------------------------------------------------------


def three():
    model = randomised(MODELS["llama"])
    options = {"blocks": "row", "l1": True, "targets": directions(model)}
    return model, options, [probed(model, part, **options)[0] for part in (
        BATCHES, BATCHES[:1], BATCHES[1:])]  # fmt: skip


def same_sums(a, b, **tolerance):
    for field in ("block_batch_abs", "block_alignment"):
        one, other = getattr(a, field), getattr(b, field)
        assert set(one) == set(other)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], **tolerance)


def test_merging_and_pieces_on_disk_are_one_measurement(tmp_path):
    model, options, (whole, first, second) = three()
    merged = first.merge(second)
    same_sums(merged, whole, rtol=1e-12)
    with fg.Probe(model, shards=tmp_path / "s", shard_examples=2, **options) as probe:
        for batch in BATCHES:
            model(**batch).loss.backward()
    same_sums(probe.stats(), whole, rtol=1e-12)
    same_sums(GradientStats.load(tmp_path / "s"), whole, rtol=1e-12)
    whole.save(tmp_path / "x.safetensors")
    loaded = GradientStats.load(tmp_path / "x.safetensors")
    same_sums(loaded, whole, rtol=0)
    for ranking in ("l1", "alignment"):
        direction = "away" if ranking == "alignment" else None
        made = [select(s, fraction=0.1, ranking=ranking, direction=direction)
                for s in (whole, loaded)]  # fmt: skip
        assert made[0] == made[1]
    lacking = replace(second, block_batch_abs={})
    with pytest.raises(StatsError, match="different absolute values"):
        first.merge(lacking)
    with pytest.raises(StatsError, match="different block alignment"):
        first.merge(replace(second, block_alignment={}))


def test_files_of_older_versions_are_read_and_refused_by_name(tmp_path):
    whole = three()[2][0]
    path = tmp_path / "x.safetensors"
    whole.save(path)
    with safe_open(path, framework="np") as file:
        header = file.metadata()
    new = ("block_batch_abs/", "block_alignment/")
    save_file({k: v for k, v in load_file(path).items() if not k.startswith(new)}, path, header)
    old = GradientStats.load(path)
    assert old.block_batch_abs == old.block_alignment == {}
    assert select(old, fraction=0.1).blocks.keys() == select(whole, fraction=0.1).blocks.keys()
    with pytest.raises(SelectionError, match="not hold absolute gradients"):
        select(old, fraction=0.1, ranking="l1")
    with pytest.raises(SelectionError, match=r"no alignment of its blocks.*older version"):
        select(old, fraction=0.1, ranking="alignment", direction="toward")
    assert select(old, fraction=0.5, blocks="module", ranking="alignment", direction="away").names


def test_a_damaged_file_is_refused(tmp_path):
    whole = three()[2][0]
    for field, change in (
        ("block_batch_abs", lambda v: v[:-1]),
        ("block_alignment", lambda v: v[:1]),
    ):
        kept = dict(getattr(whole, field))
        name = next(n for n, v in kept.items() if v.size > 1)
        kept[name] = change(kept[name])
        replace(whole, **{field: kept}).save(tmp_path / "x.safetensors")
        with pytest.raises(StatsError, match=f"blocks of {name}"):
            GradientStats.load(tmp_path / "x.safetensors")
    some = dict(list(whole.block_batch_abs.items())[:2])
    replace(whole, block_batch_abs=some).save(tmp_path / "x.safetensors")
    with pytest.raises(StatsError, match="some parameters only"):
        GradientStats.load(tmp_path / "x.safetensors")


def test_missing_coverage_leaves_block_alignment_unknown():
    whole = three()[2][0]
    name = "lm_head.weight"
    late = replace(whole, coverage_list=[Coverage(name, "missing", "no tap")])
    merged = whole.merge(late)
    assert np.isnan(merged.block_alignment[name]).all()
    made = select(merged, fraction=0.5, ranking="alignment", direction="toward")
    assert made.meta["unranked"] == [name]


# -- rankings ------------------------------------------------------------------------------------


def scores(model, batches, target=None):
    """Mean absolute gradient, or mean product with a direction, of each row by autograd alone."""
    found = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            rows = p.grad if p.ndim == 2 else p.grad[None]
            for i, row in enumerate(rows):
                if target is None:
                    value = float(row.double().abs().mean())
                else:
                    t = target[name] if p.ndim == 2 else target[name][None]
                    value = float((row.double() * t[i].double()).sum())
                found[name, i] = found.get((name, i), 0.0) + value
    return found


@pytest.mark.parametrize("ranking", ["l1", "alignment", "alignment_density"])
def test_rows_are_chosen_by_what_autograd_says(ranking):
    model = randomised(MODELS["llama"])
    targets = directions(model)
    stats, _ = probed(model, BATCHES, blocks="row", l1=True, targets=targets)
    direction = None if ranking == "l1" else "away"
    made = select(stats, count=25, ranking=ranking, direction=direction)
    assert made.meta.get("direction") == direction
    found = scores(model, BATCHES, None if ranking == "l1" else targets["away"])
    if ranking == "alignment_density":
        sizes = dict(model.named_parameters())
        found = {(n, i): v / sizes[n].shape[-1] for (n, i), v in found.items()}
    assert as_set(made) == set(sorted(found, key=lambda b: -found[b])[:25])
    # At module granularity, from the same statistics.
    whole = select(stats, count=4, blocks="module", ranking=ranking, direction=direction)
    per_module = {}
    for name, p in model.named_parameters():
        values = [v for (n, _), v in found.items() if n == name]
        per_module[name] = sum(values) if ranking == "alignment" else np.mean(values)
        assert len(values) == (p.shape[0] if p.ndim == 2 else 1)
    assert set(whole.names) == set(sorted(per_module, key=lambda n: -per_module[n])[:4])


def test_a_direction_is_chosen_by_name():
    stats = synthetic_stats()
    stats.directions = ["a", "b"]
    values = np.zeros((2, 6, stats.n_examples))
    values[0, 0, :], values[1, 3, :] = 1, 1
    stats.alignment_by_direction = values
    assert select(stats, count=1, ranking="alignment", direction="a").names == ["embed.weight"]
    assert select(stats, count=1, ranking="alignment", direction="b").names == [list(SHAPES)[3]]
    assert "along b" in select(stats, count=1, ranking="alignment", direction="b").summary()
    with pytest.raises(SelectionError, match=r"2 target directions.*direction=.*a, b"):
        select(stats, count=1, ranking="alignment")
    with pytest.raises(SelectionError, match=r"no direction 'c'; they have a, b"):
        select(stats, count=1, ranking="alignment", direction="c")
    with pytest.raises(SelectionError, match=r"direction='a' is for ranking='alignment'"):
        select(stats, count=1, ranking="rms", direction="a")


# -- a mix of granularities ----------------------------------------------------------------------

MIXED = {"embed.weight": "column", "*.proj.*": "2x3", "head.weight": "row"}


def mixed_stats(seed=0):
    """As if the model had been probed with the blocks of ``MIXED``."""
    specs = {n: "column" if n == "embed.weight" else "row" if n == "head.weight" else "2x3"
             for n in SHAPES if "norm" not in n}  # fmt: skip
    parts = {s: synthetic_stats(spec=s, seed=seed) for s in set(specs.values())}
    base = synthetic_stats(seed=seed)
    base.specs = specs
    base.block_batch_sq = {n: parts[s].block_batch_sq[n] for n, s in specs.items()}
    return base


@pytest.mark.parametrize("ranking", ["rms", "norm"])
def test_one_budget_serves_a_mix_of_granularities(ranking):
    stats = mixed_stats()
    made = select(stats, Toy(), fraction=0.4, blocks=MIXED, ranking=ranking)
    blocks = []
    for name, shape in SHAPES.items():
        grid = BlockGrid.of(shape, stats.specs.get(name, "module"))
        norms = stats.block_grad_norm(name)
        for i, (norm, size) in enumerate(zip(norms, grid.sizes(), strict=True)):
            score = norm / math.sqrt(size) if ranking == "rms" else norm
            blocks.append((-score, len(blocks), name, i, int(size)))
    left, expected = int(0.4 * made.n_total), set()
    for _, _, name, i, size in sorted(blocks):
        if size <= left:
            expected.add((name, i))
            left -= size
    assert as_set(made) == expected
    assert {made.grid(n).spec for n in made.shapes} == {"module", "column", "2x3", "row"}
    assert made == select(stats, fraction=0.4, ranking=ranking)  # the measurement's own
    rows = {line.split()[0]: line.split() for line in made.summary().splitlines() if "%" in line}
    for spec in ("module", "column", "2x3", "row"):
        inside = sum(made.n_selected(n) for n in SHAPES if made.grid(n).spec == spec)
        assert rows[spec][1] == f"{inside:,}"
    note = made.meta["note"] or ""
    assert ("adds up over a block" in note) == (ranking == "norm")


def test_equal_density_is_equal_rank_at_any_granularity():
    """Blocks of one size in one tensor against the whole of another with the same mean square:
    rms and l1 tie, so the model's order decides; norm prefers the whole."""
    shapes = {"a.weight": (4, 6), "b.weight": (4, 6)}
    stats = synthetic_stats(shapes, noise=0.0)
    stats.specs = {"a.weight": "row"}
    stats.batch_sq[:] = 24.0
    stats.block_batch_sq = {"a.weight": np.full(4, 6.0 * stats.n_batches)}
    stats.block_batch_abs = {"a.weight": np.full(4, 6.0), "b.weight": np.array([24.0])}
    assert select(stats, count=1, ranking="norm").names == ["b.weight"]
    for ranking in ("rms", "l1"):
        made = select(stats, fraction=0.5, ranking=ranking)
        assert made.names == ["a.weight"]
        assert made.n_blocks == 4


def test_a_mix_from_a_coarser_or_other_measurement_is_refused():
    with pytest.raises(SelectionError, match=r"embed\.weight.*'module', not 'column'"):
        select(synthetic_stats(), Toy(), fraction=0.4, blocks=MIXED)
    with pytest.raises(BlockSpecError, match=r"'\*\.projection' matches no"):
        select(None, Toy(), ranking="first", count=1, blocks={"*.projection": "row"})
    # Rows were measured: rows where they are asked for, whole tensors elsewhere.
    rows = synthetic_stats(spec="row")
    made = select(rows, Toy(), fraction=1.0, blocks={"head.weight": "row"})
    assert made.specs == {"head.weight": "row"}
    assert all(made.is_whole(n) for n in SHAPES)


def test_mixed_granularities_train():
    model = randomised(MODELS["llama"])
    spec = {"*.q_proj.weight": "head", "*.mlp.*": "8x8", "lm_head.weight": "row", "*": "module"}
    with fg.Probe(model, blocks=spec, l1=True) as probe:
        model(**batch_of()).loss.backward()
    for ranking in ("rms", "l1"):
        made = select(probe.stats(), model, fraction=0.2, blocks=spec, ranking=ranking)
        assert made.n_parameters <= 0.2 * made.n_total
        partial = fg.make_partial(model, made)
        assert sum(1 for _ in partial.parameters()) == len(made.names)
        partial.remove()
