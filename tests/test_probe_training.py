"""The probe in the loops people have: adapters, quantised bases, scalers, clipping, packing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastgrad as fg
from fastgrad.errors import CoverageError, ProbeError
from tests.models import MODELS, VOCAB, batch_of, llama, one_example, randomised


def alone(model, batch, j, names, loss_of=lambda m, b: m(**b).loss):
    """Gradient norms of one example's own mean loss, ``[len(names)]``."""
    model.zero_grad()
    loss_of(model, one_example(batch, j)).backward()
    own = dict(model.named_parameters())
    return np.array([0.0 if own[n].grad is None else float(own[n].grad.norm()) for n in names])


def assert_exact(stats, model, batch, rtol=1e-4, **kwargs):
    assert {c.status for c in stats.coverage.values()} <= {"exact", "unused", "frozen"}, [
        c for c in stats.coverage.values() if c.reason
    ]
    assert not stats.meta["mixes_examples"]
    T = stats.influence("example_mean")
    for j in range(T.shape[1]):
        want = alone(model, batch, j, stats.names, **kwargs)
        floor = 1e-3 * want.max()
        assert (abs(T[:, j] - want) <= rtol * np.maximum(want, floor)).all(), j


# -- adapters ----------------------------------------------------------------------------


def adapted(**kwargs):
    from peft import LoraConfig, get_peft_model

    options = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], **kwargs}
    model = get_peft_model(randomised(llama), LoraConfig(init_lora_weights=False, **options))
    return model.train()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True},
     {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("blocks", ["module", "row"])
def test_lora_and_dora(options, blocks):
    """DoRA's magnitude is divided by the norm of the adapted weight: a function of parameters."""
    model, batch = adapted(**options), batch_of()
    with fg.Probe(model, blocks, strict=True) as probe:
        model(**batch).loss.backward()
    assert_exact(probe.stats(), model, batch)


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "PrefixTuningConfig",
                                  "VeraConfig", "LoKrConfig"])  # fmt: skip
def test_other_adapters(kind):
    import peft

    options = {
        "IA3Config": {"target_modules": ["k_proj", "down_proj"],
                      "feedforward_modules": ["down_proj"]},
        "PromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
        "PrefixTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
        "VeraConfig": {"target_modules": ["q_proj"], "r": 4},
        "LoKrConfig": {"target_modules": ["q_proj"], "r": 2},
    }[kind]  # fmt: skip
    model = peft.get_peft_model(randomised(llama), getattr(peft, kind)(**options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    batch = batch_of()
    with fg.Probe(model, strict=True) as probe:
        model(**batch).loss.backward()
    assert_exact(probe.stats(), model, batch)


def test_what_a_custom_function_hides_is_missing_and_one_example_is_exact_all_the_same():
    """LoHa's product is a custom autograd function, which PyTorch announces to nobody."""
    import peft

    model = peft.get_peft_model(
        randomised(llama), peft.LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False)
    )
    model.base_model.model.lm_head.weight.requires_grad_(True)
    batch = batch_of()
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
    missing = {n: c for n, c in probe.stats().coverage.items() if c.status == "missing"}
    assert len(missing) == 8
    assert all("hada" in n and "custom autograd function" in c.reason for n, c in missing.items())
    single = one_example(batch, 0)
    targets = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    with fg.Probe(model, "4x*", targets=targets, strict=True) as probe:
        model(**single).loss.backward()
    stats = probe.stats()
    assert_exact(stats, model, single)
    own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for p, name in enumerate(stats.names):
        np.testing.assert_allclose(stats.alignment[p, 0], float(own[name].sum()), atol=1e-4)
        squares = float((stats.blocks(name)[:, 0] ** 2).sum())
        np.testing.assert_allclose(squares, float(own[name].square().sum()), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_lora_on_a_quantised_base(kind):
    bnb = pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    model = randomised(llama)
    for name, m in list(model.named_modules()):
        if not isinstance(m, nn.Linear) or name == "lm_head":
            continue
        weight = m.weight.data.clone()
        if kind == "8bit":
            q = bnb.nn.Linear8bitLt(m.in_features, m.out_features, bias=False,
                                    has_fp16_weights=False, threshold=6.0)  # fmt: skip
            q.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            q = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=False,
                                  compute_dtype=torch.float32, quant_type="nf4")  # fmt: skip
            q.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model.set_submodule(name, q.to("cpu"))
    model.requires_grad_(False)
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    # as many examples as tokens: sizes say nothing where the quantised product hides its own
    for batch in (batch_of(), batch_of(9, 9)):
        with fg.Probe(model, strict=True) as probe:
            model(**batch).loss.backward()
        assert_exact(probe.stats(), model, batch)
    base = next(n for n, p in model.named_parameters() if not p.is_floating_point())
    with pytest.raises(ProbeError, match="which has no gradient"):
        fg.Probe(model, frozen=[base])


def test_frozen_parameters_are_measured_and_stay_as_they_are():
    model, batch = randomised(llama), batch_of()
    whole = copy.deepcopy(model)
    with fg.Probe(whole) as probe:
        whole(**batch).loss.backward()
    want = probe.stats()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([model.lm_head.weight])
    with fg.Probe(model, frozen=["model.*"], strict=True) as probe:
        for _ in range(2):
            model(**batch).loss.backward()
            assert [n for n, p in model.named_parameters() if p.grad is not None] == [
                "lm_head.weight"
            ]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    got = probe.stats()
    assert got.names == want.names
    np.testing.assert_allclose(got.T, np.tile(want.T, 2), rtol=1e-5)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-5)
    optimizer.step()
    with pytest.raises(ProbeError, match=r"frozen: the pattern 'none\.\*'"):
        fg.Probe(model, frozen=["none.*"])


# -- loops -------------------------------------------------------------------------------


def test_float16_autocast_with_a_grad_scaler():
    model, batch = randomised(llama), batch_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss_of(m, b):
        with torch.autocast("cpu", torch.float16):
            return m(**b).loss

    with fg.Probe(model, loss_scale=scaler.get_scale, strict=True) as probe:
        for _ in range(2):  # the scale doubles in between
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
    stats = probe.stats()
    assert scaler.get_scale() == 256.0
    np.testing.assert_allclose(stats.T[:, 3:], 2 * stats.T[:, :3], rtol=2e-2)
    for j in range(3):
        want = alone(model, batch, j, stats.names, loss_of)
        for column in (j, j + 3):
            got = stats.influence("example_mean")[:, column]
            # float16 carries 11 bits; the scaled and the unscaled gradient round at other places
            assert (abs(got - want) <= 2e-2 * np.maximum(want, 1e-2 * want.max())).all()


def test_clipping_comes_after_the_measurement():
    model, batch = randomised(llama), batch_of()
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    stats = probe.stats()
    np.testing.assert_allclose(np.sqrt((stats.grad_norm**2).sum()), float(total), rtol=1e-4)
    clipped = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert clipped < 1.1e-6


def test_tokens_of_the_whole_accumulated_batch_as_divisor():
    """transformers' Trainer divides every part's loss by the label tokens of all parts."""
    model = randomised(llama)
    parts = [batch_of(3, masked=True, seed=1), batch_of(2, 6, seed=2)]
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in parts)
    with fg.Probe(model, strict=True) as probe:
        for batch in parts:
            model(**batch, num_items_in_batch=torch.tensor(tokens)).loss.backward()
    stats = probe.stats()
    column = 0
    for batch in parts:
        for j in range(len(batch["labels"])):
            want = alone(model, batch, j, stats.names)
            count = stats.label_tokens[column]
            for scale, factor in (("example_mean", 1), ("example_sum", count),
                                  ("contribution", count / tokens)):  # fmt: skip
                np.testing.assert_allclose(
                    stats.influence(scale)[:, column], want * factor, rtol=2e-4, err_msg=scale
                )
            column += 1


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("flash", [False, True], ids=["positions", "cu_seq_lens"])
@pytest.mark.parametrize("blocks", ["module", "8x8"])
def test_rows_packed_by_transformers_collator(architecture, flash, blocks):
    from transformers import DataCollatorWithFlattening

    model = randomised(MODELS[architecture])
    model.config.use_cache = False
    lengths = [5, 3, 7]
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCAB, (k,), generator=g).tolist() for k in lengths]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)
    packed = dict(collate([{"input_ids": r} for r in rows]))
    with fg.Probe(model, blocks, strict=True) as probe:
        model(**packed).loss.backward()
    stats = probe.stats()
    assert stats.label_tokens.tolist() == [k - 1 for k in lengths]
    for j, row in enumerate(rows):
        ids = torch.tensor([row])
        want = alone(model, {"input_ids": ids, "labels": ids}, 0, stats.names)
        got = stats.influence("example_mean")[:, j]
        assert (abs(got - want) <= 1e-4 * np.maximum(want, 1e-3 * want.max())).all()
        for p, name in enumerate(stats.names):
            squares = (stats.blocks(name, "example_mean")[:, j] ** 2).sum()
            np.testing.assert_allclose(np.sqrt(squares), got[p], rtol=1e-4, atol=1e-8)


# -- layers of PyTorch's own -------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module, rows_first: bool) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, 16), layer
        self.head, self.rows_first = nn.Linear(16, VOCAB), rows_first

    def forward(self, input_ids, labels, **unused):
        x = self.embed(input_ids)
        x = self.layer(x if self.rows_first else x.transpose(0, 1))
        x = x[0] if isinstance(x, tuple) else x
        x = x if self.rows_first else x.transpose(0, 1)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda first: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=first),
        lambda first: nn.LSTM(16, 16, batch_first=first),
        lambda first: nn.GRU(16, 16, 2, batch_first=first, bidirectional=False),
    ],
    ids=["encoder", "lstm", "gru"],
)
def test_layers_of_pytorch(make, rows_first):
    torch.manual_seed(0)
    model, batch = Tagger(make(rows_first), rows_first), batch_of()
    with fg.Probe(model, strict=True) as probe:
        model(**batch).backward()
    assert_exact(probe.stats(), model, batch, loss_of=lambda m, b: m(**b))


# -- what the probe offers ---------------------------------------------------------------


def test_heads_roll_up_to_their_projection():
    model, batch = randomised(llama), batch_of()
    with fg.Probe(model, "head", strict=True) as probe:
        model(**batch).loss.backward()
    heads = probe.stats()
    model.zero_grad()
    with fg.Probe(model) as probe:
        model(**batch).loss.backward()
    whole = probe.stats()
    np.testing.assert_allclose(heads.T, whole.T, rtol=1e-5)
    query, back = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qo")
    assert heads.blocks(query).shape == heads.blocks(back).shape == (4, 3)
    for j in range(3):
        model.zero_grad()
        model(**one_example(batch, j)).loss.backward()
        own = dict(model.named_parameters())
        rows = own[query].grad.view(4, 8, 32).flatten(1).norm(dim=1)
        cols = own[back].grad.view(32, 4, 8).transpose(0, 1).flatten(1).norm(dim=1)
        for name, want in ((query, rows), (back, cols)):
            np.testing.assert_allclose(heads.blocks(name, "example_mean")[:, j], want, rtol=1e-4)


def test_a_folder_holds_what_memory_would(tmp_path):
    model = randomised(llama)
    batches = [batch_of(n, seed=n) for n in (3, 2, 4, 1, 3)]

    def probed(**kwargs):
        with fg.Probe(model, "8x*", detail=["*.q_proj.*"], **kwargs) as probe:
            for k, batch in enumerate(batches):
                probe.next_ids([100 * k + j for j in range(len(batch["labels"]))])
                model.zero_grad()
                model(**batch).loss.backward()
        return probe.stats()

    want = probed()
    assert want.example_ids.tolist()[:5] == [0, 1, 2, 100, 101]
    seen = probed(shards=tmp_path / "stats", shard_examples=4)
    assert len(list((tmp_path / "stats").glob("*.safetensors"))) == 3
    got = fg.GradientStats.load(tmp_path / "stats")
    for one in (seen, got):
        np.testing.assert_array_equal(one.T, want.T)
        np.testing.assert_array_equal(one.batch, want.batch)
        np.testing.assert_array_equal(one.batch_sq, want.batch_sq)
        np.testing.assert_array_equal(one.example_ids, want.example_ids)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(got.blocks(name), want.blocks(name))
    with pytest.raises(fg.errors.StatsError, match="holds statistics already"):
        fg.Probe(model, shards=tmp_path / "stats")


def test_ids_must_fit_their_batch():
    model = randomised(llama)
    with fg.Probe(model) as probe:
        probe.next_ids([1, 2])
        with pytest.raises(ProbeError, match="2 example ids were given for a batch of 3"):
            model(**batch_of())


# -- batches without examples ------------------------------------------------------------


class Routes(nn.Module):
    """No examples take another way than some do."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.small, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.last(torch.tanh((self.usual if len(x) else self.small)(x)))


def test_a_batch_without_examples():
    torch.manual_seed(0)
    model, x, nothing = Routes(), torch.randn(3, 6), torch.zeros(0, 6)
    with fg.Probe(model, loss_reduction="sum", strict=True) as probe:
        model(nothing).square().sum().backward()
        assert all(not p.grad.any() for p in model.small.parameters())
        with pytest.raises(ProbeError, match="no backward pass of a batch with examples"):
            probe.stats()
        probe.next_ids([4, 5, 6])
        model(x).square().sum().backward()
        losses = [model(nothing).sum()]
        probe.next_ids([7, 8, 9])
        losses += [model(x).square().sum(), model(nothing).sum()]
        torch.autograd.backward(losses)
    stats = probe.stats()
    assert stats.example_ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert (stats.n_examples, stats.n_batches) == (6, 2)
    assert {n: c.status for n, c in stats.coverage.items() if c.status != "exact"} == {
        "small.weight": "unused",
        "small.bias": "unused",
    }
    for j in range(6):
        model.zero_grad()
        model(x[j % 3][None]).square().sum().backward()
        want = [float(p.grad.norm()) if p.grad is not None else 0.0 for p in model.parameters()]
        np.testing.assert_allclose(stats.T[:, j], want, rtol=1e-4, atol=1e-6)


def test_what_is_outside_of_a_batch_without_examples_is_missing_as_ever():
    torch.manual_seed(0)
    model = Routes()
    with fg.Probe(model) as probe:
        losses = [model(torch.zeros(0, 6)).sum(), model(torch.randn(3, 6)).square().sum()]
        torch.autograd.backward([*losses, model.small.weight.square().sum()])
    missing = {n: c.reason for n, c in probe.stats().coverage.items() if c.status == "missing"}
    assert list(missing) == ["small.weight"]
    assert "no tap saw" in missing["small.weight"]


class Tokens(nn.Module):
    """Labels, packed rows, a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)

    def forward(self, input_ids, labels=None, **unused):
        x = self.embed(input_ids)
        logits = checkpoint(lambda v: self.lin(torch.tanh(v)), x, use_reentrant=False)
        if labels is None:
            return logits.sum()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_labels_and_packed_rows_of_no_examples():
    """The mean over no labels is no number, and its gradient is none to be recorded."""
    torch.manual_seed(0)
    model, batch = Tokens(), {k: v for k, v in batch_of().items() if k != "attention_mask"}
    row = torch.zeros(1, 0, dtype=torch.int64)
    with fg.Probe(model, strict=True) as probe:
        loss = model(**{k: v[:0] for k, v in batch.items()})
        assert loss.isnan()
        loss.backward()
        model(input_ids=row, cu_seq_lens_q=torch.tensor([0])).backward()
        model(**batch).backward()
    assert_exact(probe.stats(), model, batch, loss_of=lambda m, b: m(**b))
    assert probe.stats().n_batches == 1


def test_one_of_several_processes_without_examples(tmp_path):
    """Each process records as many passes as the others."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        wrapped = DistributedDataParallel(model)
        with fg.Probe(model, strict=True) as probe:
            wrapped(torch.zeros(0, 6)).sum().backward()
            assert probe.stats().n_examples == 0
            wrapped(torch.randn(3, 6)).sum().backward()
        stats = probe.stats()
    finally:
        dist.destroy_process_group()
    assert (stats.n_batches, stats.n_examples, stats.batch.tolist()) == (2, 3, [1, 1, 1])
    assert not stats.batch_sq[:, 0].any()
    assert stats.batch_sq[:, 1].all()


# -- transforms of functions -------------------------------------------------------------


def forward_mode(model, x):
    with forward_ad.dual_level():
        out = model(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(out).tangent


def of_parameters(model, x):
    own = dict(model.named_parameters())
    return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(own)


def of_parameters_one_by_one(model, x):
    def one(p, v):
        return torch.func.functional_call(model, p, (v[None],)).sum()

    own = dict(model.named_parameters())
    return torch.vmap(torch.func.grad(one), (None, 0))(own, x)


TRANSFORMS = {
    "vmap": lambda m, x: torch.func.vmap(m)(x[:, None]),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones(4, 2)),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(lambda v: m(v).sum())(x),
    "of parameters": of_parameters,
    "of parameters, one by one": of_parameters_one_by_one,
    "forward mode": forward_mode,
}


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_model_are_what_they_are_without_a_probe(transform):
    """Also between a forward pass and its loss, which are measured as ever."""
    model, x = layers(), torch.randn(4, 6)
    want = tree_leaves(TRANSFORMS[transform](model, x))
    with fg.Probe(model, loss_reduction="row_mean", strict=True) as probe:
        got = tree_leaves(TRANSFORMS[transform](model, x))
        out = model(x)
        TRANSFORMS[transform](model, x)
        F.linear(out, model[3].weight.T).square().mean().backward()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    stats = probe.stats()
    assert (stats.n_examples, stats.n_batches) == (4, 1)
    for j in range(4):
        model.zero_grad()
        F.linear(model(x[j : j + 1]), model[3].weight.T).square().mean().backward()
        norms = [float(p.grad.norm()) for p in model.parameters()]
        np.testing.assert_allclose(stats.influence("example_mean")[:, j], norms, rtol=1e-4)


def test_gradients_through_vmap_are_missing_by_name():
    model, x = layers(), torch.randn(4, 6)
    torch.vmap(model)(x).square().mean().backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with fg.Probe(model) as probe:
        torch.vmap(model)(x).square().mean().backward()
    for p, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad)
    with pytest.raises(CoverageError, match="no tap saw"):
        probe.stats()


class Ensemble(nn.Module):
    """Part of the model runs under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = torch.vmap(lambda row: torch.tanh(row * self.scale))(self.first(x))
        return self.last(self.first(x))


def test_parameters_under_vmap_inside_the_model_are_missing():
    torch.manual_seed(0)
    model, x = Ensemble(), torch.randn(4, 6)
    with fg.Probe(model) as probe:
        model(x).square().mean().backward()
    stats = probe.stats()
    missing = [n for n, c in stats.coverage.items() if c.status == "missing"]
    assert missing == ["scale"]
    for j in range(4):
        model.zero_grad()
        (model(x[j : j + 1]).square().mean() / 4).backward()
        for p, (name, q) in enumerate(model.named_parameters()):
            if name not in missing:
                np.testing.assert_allclose(stats.T[p, j], float(q.grad.norm()), rtol=1e-4)


# -- two forward passes before the backward pass -----------------------------------------


class Encoder(nn.Module):
    """With parameters that are used outside of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale, self.table = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(5, 6))

    def forward(self, x):
        self.seen = x
        return torch.tanh(self.body(x))


def looked_up_once(model, outs):
    table, outs = F.embedding(torch.tensor([4, 0, 4]), model.table), list(outs)
    return [out * table + out for out in outs]


def prepared_once(model, outs):
    weight, outs = model.scale.exp(), list(outs)
    return [out * weight + weight for out in outs]


OUTSIDE = {
    "head": lambda m, outs: [m.head(out) for out in outs],
    "scale": lambda m, outs: [out * m.scale for out in outs],
    "prepared": prepared_once,
    "looked up": looked_up_once,
    "flags of the last": lambda m, outs: [
        m.head(out.masked_fill(m.seen.isnan(), 0)) for out in outs
    ],
    "several": lambda m, outs: [m.head(torch.tanh(m.head(out) * m.scale)) for out in outs],
    "checkpoint": lambda m, outs: [
        checkpoint(lambda v: torch.tanh(m.head(v)) * m.scale, out, use_reentrant=False)
        for out in outs
    ],
    "backwards": lambda m, outs: [m.head(out) for out in list(outs)[::-1]][::-1],
}


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_parameters_that_several_passes_use_outside(outside, n, passes):
    """Each use is of the pass whose activations it is given, though others came later."""
    torch.manual_seed(0)
    model, inputs = Encoder(), torch.randn(passes, n, 3, 6)
    kinds = [torch.square, torch.cos, torch.exp][:passes]

    def losses(found):
        return [of(out).mean() for of, out in zip(kinds, found, strict=True)]

    with fg.Probe(model, strict=True) as probe:
        outs = [model(x) for x in inputs]
        sum(losses(OUTSIDE[outside](model, outs))).backward()
    stats = probe.stats()
    assert not stats.meta["mixes_examples"]
    for k, x in enumerate(inputs):
        for j in range(n):
            model.zero_grad(set_to_none=True)
            alone = OUTSIDE[outside](model, [model(x[j : j + 1])])[0]
            (kinds[k](alone).mean() / n).backward()
            want = [0.0 if p.grad is None else float(p.grad.norm()) for p in model.parameters()]
            np.testing.assert_allclose(stats.T[:, k * n + j], want, rtol=1e-4, atol=1e-7)


def test_what_another_probe_saw_prepared_is_not_taken_for_this_ones():
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(3, 3, 6)
    with fg.Probe(model):
        model(x)
        weight = model.scale.exp()
    with fg.Probe(model, blocks="1x2") as probe:
        (model(x) * weight).square().mean().backward()
    coverage = probe.stats().coverage
    assert coverage["scale"].status == "missing"
    assert coverage["body.weight"].status == "exact"


MEETING = {
    "difference": lambda m, a, b: (a - b).square().mean(),
    "cosine": lambda m, a, b: F.cosine_similarity(a, b).mean(),
    "contrastive": lambda m, a, b: F.cross_entropy(a[:, 0] @ b[:, 0].T, torch.arange(len(a))),
    "loss": lambda m, a, b: F.mse_loss(a, b),
    "triplet": lambda m, a, b: F.triplet_margin_loss(a, b, b.flip(0)),
    "weight": lambda m, a, b: (a * b.mean()).sum(),
    "ratio": lambda m, a, b: -F.logsigmoid(a.sum(1) - b.sum(1)).mean(),
    "side by side": lambda m, a, b: torch.cat([a, b]).std(0).sum(),
    "written": lambda m, a, b: (
        torch.zeros_like(b).index_add(0, torch.arange(len(a)), a).mul(b).sum()
    ),
}
APART = {
    "sum": lambda m, a, b: a.square().mean() + b.cos().mean(),
    "critic": lambda m, a, b: (a - b).mean(),
    "means": lambda m, a, b: a.square().mean() - b.square().mean(),
    "losses": lambda m, a, b: torch.stack([a.square().mean(), b.cos().mean()]).mean(),
    "target": lambda m, a, b: (a.detach() - b).square().mean(),
}


def met(loss, n):
    torch.manual_seed(0)
    model = Encoder()
    with fg.Probe(model) as probe:
        a, b = model(torch.randn(n, 3, 6)), model(torch.randn(n, 3, 6))
        model(torch.randn(n, 3, 6))  # another one, whose backward pass never comes
        loss(model, a, b).backward()
    stats = probe.stats()
    assert {stats.coverage[f"body.{n}"].status for n in ("weight", "bias")} == {"exact"}
    return stats


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("loss", MEETING)
def test_examples_of_two_passes_that_meet(loss, n):
    assert met(MEETING[loss], n).meta["mixes_examples"]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("loss", APART)
def test_examples_of_two_passes_that_do_not_meet(loss, n):
    assert not met(APART[loss], n).meta["mixes_examples"]


@pytest.mark.parametrize("join", [torch.sub, torch.mul, lambda a, b: torch.cat([a, b])])
def test_parameters_that_are_given_two_passes_at_once_are_missing(join):
    stats = met(lambda m, a, b: m.head(join(a, b)).square().mean(), 4)
    missing = {n for n, c in stats.coverage.items() if c.status == "missing"}
    assert missing == {"head.weight", "head.bias"}
