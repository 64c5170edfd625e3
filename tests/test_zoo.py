"""Every model of the zoo in every scenario: the page says what is, and some cells must be exact."""

from __future__ import annotations

import pytest

from tests.coverage_matrix import PAGE, documented
from tests.exactness import check
from tests.scenarios import SCENARIOS
from tests.zoo import ZOO

DOCUMENTED = documented()

# Every cell that applies is exact but for these, whatever the page says.
NOT_EXACT = {
    # transformers' own masks let the examples of a packed row see each other
    ("opt", "packed"): "mixes",
    ("opt", "packed rows"): "mixes",
    ("falcon", "packed"): "mixes",
    ("falcon", "packed rows"): "mixes",
    # the table of relative positions passes from layer to layer through checkpoints that cut it
    # off from the parameter; the self-check notices
    ("t5", "reentrant"): "missing",
}
# A balancing loss is a loss of the whole batch; see tests/exactness.py for what is compared
NOT_EXACT |= {(m, "router loss"): "contribution" for m in ZOO if ZOO[m].family == "moe"}
NOT_EXACT |= {(m, "cu_seq_lens"): "mixes" for m in ("opt", "falcon")}
# Of these a few models run by default, all with the slow tests
LONG = {
    "column blocks", "head blocks", "expert blocks", "cu_seq_lens", "accumulation", "GradScaler",
    "router loss", "DoRA",
}  # fmt: skip
ALWAYS = {"llama", "gpt2", "mixtral-eager", "qwen3-moe-grouped_mm", "bert", "t5"}
CELLS = [(model, scenario) for model in ZOO for scenario in SCENARIOS]


def test_the_page_has_every_cell():
    assert [(m, s) for m, row in DOCUMENTED.items() for s in row] == CELLS, (
        f"{PAGE} has other models or scenarios than the zoo. "
        "Remedy: python -m tests.coverage_matrix --write"
    )
    assert set(NOT_EXACT) <= set(CELLS)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft: deprecations, unused patterns
@pytest.mark.parametrize(
    ("model", "scenario"),
    [
        pytest.param(m, s, marks=pytest.mark.slow if s in LONG and m not in ALWAYS else ())
        for m, s in CELLS
    ],
    ids=lambda x: x.replace(" ", "-"),
)
def test_cell(model, scenario):
    outcome = check(ZOO[model], scenario)
    allowed = {NOT_EXACT.get((model, scenario), "exact"), "–"}
    assert outcome.status in allowed, (outcome.detail, outcome.missing)
    said = DOCUMENTED.get(model, {}).get(scenario)
    assert outcome.status == said, (
        f"the page says {said}, it is {outcome.status}: {outcome.detail} {outcome.missing}. "
        "Remedy, if that is meant: python -m tests.coverage_matrix --write"
    )
