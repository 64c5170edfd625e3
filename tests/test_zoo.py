"""Every model of the zoo in every scenario: the page says what is, and some cells must be exact."""

from __future__ import annotations

import pytest

from tests.coverage_matrix import PAGE, documented
from tests.exactness import check
from tests.scenarios import SCENARIOS
from tests.zoo import ZOO

DOCUMENTED = documented()

# A cell that is in here may not get worse, whatever the page says.
ALL = frozenset(SCENARIOS) - {"packed", "packed rows"}
MUST_BE_EXACT: dict[str, frozenset[str]] = {
    "llama": ALL,
    "llama-tied": ALL,
    "qwen3": ALL,
    "gemma3": ALL - {"reentrant"},
    "mistral": ALL - {"reentrant"},
    "phi3": ALL,
    "olmo2": ALL,
    "stablelm": ALL,
    "gpt2": ALL - {"checkpoint", "reentrant"},
    "gpt-neox": ALL,
    "opt": ALL - {"checkpoint", "reentrant"},
    "bloom": ALL - {"square"},
    "falcon": ALL - {"reentrant"},
    "bert": ALL - {"square"},
    "albert": ALL - {"square", "checkpoint", "reentrant"},
    "distilbert": ALL,
    "bart": frozenset({"masked labels"}),
    "vit": frozenset({"LoRA"}),
    "dinov2": frozenset({"LoRA"}),
    "convnext": frozenset({"LoRA"}),
    "wav2vec2": frozenset({"LoRA"}),
}
CELLS = [(model, scenario) for model in ZOO for scenario in SCENARIOS]


def test_the_page_has_every_cell():
    assert [(m, s) for m, row in DOCUMENTED.items() for s in row] == CELLS, (
        f"{PAGE} has other models or scenarios than the zoo. "
        "Remedy: python -m tests.coverage_matrix --write"
    )
    assert set(MUST_BE_EXACT) <= set(ZOO)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft: deprecations, unused patterns
@pytest.mark.parametrize(("model", "scenario"), CELLS, ids=lambda x: x.replace(" ", "-"))
def test_cell(model, scenario):
    outcome = check(ZOO[model], scenario)
    if scenario in MUST_BE_EXACT.get(model, ()):
        assert outcome.status == "exact", (outcome.detail, outcome.missing)
    said = DOCUMENTED.get(model, {}).get(scenario)
    assert outcome.status == said, (
        f"the page says {said}, it is {outcome.status}: {outcome.detail} {outcome.missing}. "
        "Remedy, if that is meant: python -m tests.coverage_matrix --write"
    )
