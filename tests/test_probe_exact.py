"""T against one-example-at-a-time backward, on whole architectures."""

from __future__ import annotations

import pytest
import torch

import fastgrad as fg
from fastgrad_kernels.layout import block_sums, matrix_view
from tests.models import MODELS, batch_of, one_example, randomised


def per_example_gradients(model, batch, shift):
    """The definition: each example alone, its mean loss, dense gradients."""
    out = []
    for j in range(batch["input_ids"].shape[0]):
        model.zero_grad()
        model(**one_example(batch, j)).loss.backward()
        out.append(
            {
                n: (torch.zeros_like(p) if p.grad is None else p.grad.clone())
                for n, p in model.named_parameters()
            }
        )
    labels = batch["labels"][:, 1:] if shift else batch["labels"]
    counts = (labels != -100).sum(1)
    return out, counts


@pytest.mark.parametrize("blocks", ["module", "16x8", "row"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": "right"}, {"padding": "left", "masked": True}], ids=str
)
@pytest.mark.parametrize("architecture", list(MODELS))
def test_T_equals_one_example_at_a_time(architecture, options, blocks):
    model = randomised(MODELS[architecture])
    batch = batch_of(**options)
    shift = architecture != "bert"
    reference, counts = per_example_gradients(model, batch, shift)
    model.zero_grad()
    with fg.Probe(model, blocks=blocks, strict=True) as probe:
        model(**batch).loss.backward()
    stats = probe.stats()
    assert {c.status for c in stats.coverage.values()} <= {"exact", "unused"}
    assert stats.label_tokens.tolist() == counts.tolist()
    T = stats.influence("example_mean")
    share = (counts / counts.sum()).numpy()
    total = {n: sum(w * r[n] for w, r in zip(share, reference, strict=True)) for n in stats.names}
    largest = max(float(r[n].double().norm()) for r in reference for n in stats.names)
    for p, name in enumerate(stats.names):
        expected = torch.stack([r[name].double().norm() for r in reference]).numpy()
        # Relative to the largest example: where a norm is zero in theory (a key's bias under
        # softmax) both sides hold rounding noise.
        scale = max(expected.max(), 1e-3 * largest)
        assert abs(T[p] - expected).max() <= 1e-4 * scale, name
        assert abs(stats.T[p] - expected * share).max() <= 1e-4 * scale, name
        grid = stats.grid(name)
        for j, r in enumerate(reference):
            sums = block_sums(matrix_view(r[name]).square(), grid.block_rows, grid.block_cols)
            got = stats.blocks(name, "example_mean")[:, j]
            assert abs(got - sums.sqrt().numpy()).max() <= 1e-4 * scale, name
        assert abs(stats.grad_norm[p] - float(total[name].double().norm())) <= 1e-4 * scale, name
        grads = dict(model.named_parameters())[name].grad
        if grads is not None:
            torch.testing.assert_close(grads, total[name].float(), rtol=1e-3, atol=1e-4 * scale)
