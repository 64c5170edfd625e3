"""The probe with granularities by name, and with pieces that go to disk as they come."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import fastgrad as fg
from fastgrad.errors import BlockSpecError, StatsError
from tests.models import MODELS, batch_of, randomised
from tests.test_granularity_flow import OUT, QUERY, measured
from tests.test_stats_shards import assert_same

MODEL = "llama"


def run(probe, seeds):
    with probe:
        for seed in seeds:
            probe.model(**batch_of(seed=seed)).loss.backward()
            probe.model.zero_grad()
    return probe.stats()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "bert", "gemma"])
def test_heads_are_what_single_examples_give(architecture):
    model = randomised(MODELS[architecture])
    stats = run(fg.Probe(model, "head"), [1, 2])
    expected = measured(model)
    assert (stats.spec, stats.specs) == (expected.spec, expected.specs)
    assert set(stats.specs.values()) != {"module"}
    for name in stats.names:
        np.testing.assert_allclose(
            stats.blocks(name), expected.blocks(name), rtol=2e-4, atol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(
            stats.block_grad_norm(name), expected.block_grad_norm(name), rtol=1e-4, atol=1e-7
        )
        np.testing.assert_allclose(
            (stats.blocks(name) ** 2).sum(0), stats.T[stats.index(name)] ** 2, rtol=1e-5, atol=1e-10
        )


def test_granularities_by_pattern_with_directions():
    model = randomised(MODELS[MODEL])
    blocks = {"*q_proj*": "head", "*.mlp.*": "8x*", "lm_head.weight": "row"}
    direction = {QUERY: torch.randn(32, 32), "lm_head.weight": torch.randn(61, 32)}
    stats = run(fg.Probe(model, blocks, targets=direction), [1])
    plain = run(fg.Probe(model, targets=direction), [1])
    assert stats.specs[QUERY] == "8x*"
    assert OUT not in stats.specs
    np.testing.assert_allclose(stats.T, plain.T, rtol=1e-4)
    np.testing.assert_allclose(stats.alignment, plain.alignment, rtol=1e-3, atol=1e-5)
    with pytest.raises(BlockSpecError, match="matches no parameter"):
        fg.Probe(model, {"nope": "row"})
    with pytest.raises(BlockSpecError, match="unknown block granularity"):
        fg.Probe(model, "heads")
    only = run(fg.Probe(model, "head", params=["*layers.0.self_attn.q_proj*"]), [1])
    assert (only.names, only.grid(QUERY).n_blocks) == ([QUERY], 4)


@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_a_probe_that_streams_measures_the_same(tmp_path, every):
    model, folder = randomised(MODELS[MODEL]), tmp_path / "s"
    kwargs = {"blocks": "head", "detail": ["*q_proj*"], "targets": {OUT: torch.ones(32, 32)}}
    whole = run(fg.Probe(model, **kwargs), range(4))
    probe = fg.Probe(model, **kwargs, shards=folder, shard_examples=every)
    found = run(probe, range(4))
    assert_same(found, whole, leave_out=("block_sq", "unloaded"))
    with pytest.raises(StatsError, match="left on disk"):
        found.blocks(QUERY)
    assert_same(fg.GradientStats.load(folder), whole)
    with pytest.raises(StatsError, match="holds statistics already"):
        fg.Probe(model, shards=folder)


def test_memory_of_a_probe_that_streams_is_bounded(tmp_path):
    model = randomised(MODELS[MODEL])
    kwargs = {"blocks": "1x1", "detail": ["*layers.0.self_attn.[qkv]_proj*"]}

    def used(n, **more):
        tracemalloc.start()
        stats = run(fg.Probe(model, **kwargs, **more), [1] * n)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert stats.n_examples == 3 * n
        return peak

    used(1)
    few, many = (used(n, shards=tmp_path / str(n), shard_examples=9) for n in (10, 60))
    # What does grow by is Python's garbage of autograd graphs, until it is collected.
    assert many - few < (used(60) - used(10)) / 4, (few, many)
