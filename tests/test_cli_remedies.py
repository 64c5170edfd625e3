"""What the command says where it cannot do what is asked: the reason that is true, and a remedy."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad.errors import ResourceError, SelectionError
from fastgrad.integrations.peft_export import layer_list, lora_plan, peft_config, target_regex
from tests.models import llama, randomised
from tests.test_cli_compare import made, run  # noqa: F401  (fixtures)
from tests.training_runs import HELD_OUT


def words(err):
    return " ".join(re.sub("[│╭╮╰╯─\n]", " ", err).split())


def test_merge_of_another_granularity(run, made, tmp_path):  # noqa: F811
    torch.manual_seed(0)  # the same weights as those of ``made``
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    with fg.Probe(model, blocks="row", loss_reduction="row_mean") as probe:
        for _ in range(2):
            model(torch.randn(5, 6)).square().mean(1).mean().backward()
    fg.Blueprint.from_stats(probe.stats()).save_pretrained(tmp_path / "rows")
    code, _, err = run("blueprint", "merge", made / "a", tmp_path / "rows", "-o", tmp_path / "x")
    assert code == 1
    assert re.search(
        r"different block granularity: 0 parameters in the one, \d+ in the other\. Remedy: probe "
        "both with the same blocks", words(err),
    )  # fmt: skip
    code, _, err = run("blueprint", "merge", made / "a", made / "wide", "-o", tmp_path / "x")
    assert "Remedy: blueprints of one model" in words(err)


def test_what_is_no_file_of_statistics(run, made, tmp_path):  # noqa: F811
    (tmp_path / "text").write_text("words " * 9)
    for path, said in ((tmp_path / "none", "no statistics file at"),
                       (tmp_path / "text", "is damaged or no statistics file")):  # fmt: skip
        code, _, err = run("staleness", made / "a", path)
        assert code == 1
        assert said in words(err)
        assert "Remedy: what `fastgrad probe -o` or stats.save wrote" in words(err)


def test_a_weight_that_is_no_share(run, made, tmp_path):  # noqa: F811
    sample = made / "b.safetensors"
    for weight in ("1.5", "-0.1", "nan", "much"):
        code, _, err = run("blueprint", "blend", made / "a", sample, f"--weight={weight}", "-o",
                           tmp_path / "x")  # fmt: skip
        assert (code, "Remedy: 1 is the blueprint alone" in words(err)) == (2, True), err
    assert not (tmp_path / "x").exists()
    code = run("blueprint", "blend", made / "a", sample, "--weight", 1, "-o", tmp_path / "x")[0]
    assert code == 0
    with pytest.raises(fg.errors.BlueprintError, match="Remedy: 1 is the blueprint alone"):
        fg.Blueprint.from_pretrained(made / "a").blend(fg.GradientStats.load(sample), 1.5)


def test_a_coarse_file_is_exported_where_the_order_is_enough():
    model = randomised(llama)
    with fg.Probe(model) as probe:
        for batch in HELD_OUT:
            model(**batch).loss.backward()
    exact = fg.Blueprint.from_stats(probe.stats(), model=model)
    coarse = exact.coarse("ranks")
    assert target_regex(coarse, model, count=3) == target_regex(exact, model, count=3)
    with pytest.raises(SelectionError, match=r"ranks of rms alone, and the ranks of adapters.*"
                                             r"Remedy: .*export regex"):  # fmt: skip
        peft_config(coarse, model, count=3)
    with pytest.raises(SelectionError, match=r"a layer's score is a sum.*Remedy: a blueprint with"):
        layer_list(coarse, count=1)
    even = lora_plan(coarse, model, count=3, shared=False)
    sizes = [even.ranks[n] * t.cost for n, t in even.targets.items()]
    assert max(sizes) - min(sizes) <= max(t.cost for t in even.targets.values())


def test_measured_steps_are_pairs_or_a_mapping():
    seconds = {0.05: 1.1, 0.2: 1.4, 1.0: 3.0}
    found = fg.CostModel.time(seconds, n_params=100)
    assert found == fg.CostModel.time(seconds.items(), n_params=100)
    assert found.fixed == pytest.approx(1.0)
    assert found.per_param == pytest.approx(2.0)
    for wrong in ([0.05, 0.2, 1.0], None, [("some", 1.0)], [(0.1, 0.2, 0.3)]):
        with pytest.raises(ResourceError, match=r"time: measurements are pairs.*Remedy"):
            fg.CostModel.time(wrong, n_params=100)
