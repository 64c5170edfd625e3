"""A partial run that is saved and resumed goes on bit for bit, and a wrong resume is refused."""

from __future__ import annotations

import json
import resource
import signal

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import PartialError
from fastgrad.identity import model_parameters, weights_hash
from fastgrad.selection import Selection
from tests.models import MODELS, batch_of, randomised
from tests.test_partial import selection_of


def grouped(partial):
    """Decay for matrices and none for vectors, as most loops have it; empty groups stay."""
    full = model_parameters(partial.model)
    named = list(partial.named_parameters())
    return [
        {"params": [p for n, p in named if full[n].ndim >= 2], "weight_decay": 0.1},
        {"params": [p for n, p in named if full[n].ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_of(partial, make):
    optimizer = make(grouped(partial))
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)


def train(model, optimizer, scheduler, steps):
    for step in steps:
        model(**batch_of(seed=step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], 1.0
        )
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def everything(partial, optimizer):
    """All bits of a run: weights, packed values, optimizer state."""
    found = {f"w/{n}": p.detach().clone() for n, p in model_parameters(partial.model).items()}
    for name, p in partial.named_parameters():
        found[f"p/{name}"] = p.detach().clone()
        found |= {f"s/{name}/{k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def assert_same(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


ADAM = {
    "sparse-adamw": lambda groups: fg.SparseAdamW(groups, lr=1e-2),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


MASTERS = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("make", "dtype", "master"),
    [
        ("sparse-adamw", torch.float32, None),
        ("sparse-adamw", *MASTERS),
        ("sparse-adamw", torch.bfloat16, None),
        ("adamw", *MASTERS),
        ("sgd", torch.float32, None),
    ],
    ids=["fp32", "bf16-masters", "bf16", "adamw-bf16-masters", "sgd-fp32"],
)
def test_five_steps_saved_and_five_resumed_are_ten_steps(tmp_path, make, dtype, master):
    def begin():
        model = randomised(MODELS["llama-tied"]).to(dtype)
        partial = fg.make_partial(model, selection_of(model, "16x8"), master)
        return partial, *optimizer_of(partial, ADAM[make])

    straight, optimizer, scheduler = begin()
    train(straight.model, optimizer, scheduler, range(10))

    first, optimizer1, scheduler1 = begin()
    base = first.base_hash
    train(first.model, optimizer1, scheduler1, range(5))
    if master is not None:  # digits that a checkpoint of the model lacks
        blocks = first.packed[0]
        assert not torch.equal(blocks.packed.detach(), blocks.gather(blocks.full.detach()).float())
    size = first.save(tmp_path / "partial.safetensors")
    assert size == (tmp_path / "partial.safetensors").stat().st_size
    torch.save(
        [first.model.state_dict(), optimizer1.state_dict(), scheduler1.state_dict()],
        tmp_path / "rest.pt",
    )
    del first, optimizer1, scheduler1

    weights, moments, schedule = torch.load(tmp_path / "rest.pt", weights_only=True)
    model = MODELS["llama-tied"]().to(dtype)
    model.load_state_dict(weights)
    partial = fg.load_partial(model, tmp_path / "partial.safetensors")
    assert partial.base_hash == base != weights_hash(model)
    assert partial.selection == straight.selection
    optimizer2, scheduler2 = optimizer_of(partial, ADAM[make])
    optimizer2.load_state_dict(moments)
    scheduler2.load_state_dict(schedule)
    train(model, optimizer2, scheduler2, range(5, 10))
    assert_same(everything(partial, optimizer2), everything(straight, optimizer))


def test_values_are_saved_only_where_the_weight_lacks_them(tmp_path):
    from safetensors import safe_open

    model = randomised(MODELS["llama"])
    partial = fg.make_partial(model, selection_of(model, "16x8"))
    partial.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert not [k for k in file.keys() if k.startswith("values/")]  # noqa: SIM118


def test_a_delta_after_a_resume_names_the_base(tmp_path):
    model = randomised(MODELS["llama"])
    base = MODELS["llama"]()
    base.load_state_dict(model.state_dict())
    partial = fg.make_partial(model, selection_of(model, "row"))
    train(model, *optimizer_of(partial, ADAM["sparse-adamw"]), range(2))
    partial.save(tmp_path / "p.safetensors")
    other = MODELS["llama"]()
    other.load_state_dict(model.state_dict())
    resumed = fg.load_partial(other, tmp_path / "p.safetensors")
    fg.save_delta(resumed, tmp_path / "d.safetensors")
    fg.load_delta(base, tmp_path / "d.safetensors")  # compares the hash of the base
    assert weights_hash(base) == weights_hash(model)


def test_remove_after_a_resume_restores_the_first_flags(tmp_path):
    model = randomised(MODELS["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    model_parameters(model)[name].requires_grad_(False)
    fg.make_partial(model, selection_of(model, "row")).save(tmp_path / "p.safetensors")
    other = randomised(MODELS["llama"])
    flags = {n: p.requires_grad for n, p in fg.load_partial(
        other, tmp_path / "p.safetensors").remove().named_parameters()}  # fmt: skip
    assert {n for n, wanted in flags.items() if not wanted} == {name}


def saved_run(tmp_path, master=torch.float32):
    model = randomised(MODELS["llama"]).bfloat16()
    partial = fg.make_partial(model, selection_of(model, "16x8"), master)
    train(model, *optimizer_of(partial, ADAM["sparse-adamw"]), range(2))
    partial.save(tmp_path / "p.safetensors")
    return partial, tmp_path / "p.safetensors"


def untouched(model, before):
    assert not any(n.endswith("_fastgrad_packed") for n, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert weights_hash(model) == before


def test_a_model_that_changed_between_save_and_resume_is_refused(tmp_path):
    partial, path = saved_run(tmp_path)
    good = {n: p.detach().clone() for n, p in partial.model.state_dict().items()}
    name = partial.packed[0].name
    unselected = next(
        (slice(r0, r1), slice(c0, c1))
        for b in range(partial.selection.grid(name).n_blocks)
        if b not in partial.selection.blocks[name]
        for r0, r1, c0, c1 in [partial.selection.grid(name).bounds(b)]
    )
    block = partial.selection.grid(name).bounds(int(partial.selection.blocks[name][0]))
    selected = (slice(block[0], block[1]), slice(block[2], block[3]))
    for where, word in ((unselected, "changed between"), (selected, name)):
        model = MODELS["llama"]().bfloat16()
        model.load_state_dict(good)
        with torch.no_grad():
            model_parameters(model)[name][where] *= 2
        before = weights_hash(model)
        with pytest.raises(PartialError, match=word):
            fg.load_partial(model, path)
        untouched(model, before)
    with pytest.raises(PartialError, match=name):  # masters are compared at no cost
        fg.load_partial(model, path, check_weights=False)
    model = MODELS["llama"]()  # another dtype
    model.load_state_dict(good)
    with pytest.raises(PartialError, match="dtype"):
        fg.load_partial(model, path)
    model = MODELS["gpt2"]().bfloat16()
    with pytest.raises(PartialError, match="this model lacks it"):
        fg.load_partial(model, path)
    with pytest.raises(PartialError, match="already"):
        fg.load_partial(partial.model, path)
    model = MODELS["llama"]().bfloat16()
    model.load_state_dict(good)
    fg.load_partial(model, path)


def damaged(header, tensors):
    yield {**header, "format": "fastgrad.partial/99"}, tensors, "format"
    yield {k: v for k, v in header.items() if k != "order"}, tensors, "order"
    yield {**header, "order": header["order"][1:]}, tensors, "not those of the selection"
    yield {**header, "by_block": ["nope"]}, tensors, "not those of the selection"
    yield {**header, "master_dtype": "torch.int8"}, tensors, "damaged"
    yield {**header, "base_hash": 3}, tensors, "damaged"
    key = next(k for k in tensors if k.startswith("values/"))
    yield header, {**tensors, key: tensors[key] * 2}, "damaged"
    key = next(k for k in tensors if k.startswith("blocks/"))
    yield header, {k: v for k, v in tensors.items() if k != key}, "damaged"


def test_damaged_files_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from fastgrad.identity import tensors_hash

    partial, path = saved_run(tmp_path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastgrad"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    model = partial.remove()
    before = weights_hash(model)
    wrong = tmp_path / "wrong.safetensors"
    for bad, values, word in damaged(header, tensors):
        save_file(values, wrong, metadata={"fastgrad": json.dumps(bad)})
        with pytest.raises(PartialError, match=word):
            fg.load_partial(model, wrong)
        untouched(model, before)
    # consistent in itself, but the blocks are others than the values'
    key = next(k for k in tensors if k.startswith("blocks/"))
    values = {**tensors, key: tensors[key] + 10**6}
    bad = {**header, "content_hash": tensors_hash(sorted(values.items()))}
    save_file(values, wrong, metadata={"fastgrad": json.dumps(bad)})
    with pytest.raises(PartialError, match="damaged"):
        fg.load_partial(model, wrong)
    wrong.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PartialError, match="damaged"):
        fg.load_partial(model, wrong)
    wrong.write_bytes(b"")
    with pytest.raises(PartialError, match="damaged"):
        fg.load_partial(model, wrong)
    with pytest.raises(PartialError, match="no file"):
        fg.load_partial(model, tmp_path / "nowhere")
    untouched(model, before)


def test_a_full_disk_while_saving_loses_nothing(tmp_path):
    partial, path = saved_run(tmp_path)
    good = path.read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limit[1]))  # writes fail from there
    try:
        with pytest.raises(PartialError, match=r"could not write.*unchanged"):
            partial.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    partial.save(path)
    assert path.read_bytes() == good


def test_granularities_by_name_and_whole_tensors_come_back(tmp_path):
    model = randomised(MODELS["gpt2"])
    shapes = {n: tuple(p.shape) for n, p in model_parameters(model).items()}
    names = [n for n, s in shapes.items() if len(s) == 2][:3]
    selection = Selection(
        shapes, "module",
        {names[0]: np.array([0]), names[1]: np.array([1, 3]), names[2]: np.array([0, 2])},
        None, {"ranking": "norm", "budget": {"kind": "fraction", "value": 0.2}},
        {names[1]: "row", names[2]: "8x8"},
    )  # fmt: skip
    partial = fg.make_partial(model, selection)
    partial.save(tmp_path / "p.safetensors", hash_weights=False)
    partial.remove()
    again = fg.load_partial(model, tmp_path / "p.safetensors")
    assert again.selection == selection
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in partial._trained.items()]
    assert [b.name for b in again.packed] == names[1:]
    assert isinstance(again._trained[names[0]], nn.Parameter)
    assert again._trained[names[0]] is model_parameters(model)[names[0]]
