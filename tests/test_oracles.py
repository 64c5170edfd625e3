"""T against other people's per-example gradients, on the layers that both sides cover.

``test_probe_exact`` and the zoo compare with our own loop over examples; here the reference
comes from code that nobody here wrote. The foreign libraries are optional (``tests/oracles.txt``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastgrad as fg
from tests.models import MODELS, VOCAB, batch_of, one_example, randomised

Norms = dict[str, np.ndarray]
N = 4


def assert_agree(got: fg.GradientStats, want: Norms, needed: set[str]) -> None:
    """Norms of the examples' contributions, for all that the probe calls exact."""
    exact = {n for n, c in got.coverage.items() if c.status == "exact"} & set(want)
    assert needed <= exact, {n: got.coverage[n] for n in needed - exact}
    largest = max(want[n].max() for n in exact)
    for name in exact:
        scale = max(want[name].max(), 1e-3 * largest)
        assert abs(got.T[got.index(name)] - want[name]).max() <= 1e-4 * scale, name


def norms(gradients: dict[str, Tensor]) -> Norms:
    """From per-example gradients ``[n, *shape]``."""
    return {n: g.detach().double().flatten(1).norm(dim=1).numpy() for n, g in gradients.items()}


# -- models that the layerwise libraries understand -------------------------------------------


class Words(nn.Module):
    """Embedding, norm and linear layers over tokens; one class per row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x.mean(1))


def pictures(groups: int = 1) -> nn.Sequential:
    """Convolutions of every kind that the libraries know: strides, padding, groups."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=groups, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def waves() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 6, 4, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 10, 5)
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    )


Make = Callable[[], nn.Module]
# model, its input, the parameters that the probe has to call exact
NETS: dict[str, tuple[Make, Callable[[], Tensor], set[str]]] = {
    "words": (
        Words,
        lambda: torch.randint(0, VOCAB, (N, 7)),
        {"embed.weight", "norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"},
    ),
    "pictures": (
        pictures,
        lambda: torch.randn(N, 3, 12, 12),
        {"0.weight", "0.bias", "2.weight", "5.weight", "5.bias"},
    ),
    # torch.func and Opacus only: the others' norms of grouped convolutions differ from these two's
    "grouped pictures": (
        lambda: pictures(groups=2),
        lambda: torch.randn(N, 3, 12, 12),
        {"0.weight", "2.weight", "5.weight"},
    ),
    "waves": (waves, lambda: torch.randn(N, 2, 20), {"0.weight", "0.bias", "3.weight", "3.bias"}),
    "perceptron": (perceptron, lambda: torch.randn(N, 12), {"0.weight", "2.bias", "4.weight"}),
}


def net(name: str) -> tuple[nn.Module, Tensor, Tensor, set[str]]:
    make, inputs, needed = NETS[name]
    model = randomised(make)
    return model, inputs(), torch.randint(0, 5, (N,)), needed


def probed(model: nn.Module, x: Tensor, y: Tensor) -> fg.GradientStats:
    with fg.Probe(model, loss_reduction="row_mean") as probe:
        F.cross_entropy(model(x), y).backward()
    return probe.stats()


# -- oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma"])
@pytest.mark.parametrize("options", [{}, {"padding": "right", "masked": True}], ids=str)
def test_torch_func_on_language_models(architecture, options):
    model = randomised(MODELS[architecture])
    model.set_attn_implementation("eager")  # vmap has no rule for the fused one
    model.config.use_cache = False
    batch = batch_of(**options)

    def loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        inputs = {k: v[None] for k, v in row.items()}
        return functional_call(model, parameters, (), inputs).loss

    gradients = vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), batch)
    with fg.Probe(model, strict=True) as probe:
        model(**batch).loss.backward()
    stats = probe.stats()
    assert set(stats.names) == set(gradients)
    mean = stats.influence("example_mean")
    want = norms(gradients)
    largest = max(w.max() for w in want.values())
    for p, name in enumerate(stats.names):
        scale = max(want[name].max(), 1e-3 * largest)
        assert abs(mean[p] - want[name]).max() <= 1e-4 * scale, name


@pytest.mark.parametrize("name", NETS)
def test_torch_func(name):
    model, x, y, needed = net(name)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None]) / N

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    assert_agree(probed(model, x, y), norms(gradients), needed)


@pytest.mark.parametrize("name", NETS)
def test_opacus(name):
    opacus = pytest.importorskip("opacus")
    model, x, y, needed = net(name)
    stats = probed(copy.deepcopy(model), x, y)
    sampled = opacus.GradSampleModule(model, loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hooks warn that the inputs need no gradient
        F.cross_entropy(sampled(x), y).backward()
    # Opacus scales up to the gradient of the example's own loss.
    gradients = {n: p.grad_sample / N for n, p in model.named_parameters()}
    assert_agree(stats, norms(gradients), needed)


def test_opacus_on_a_language_model():
    opacus = pytest.importorskip("opacus")
    model, batch = randomised(MODELS["llama"]), batch_of()
    model.config.use_cache = False
    with fg.Probe(model, strict=True) as probe:
        model(**batch).loss.backward()
    model.zero_grad()
    sampled = opacus.GradSampleModule(model, loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampled(**batch).loss.backward()
    own = {n: p.grad_sample for n, p in model.named_parameters() if p.grad_sample is not None}
    stats = probe.stats()
    want = {n: w / batch["labels"].shape[0] for n, w in norms(own).items()}
    assert_agree(stats, want, set(stats.names))


@pytest.mark.parametrize("name", ["pictures", "waves", "perceptron"])
def test_backpack(name):
    """Sequential models only: that is what backpack differentiates."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad, BatchL2Grad

    model, x, y, needed = net(name)
    stats = probed(copy.deepcopy(model), x, y)
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack.backpack(BatchL2Grad(), BatchGrad()):
            loss(extended(x), y).backward()
    squares = {n: p.batch_l2.double().sqrt().numpy() for n, p in model.named_parameters()}
    assert_agree(stats, squares, needed)
    assert_agree(stats, norms({n: p.grad_batch for n, p in model.named_parameters()}), needed)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [*sorted(set(NETS) - {"grouped pictures"}), "llama"])
def test_kronfluence_self_influence(name, tmp_path: Path):
    """Self-influence of an example with the identity for a Hessian is the squared norm of its
    gradient, per module: weight and bias together."""
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    if name == "llama":
        model, batch = randomised(MODELS["llama"]), batch_of()
        model.config.use_cache = False
        examples = [
            {k: v[0] for k, v in one_example(batch, j).items()} for j in range(len(batch["labels"]))
        ]
    else:
        model, x, y, _ = net(name)
        examples = [{"x": x[j], "y": y[j]} for j in range(N)]

    def total(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if name != "llama":
            return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
        logits, targets = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    class Summed(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return total(model, batch)

        def compute_measurement(self, batch, model):
            return total(model, batch)

    model.eval()
    stacked = {k: torch.stack([e[k] for e in examples]) for k in examples[0]}
    with fg.Probe(model, loss_reduction="sum") as probe:
        total(model, stacked).backward()
    stats = probe.stats()
    task = Summed()
    analyzer = Analyzer(
        "identity",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(tmp_path),
    )
    arguments = FactorArguments(strategy="identity")
    analyzer.fit_all_factors("none", examples, factor_args=arguments)
    analyzer.compute_self_scores(
        "self",
        "none",
        examples,
        per_device_train_batch_size=len(examples),
        score_args=ScoreArguments(compute_per_module_scores=True),
    )
    compared = 0
    for module, score in analyzer.load_self_scores("self").items():
        parts = [f"{module}.{p}" for p in ("weight", "bias") if f"{module}.{p}" in stats.names]
        if all(stats.coverage[p].status == "exact" for p in parts):
            got = sum(stats.T[stats.index(p)] ** 2 for p in parts)
            np.testing.assert_allclose(np.sqrt(got), np.sqrt(score.numpy()), rtol=1e-4)
            compared += 1
    assert compared >= {"words": 3, "perceptron": 3, "llama": 15}.get(name, 1)
