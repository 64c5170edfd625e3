"""Rows of a candidate batch, chosen by the model as it is."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastgrad as fg
from fastgrad.errors import FastgradError, ProbeError
from fastgrad.online import BatchChooser, take_rows


def setting():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    )
    return model, torch.randn(20, 8), torch.randint(0, 4, (20,))


def loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def norms(model, x, y, parameters):
    model.eval()
    found = []
    for i in range(len(x)):
        grads = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        found.append(float(sum(g.double().square().sum() for g in grads)) ** 0.5)
    model.train()
    return np.array(found)


@pytest.mark.parametrize("params", [None, ["3.*"]])
def test_the_rows_with_the_largest_gradients_are_chosen(params):
    model, x, y = setting()
    chooser = BatchChooser(model, 0.25, params=params, loss=loss, loss_reduction="row_mean")
    found = chooser.choose((x, y))
    own = list(model.parameters()) if params is None else list(model[3].parameters())
    expected = norms(model, x, y, own)
    # the reduction's scale is the example's own loss
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)
    assert found.rows.tolist() == np.argsort(-expected)[:5].tolist()
    assert torch.equal(found.batch[0], x[found.rows])
    assert torch.equal(found.batch[1], y[found.rows])
    least = BatchChooser(model, 0.25, params=params, loss=loss, loss_reduction="row_mean",
                         largest=False).choose((x, y))  # fmt: skip
    assert least.rows.tolist() == np.argsort(expected)[:5].tolist()


def test_nothing_about_the_model_changes():
    model, x, y = setting()
    loss(model, (x, y)).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    objects = [id(p) for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        BatchChooser(model, 0.5, params=["3.weight"], loss=loss).choose((x, y))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert [id(p) for p in model.parameters()] == objects
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_the_backward_pass_ends_at_the_lowest_parameter_that_counts():
    model, x, y = setting()
    seen = []
    model[0].register_full_backward_hook(lambda *a: seen.append("reached"))
    BatchChooser(model, 0.5, params=["3.*"], loss=loss).choose((x, y))
    assert not seen


def test_a_partial_model_is_scored_by_all_its_weights():
    model, x, y = setting()
    want = BatchChooser(model, 0.5, loss=loss, loss_reduction="row_mean").choose((x, y))
    selection = fg.select(None, model, fraction=0.3, ranking="random", blocks="row")
    partial = fg.make_partial(model, selection)
    chooser = BatchChooser(model, 0.5, loss=loss, loss_reduction="row_mean", partial=partial)
    found = chooser.choose((x, y))
    np.testing.assert_allclose(found.scores, want.scores)
    loss(model, found.batch).backward()
    assert all(p.grad is not None for p in partial.parameters())
    with pytest.raises(FastgradError, match="partial="):
        BatchChooser(model, 0.5, loss=loss).choose((x, y))


def test_rows_that_help_a_target():
    """Half of the candidates have wrong labels: those are aligned least with clean data."""
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 4)
    truth = torch.randn(8, 4)
    x = torch.randn(200, 8)
    y = (x @ truth).argmax(1)
    wrong = torch.arange(40) % 2 == 1
    noisy = torch.where(wrong, (y[:40] + 1) % 4, y[:40])
    cross_entropy(model(x[40:]), y[40:]).backward()
    target = fg.gradient_direction(model)
    model.zero_grad()
    chooser = BatchChooser(model, 0.5, by="alignment", targets=target, loss=loss)
    rows = chooser.choose((x[:40], noisy)).rows
    assert wrong[rows].float().mean() < 0.2


def test_copies_are_passed_over():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)], torch.nn.Linear(8, 4))
    x, y = torch.randn(12, 8), torch.randint(0, 4, (12,))
    x[4:8], y[4:8] = x[0], y[0]
    rows = BatchChooser(model, 0.5, loss=loss, similarity=0.99).choose((x, y)).rows
    assert len(rows) == 6
    assert sum(r in (0, 4, 5, 6, 7) for r in rows.tolist()) <= 1


def test_a_transformers_batch():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (8, 12))
    batch = {"input_ids": ids, "labels": ids, "names": list("abcdefgh")}

    def own(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    found = BatchChooser(model, 0.25, params=["transformer.h.*.mlp.*"], loss=own).choose(batch)
    assert found.batch["input_ids"].shape == (2, 12)
    assert found.batch["names"] == [batch["names"][i] for i in found.rows.tolist()]


def test_every_field_of_a_batch_is_cut_alike():
    x, names = torch.arange(4), ("a", "b", "c", "d")
    rows = np.array([3, 1])
    assert take_rows((x, names), rows, 4)[1] == ("d", "b")
    assert take_rows({"x": x, "names": list(names)}, rows, 4)["names"] == ["d", "b"]
    assert [int(t) for t in take_rows({"x": list(x)}, rows, 4)["x"]] == [3, 1]
    two = take_rows([x[:2].numpy(), x[2:]], np.array([1]), 2)
    assert len(two) == 2
    assert (two[0].tolist(), two[1].tolist()) == ([1], [3])
    nested = take_rows({"pair": (x[:2], x[2:])}, np.array([1]), 2)["pair"]
    assert [t.tolist() for t in nested] == [[1], [3]]
    Pair = collections.namedtuple("Pair", "left right")
    assert take_rows(Pair(x, x + 1), rows, 4).right.tolist() == [4, 2]


def test_a_share_is_the_decimal_that_was_written():
    model, *_ = setting()
    x, y = torch.randn(100, 8), torch.randint(0, 4, (100,))
    assert len(BatchChooser(model, 0.29, loss=loss).choose((x, y)).rows) == 29


def test_what_cannot_be_is_refused():
    model, x, y = setting()
    with pytest.raises(ProbeError, match="unknown score"):
        BatchChooser(model, by="best")
    with pytest.raises(ProbeError, match="target direction"):
        BatchChooser(model, by="alignment")
    with pytest.raises(ProbeError, match="similarity"):
        BatchChooser(model, similarity=7)
    with pytest.raises(ProbeError, match="list of patterns"):
        BatchChooser(model, params="3.*")
    for share in (0, 1.5, True):
        with pytest.raises(ProbeError, match="share"):
            BatchChooser(model, share)
    with pytest.raises(ProbeError, match="matches no parameter"):
        BatchChooser(model, params=["head.*"])
    with pytest.raises(FastgradError, match="as many"):
        take_rows({"x": x[:3]}, np.array([0]), 20)
    x[3, 3] = float("nan")
    with pytest.raises(fg.errors.NonFiniteGradientError):
        BatchChooser(model, loss=loss).choose((x, y))
    assert model.training
