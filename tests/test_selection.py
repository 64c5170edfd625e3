"""Selection: validation, files, rankings and budgets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastgrad as fg
from fastgrad.blocks import BlockGrid
from fastgrad.budgets import parse_memory
from fastgrad.choosing import select
from fastgrad.errors import BlockSpecError, SelectionError
from fastgrad.ranking import CONTROLS, rank_scores
from fastgrad.selection import Selection
from fastgrad.stats import Coverage, GradientStats
from tests.models import MODELS, batch_of, randomised

SHAPES = {
    "embed.weight": (12, 6),
    "layers.0.proj.weight": (8, 6),
    "layers.0.norm.weight": (6,),
    "layers.1.proj.weight": (8, 6),
    "layers.1.norm.weight": (6,),
    "head.weight": (7, 5),
}


def synthetic_stats(
    shapes=SHAPES, *, spec="module", n_batches=6, per_batch=4, profile=None, noise=0.5, seed=0,
    weights_hash="sha256:" + "a" * 64,
) -> GradientStats:  # fmt: skip
    """Statistics whose expected energy of parameter p is proportional to ``profile[p]``."""
    rng = np.random.default_rng(seed)
    names, P, E = list(shapes), len(shapes), n_batches * per_batch
    profile = np.ones(P) if profile is None else np.asarray(profile, dtype=float)
    block_sq, block_batch = {}, {}
    sq, batch_sq = np.zeros((P, E)), np.zeros((P, n_batches))
    for p, name in enumerate(names):
        grid = BlockGrid.of(shapes[name], spec)
        energy = profile[p] * rng.lognormal(-noise**2 / 2, noise, (grid.n_blocks, n_batches))
        examples = rng.lognormal(0, noise, (grid.n_blocks, E)) * profile[p] / per_batch
        sq[p], batch_sq[p] = examples.sum(0), energy.sum(0)
        if not grid.is_whole:
            block_sq[name] = examples.astype(np.float32)
            block_batch[name] = energy.sum(1)
    factor = np.full(E, float(per_batch))
    return GradientStats(
        names=names,
        shapes=[tuple(s) for s in shapes.values()],
        spec=spec,
        sq=sq,
        batch=np.repeat(np.arange(n_batches), per_batch),
        label_tokens=np.full(E, 9),
        mean_factor=factor,
        sum_factor=factor * 9,
        batch_sq=batch_sq,
        weight_sq=np.arange(1.0, P + 1),
        block_sq=block_sq,
        block_batch_sq=block_batch,
        coverage_list=[Coverage(n, "exact") for n in names],
        meta={
            "weights_hash": weights_hash,
            "model_class": "Toy",
            "loss_reduction": "token_mean",
            "n_model_parameters": sum(math.prod(s) for s in shapes.values()),
        },
    )


class Toy(nn.Module):
    """A model with the parameters of SHAPES."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.randn(shape)))


def as_set(selection):
    return {(n, int(i)) for n, ids in selection.blocks.items() for i in ids}


# -- the dataclass -------------------------------------------------------------------------------


def test_validation():
    good = Selection(SHAPES, "row", {"head.weight": [2, 0], "embed.weight": np.array([], int)})
    assert good.blocks["head.weight"].tolist() == [0, 2]
    assert good.names == ["head.weight"]  # a parameter without blocks is absent
    assert (good.n_parameters, good.n_total, good.n_blocks) == (10, 72 + 48 + 6 + 48 + 6 + 35, 2)
    assert good.fraction == 10 / 215
    with pytest.raises(SelectionError, match=r"'nope'.*known names look like embed"):
        Selection(SHAPES, "row", {"nope": [0]})
    with pytest.raises(SelectionError, match=r"head\.weight.*7 blocks"):
        Selection(SHAPES, "row", {"head.weight": [7]})
    with pytest.raises(SelectionError, match="twice"):
        Selection(SHAPES, "row", {"head.weight": [1, 1]})
    with pytest.raises(SelectionError, match=r"empty.*Remedy"):
        Selection(SHAPES, "row", {"head.weight": []})
    with pytest.raises(BlockSpecError):
        Selection(SHAPES, "rows", {"head.weight": [0]})


def test_blocks_are_in_the_models_order():
    made = Selection(SHAPES, "module", {"head.weight": [0], "embed.weight": [0]})
    assert made.names == ["embed.weight", "head.weight"]


def test_summary_says_where_the_budget_went():
    made = select(synthetic_stats(), fraction=0.5)
    text = made.summary()
    assert f"{made.n_parameters:,} of 215 parameters ({made.fraction:.1%})" in text
    assert "ranking rms" in text
    assert "fraction = 0.5" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "%" in line}
    for layer in ("embed", "layers.0", "layers.1", "head"):
        inside = sum(made.n_selected(n) for n in SHAPES if n.startswith(layer))
        assert rows[layer][0] == str(inside)
    assert rows["layers.*.norm.weight"][0] == str(
        made.n_selected("layers.0.norm.weight") + made.n_selected("layers.1.norm.weight")
    )
    shares = [float(rows[layer][2][:-1]) for layer in ("embed", "layers.0", "layers.1", "head")]
    assert sum(shares) == pytest.approx(100, abs=0.3)


# -- files ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), spec=st.sampled_from(["module", "row", "column", "3x4", "expert"]))
def test_save_and_load(tmp_path_factory, data, spec):
    path = tmp_path_factory.mktemp("s") / "selection.json"
    blocks = {
        name: sorted(data.draw(st.sets(st.integers(0, BlockGrid.of(shape, spec).n_blocks - 1))))
        for name, shape in SHAPES.items()
    }
    if not any(blocks.values()):
        blocks["head.weight"] = [0]
    made = Selection(SHAPES, spec, blocks, "sha256:1", {"ranking": "rms", "list": [1, None]})
    made.save(path)
    loaded = Selection.load(path)
    assert loaded == made
    assert list(loaded.shapes) == list(SHAPES)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first
    torch.from_numpy(loaded.blocks[loaded.names[0]])  # what make_partial does: writable int64


def test_equality_tells_selections_apart():
    a = Selection(SHAPES, "row", {"head.weight": [0, 1]})
    assert a == Selection(dict(SHAPES), "row", {"head.weight": [1, 0]})
    assert a != Selection(SHAPES, "row", {"head.weight": [0, 2]})
    assert a != Selection(SHAPES, "row", {"head.weight": [0, 1]}, "sha256:1")
    assert a != Selection(dict(reversed(SHAPES.items())), "row", {"head.weight": [0, 1]})
    assert a != "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("blocks"), "'blocks' is missing"),
        (lambda d: d.update(format="x"), "format"),
        (lambda d: d.update(spec="y"), "granularity"),
        (lambda d: d["blocks"].update({"head.weight": [[0, 10**15]]}), "does not fit"),
        (lambda d: d["blocks"].update({"head.weight": [[3, 3]]}), "does not fit"),
        (lambda d: d["blocks"].update({"head.weight": [[2, 4], [3, 5]]}), "does not fit"),
        (lambda d: d["blocks"].update({"head.weight": [[0.0, 1]]}), "whole numbers"),
        (lambda d: d["blocks"].update({"head.weight": 5}), "damaged"),
        (lambda d: d["blocks"].update({"other": "all"}), "no shape"),
        (lambda d: d["shapes"].append(["head.weight", [7, 5]]), "twice"),
        (lambda d: d["shapes"].append(["x", [-1]]), "whole numbers"),
        (lambda d: d.update(shapes=3), "damaged"),
        (lambda d: d.update(blocks={}), "empty"),
        (lambda d: d.update(weights_hash=5), "wrong type"),
        (lambda d: d.update(meta=[]), "wrong type"),
    ],
)
def test_damaged_file(tmp_path, change, message):
    path = tmp_path / "s.json"
    Selection(SHAPES, "row", {"head.weight": [0, 1, 4]}).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SelectionError, match=message):
        Selection.load(path)


def test_unreadable_files(tmp_path):
    path = tmp_path / "s.json"
    with pytest.raises(SelectionError, match="no selection file"):
        Selection.load(path)
    with pytest.raises(SelectionError, match="no selection file"):
        Selection.load(tmp_path)
    Selection(SHAPES, "row", {"head.weight": [0, 1, 4]}).save(path)
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(SelectionError, match="damaged"):
            Selection.load(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_our_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("s") / "s.json"
    path.write_bytes(data)
    with pytest.raises(SelectionError):
        Selection.load(path)


# -- the model -----------------------------------------------------------------------------------


def test_check_model():
    model = Toy()
    made = Selection(SHAPES, "row", {"head.weight": [0]}, fg.weights_hash(model))
    made.check_model(model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    with pytest.raises(SelectionError, match=r"made for weights sha256.*the model has sha256"):
        made.check_model(model)
    made.check_model(model, allow_other_weights=True)
    with pytest.raises(SelectionError, match=r"head\.weight has shape \(7, 6\).*expects \(7, 5\)"):
        made.check_model(Toy({**SHAPES, "head.weight": (7, 6)}))
    fewer = {n: s for n, s in SHAPES.items() if n != "embed.weight"}
    with pytest.raises(SelectionError, match=r"'embed\.weight', which this model lacks"):
        made.check_model(Toy(fewer))
    with pytest.raises(SelectionError, match=r"'extra\.weight', which the selection does not"):
        made.check_model(Toy({**SHAPES, "extra.weight": (2,)}))
    with pytest.raises(SelectionError, match="meta device"):
        made.check_model(Toy().to("meta"))
    made.check_model(Toy().to("meta"), allow_other_weights=True)


# -- budgets -------------------------------------------------------------------------------------

shapes_strategy = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


def greedy(stats, spec, ranking, capacity):
    """The definition: block after block, in Python."""
    blocks = []
    for name, shape in zip(stats.names, stats.shapes, strict=True):
        grid = BlockGrid.of(shape, spec)
        norms = stats.block_grad_norm(name) if spec != "module" else [
            stats.grad_norm[stats.index(name)]
        ]  # fmt: skip
        for i, (norm, size) in enumerate(zip(norms, grid.sizes(), strict=True)):
            score = norm / math.sqrt(size) if ranking == "rms" else norm
            blocks.append((-score, len(blocks), name, i, int(size)))
    chosen = set()
    for _, _, name, i, size in sorted(blocks):
        if size <= capacity:
            chosen.add((name, i))
            capacity -= size
    return chosen


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes_strategy,
    spec=st.sampled_from(["module", "row", "column", "2x3", "expert"]),
    ranking=st.sampled_from(["rms", "norm"]),
    percent=st.integers(1, 100),
    seed=st.integers(0, 5),
    ties=st.booleans(),
)
def test_fraction_is_greedy_never_exceeded_and_deterministic(
    shapes, spec, ranking, percent, seed, ties
):
    named = {f"layers.{i}.weight": s for i, s in enumerate(shapes)}
    stats = synthetic_stats(named, spec=spec, n_batches=2, per_batch=1, seed=seed,
                            noise=0.0 if ties else 1.0)  # fmt: skip
    total = sum(math.prod(s) for s in shapes)
    capacity = percent * total // 100
    expected = greedy(stats, spec, ranking, capacity)
    if not expected:
        with pytest.raises(SelectionError, match=r"budget is .* smallest block has"):
            select(stats, fraction=percent / 100, ranking=ranking)
        return
    made = select(stats, fraction=percent / 100, ranking=ranking)
    assert made.n_parameters <= capacity
    assert as_set(made) == expected
    assert made == select(stats, fraction=percent / 100, ranking=ranking)
    if percent == 100:
        assert all(made.is_whole(name) for name in named)


def test_a_block_that_does_not_fit_is_skipped():
    shapes = {"big": (10, 10), "medium": (5, 10), "small": (4, 10), "tiny": (10,)}
    stats = synthetic_stats(shapes, profile=[100e6, 100e4, 100e2, 1], noise=0.0)
    # 50 % of 200 is 100: big fills it. 45 % is 90: big is skipped, medium and small fit.
    assert select(stats, fraction=0.5).names == ["big"]
    assert select(stats, fraction=0.45).names == ["medium", "small"]
    # 30 % is 60: medium, then small no longer fits but tiny does.
    assert select(stats, fraction=0.3).names == ["medium", "tiny"]


def test_fraction_means_the_decimal_number():
    stats = synthetic_stats({"a": (29,), "b": (71,)}, profile=[100, 1], noise=0.0)
    assert 0.29 * 100 < 29  # in binary
    assert select(stats, fraction=0.29).names == ["a"]
    assert select(stats, fraction=np.float64(0.29)).names == ["a"]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_count_takes_the_best(count):
    stats = synthetic_stats(seed=3)
    scores = dict(zip(stats.names, stats.grad_norm / np.sqrt(stats.numel), strict=True))
    made = select(stats, count=count)
    assert set(made.names) == set(sorted(scores, key=lambda n: -scores[n])[:count])
    worst = select(stats, count=count, largest=False)
    assert set(worst.names) == set(sorted(scores, key=lambda n: scores[n])[:count])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one budget.*got none"),
        ({"fraction": 0.1, "count": 3}, "got fraction and count"),
        ({"fraction": 0.0}, r"\(0, 1\]"),
        ({"fraction": 1.5}, r"\(0, 1\]"),
        ({"fraction": math.nan}, r"\(0, 1\]"),
        ({"fraction": "0.2"}, "a number"),
        ({"fraction": True}, "a number"),
        ({"count": 0}, r"1\.\.6"),
        ({"count": 7}, r"1\.\.6"),
        ({"count": 2.0}, "whole number"),
        ({"k_star": "memory"}, "from a blueprint"),
        ({"memory": "1GiB"}, "model="),
    ],
)
def test_impossible_budgets(budget, message):
    with pytest.raises(SelectionError, match=message):
        select(synthetic_stats(), **budget)


def test_parse_memory():
    assert parse_memory("16GiB") == 16 * 2**30
    assert parse_memory("1.5 GB") == 1_500_000_000
    assert parse_memory("2mib") == 2**21
    assert parse_memory(12345) == 12345
    assert parse_memory("0.1kB") == 100
    for text in ("", "GiB", "-1GB", "1e9", "16 Gigs", "0", "0.2", "nan", "1PB"):
        with pytest.raises(SelectionError, match="not an amount"):
            parse_memory(text)


def test_memory_budget():
    model = Toy()
    stats = synthetic_stats(spec="2x3", seed=1)
    full = fg.plan_memory(model).total
    least = fg.plan_memory(model, select(stats, count=1)).total
    for budget in np.linspace(least + 100, full - 300, 7).astype(int).tolist():
        made = select(stats, model, memory=budget)
        assert fg.plan_memory(model, made).total <= budget
        assert made.meta["budget"] == {"kind": "memory", "value": budget}
        # With room for one more block (they have at most 6 elements) it would not have fitted.
        bigger = select(stats, model, fraction=min(1.0, (made.n_parameters + 6.5) / made.n_total))
        assert bigger.n_parameters > made.n_parameters
        assert fg.plan_memory(model, bigger).total > budget
    whole = select(stats, model, memory=10 * full)
    assert whole.n_parameters == whole.n_total
    with pytest.raises(SelectionError, match=r"100 bytes are not enough.*need"):
        select(stats, model, memory=100)
    plain = select(stats, model, memory=full - 500, optimizer="sgd")
    assert plain.n_parameters > select(stats, model, memory=full - 500).n_parameters


# -- rankings ------------------------------------------------------------------------------------


def test_rank_scores():
    energy, sizes = np.array([4.0, 0.0, 9.0]), np.array([1, 4, 9])
    assert rank_scores("norm", energy, sizes).tolist() == [2, 0, 3]
    assert rank_scores("rms", energy, sizes).tolist() == [2, 0, 1]
    relative = rank_scores("relative", energy, sizes, np.array([16.0, 0.0, 0.0]))
    assert relative.tolist() == [0.5, 0.0, math.inf]
    with pytest.raises(SelectionError, match="pass model"):
        rank_scores("relative", energy, sizes)
    with pytest.raises(SelectionError, match="not a gradient norm"):
        rank_scores("random", energy, sizes)


def test_relative_uses_the_weights():
    model, shapes = Toy(), list(SHAPES)
    stats = synthetic_stats(noise=0.0)
    best = max(shapes, key=lambda n: 1 / stats.weight_sq[shapes.index(n)])
    assert select(stats, count=1, ranking="relative").names == [best]
    with torch.no_grad():
        model.layers.get_submodule("1").proj.weight.mul_(1e-3)
    rows = synthetic_stats(spec="row", noise=0.0)
    made = select(rows, model, count=8, ranking="relative")
    assert made.names == ["layers.1.proj.weight"]
    with pytest.raises(SelectionError, match="pass model"):
        select(rows, count=1, ranking="relative")


def test_alignment():
    stats = synthetic_stats()
    stats.directions = ["target"]
    values = np.zeros((1, 6, stats.n_examples))
    values[0, :, 0] = [-9, 3, -1, 8, 0, np.nan]
    stats.alignment_by_direction = values
    assert select(stats, count=2, ranking="alignment").names == [
        "layers.0.proj.weight", "layers.1.proj.weight",
    ]  # fmt: skip
    rest = select(stats, fraction=1.0, ranking="alignment")
    assert "head.weight" not in rest.blocks  # its influence is not known
    assert rest.meta["unranked"] == ["head.weight"]
    with pytest.raises(SelectionError, match=r"no target direction.*Probe\(model, targets="):
        select(synthetic_stats(), count=1, ranking="alignment")
    with pytest.raises(SelectionError, match="does not know the direction"):
        select(fg.Blueprint.from_stats(synthetic_stats()), count=1, ranking="alignment")
    values[:] = np.nan
    with pytest.raises(SelectionError, match="no block has a score"):
        select(stats, count=1, ranking="alignment")


def test_controls():
    model, stats = Toy(), synthetic_stats()
    first = select(None, model, ranking="first", fraction=0.4)
    last = select(None, model, ranking="last", fraction=0.4)
    assert first.names == ["embed.weight", "layers.0.norm.weight", "layers.1.norm.weight"]
    # Of 86: head (35), the last norm (6); then no projection (48) fits, but the next norm does.
    assert last.names == ["layers.0.norm.weight", "layers.1.norm.weight", "head.weight"]
    draws = [select(None, model, ranking="random", fraction=0.4, seed=s) for s in range(6)]
    assert draws[0] == select(None, model, ranking="random", fraction=0.4, seed=0)
    assert len({tuple(d.names) for d in draws}) > 1
    assert {d.weights_hash for d in draws} == {fg.weights_hash(model)}
    assert select(None, model, ranking="first", count=1, hash_weights=False).weights_hash is None
    assert select(None, Toy().to("meta"), ranking="first", count=1).weights_hash is None
    with torch.no_grad():
        model.layers.get_submodule("0").norm.weight.mul_(100)
    assert select(None, model, ranking="magnitude", count=1).names == ["layers.0.norm.weight"]
    assert select(stats, ranking="last", count=1).names == ["head.weight"]
    with pytest.raises(SelectionError, match="reads the weights"):
        select(stats, ranking="magnitude", count=1)
    with pytest.raises(SelectionError, match="meta device"):
        select(stats, Toy().to("meta"), ranking="magnitude", count=1)
    with pytest.raises(SelectionError, match="needs a measurement"):
        select(None, model, count=1)
    with pytest.raises(SelectionError, match="shapes must come from model"):
        select(None, ranking="random", count=1)
    with pytest.raises(SelectionError, match="unknown ranking 'best'"):
        select(stats, ranking="best", count=1)


@pytest.mark.parametrize("ranking", CONTROLS)
def test_controls_at_tiles(ranking):
    made = select(None, Toy(), ranking=ranking, fraction=0.3, blocks="2x3", seed=1)
    assert made.spec == "2x3"
    assert 0.25 < made.fraction <= 0.3


# -- what may be chosen --------------------------------------------------------------------------


def test_include_and_exclude():
    stats = synthetic_stats()
    assert select(stats, fraction=1.0, include=["layers.*"]).names == list(SHAPES)[1:5]
    both = select(stats, fraction=1.0, include=["layers.*"], exclude=["*.norm.*"])
    assert both.names == ["layers.0.proj.weight", "layers.1.proj.weight"]
    for argument in ("include", "exclude"):
        with pytest.raises(SelectionError, match=f"{argument}: the pattern 'layer.9' matches no"):
            select(stats, fraction=1.0, **{argument: ["layer.9"]})
        with pytest.raises(SelectionError, match="list of patterns"):
            select(stats, fraction=1.0, **{argument: "layers.*"})
    with pytest.raises(SelectionError, match="no parameter can be chosen"):
        select(stats, fraction=1.0, exclude=["*"])


def test_frozen_parameters_stay_frozen():
    model = Toy()
    model.embed.weight.requires_grad_(False)
    for made in (
        select(synthetic_stats(), model, fraction=1.0),
        select(None, model, fraction=1.0, ranking="random"),
    ):
        assert made.names == list(SHAPES)[1:]
        assert made.n_total == 215  # the budget is of the whole model
    model.requires_grad_(False)
    with pytest.raises(SelectionError, match="no parameter can be chosen"):
        select(synthetic_stats(), model, fraction=1.0)


def test_source_must_fit_the_model():
    stats = synthetic_stats()
    with pytest.raises(SelectionError, match=r"'head\.weight' was measured, but this model lacks"):
        select(stats, Toy({n: s for n, s in SHAPES.items() if n != "head.weight"}), count=1)
    with pytest.raises(SelectionError, match=r"head\.weight has shape \(7, 6\)"):
        select(stats, Toy({**SHAPES, "head.weight": (7, 6)}), count=1)


def test_partly_measured_model_needs_the_model():
    part = synthetic_stats({n: s for n, s in SHAPES.items() if n.startswith("layers")})
    part.meta["n_model_parameters"] = 215
    with pytest.raises(SelectionError, match="only 108 of the model's 215"):
        select(part, fraction=0.2)
    made = select(part, Toy(), fraction=0.5)
    assert made.n_total == 215
    assert all(n.startswith("layers") for n in made.names)


def test_a_partial_model_is_refused():
    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, select(None, model, ranking="random", fraction=0.2,
                                            blocks="row"))  # fmt: skip
    with pytest.raises(SelectionError, match=r"trained partially.*remove"):
        select(None, model, ranking="random", fraction=0.2)
    partial.remove()
    assert select(None, model, ranking="random", fraction=0.2).names


# -- granularity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_blueprint", [False, True])
def test_coarse_sources_refuse_finer_blocks(as_blueprint):
    coarse, fine = synthetic_stats(), synthetic_stats(spec="row")
    if as_blueprint:
        coarse, fine = fg.Blueprint.from_stats(coarse), fg.Blueprint.from_stats(fine)
    with pytest.raises(SelectionError, match=r"embed\.weight and 3 more.*'module', not 'row'"):
        select(coarse, fraction=0.2, blocks="row")
    with pytest.raises(SelectionError, match=r"'row', not '2x2'"):
        select(fine, fraction=0.2, blocks="2x2")
    # One-dimensional parameters are one block at any granularity.
    assert select(coarse, fraction=0.2, blocks="row", include=["*norm*"]).n_blocks == 2
    assert select(fine, fraction=0.5).spec == "row"
    whole = select(fine, fraction=0.5, blocks="module")
    assert all(whole.is_whole(n) for n in whole.names)


@pytest.mark.parametrize("spec", ["module", "row", "2x3"])
@pytest.mark.parametrize("ranking", ["norm", "rms"])
def test_blueprint_and_stats_select_alike(spec, ranking):
    stats = synthetic_stats(spec=spec, seed=4)
    a = select(stats, fraction=0.37, ranking=ranking)
    b = select(fg.Blueprint.from_stats(stats), fraction=0.37, ranking=ranking)
    assert as_set(a) == as_set(b)
    assert a.weights_hash == b.weights_hash == stats.meta["weights_hash"]
    assert (a.meta["source"]["kind"], b.meta["source"]["kind"]) == ("stats", "blueprint")


def test_k_star_budget():
    blueprint = fg.Blueprint.from_stats(synthetic_stats(profile=[1e6, 1e3, 50, 1, 1, 1]))
    value = blueprint.k_star["memory"].value
    assert 0 < value < 1
    made = select(blueprint, k_star="memory", blocks="module", ranking="random", seed=3)
    assert made.fraction <= value
    assert as_set(made) == as_set(
        select(blueprint, fraction=value, blocks="module", ranking="random", seed=3)
    )
    with pytest.raises(SelectionError, match="no k\\* for 'energy'; it has memory, flops"):
        select(blueprint, k_star="energy")


def test_real_model_end_to_end():
    """Selected rows are those whose gradient, computed by autograd alone, has the largest rms."""
    model, batch = randomised(MODELS["llama-tied"]), batch_of()
    with fg.Probe(model, blocks="row") as probe:
        model(**batch).loss.backward()
    made = select(probe.stats(), model, fraction=0.1)
    made.check_model(model)
    rms = {}
    for name, p in model.named_parameters():
        if p.ndim == 2:
            rms |= {(name, i): float(g.norm()) / math.sqrt(g.numel()) for i, g in enumerate(p.grad)}
        else:
            rms[name, 0] = float(p.grad.norm()) / math.sqrt(p.numel())
    chosen = as_set(made)
    lowest = min(rms[b] for b in chosen)
    left = [(b, r) for b, r in rms.items() if b not in chosen and r > lowest * (1 + 1e-5)]
    capacity = int(made.n_total * 0.1)
    sizes = {n: made.grid(n).sizes() for n in made.shapes}
    for (name, i), _ in left:  # only what did not fit may be missing
        assert made.n_parameters + sizes[name][i] > capacity
    partial = fg.make_partial(model, made)
    assert sum(1 for _ in partial.parameters()) == len(made.names)


def test_a_selection_shows_itself_in_a_line():
    shapes = {"a.weight": (64, 64), "a.bias": (64,), "b.weight": (1000, 4)}
    chosen = fg.Selection(shapes, "row", {"a.weight": range(32), "b.weight": range(1000)})
    assert repr(chosen) == (
        "<Selection by row: 1,032 blocks of 2 of 3 parameters, 6,048 of 8,160 elements>"
    )
