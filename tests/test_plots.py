"""Figures: what is drawn, and where; looks are checked by eye."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from fastgrad import plots
from fastgrad.errors import FastgradError
from fastgrad.heavytail import fit_gamma, lorenz
from fastgrad.plots import ArmPoint

matplotlib = pytest.importorskip("matplotlib")

NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{module}.weight"
        for layer in range(3)
        for module in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]
ARMS = [ArmPoint("full", 10.0, 2.0), ArmPoint("ours", 4.0, 2.2), ArmPoint("random", 4.5, 2.6),
        ArmPoint("random", 3.9, 2.8)]  # fmt: skip


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().subplots()


def curve_and_fit(n=40):
    mass = np.random.default_rng(0).lognormal(0, 1.5, n)
    sizes = np.full(n, 100)
    return lorenz(mass, sizes), fit_gamma(mass, sizes, n_bootstrap=20)


def test_lorenz_plot_draws_the_curve_and_says_what_the_top_holds(ax):
    curve, fit = curve_and_fit()
    plots.lorenz_plot(ax, curve, fit)
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any(f"{curve.share_at(0.2):.0%}" in t for t in texts)
    assert any(f"{fit.gamma:.2f}" in t for t in texts)
    measured = next(line for line in ax.lines if "measured" in str(line.get_label()))
    np.testing.assert_array_equal(measured.get_ydata(), curve.share)


def test_every_parameter_has_its_own_place():
    rows, columns, cells = plots.place(NAMES)
    assert columns == ["in", "0", "1", "2", "out"]
    assert rows == ["embed_tokens", "q_proj", "down_proj", "input_layernorm", "norm", "lm_head"]
    assert len(set(cells.values())) == len(NAMES)
    assert cells["model.layers.1.mlp.down_proj.weight"] == (2, 2)
    assert cells["lm_head.weight"] == (5, 4)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"], ["0"]),
        (["0.weight", "0.bias", "2.weight"], ["0", "2"]),
        (["weight", "bias"], ["in"]),
        (["layers.7.experts.3.w1", "layers.7.experts.4.w1", "out.weight"], ["7", "out"]),
    ],
)
def test_places_for_names_of_other_architectures(names, columns):
    _, found, cells = plots.place(names)
    assert found == columns
    assert len(set(cells.values())) == len(names)


def test_heat_map_puts_values_on_a_logarithmic_scale_and_leaves_out_what_was_not_measured(ax):
    from matplotlib.colors import LogNorm

    values = np.linspace(1e-4, 1e-2, len(NAMES))
    values[1], values[2] = np.nan, 0.0
    plots.heat_map(ax, NAMES, values, marked={NAMES[0]: 1.0, "unknown": 1.0})
    mesh = ax.collections[0]
    assert isinstance(mesh.norm, LogNorm)
    table = mesh.get_array()
    assert table.count() == len(NAMES) - 2
    assert table.max() == np.nanmax(values)
    assert len(ax.lines) == 1  # the one selected parameter that the model has


def test_heat_map_labels_do_not_crowd_for_deep_models(ax):
    names = [f"layers.{i}.fc.weight" for i in range(96)]
    plots.heat_map(ax, names, np.ones(96))
    assert len(ax.get_xticks()) <= 12


def test_heat_map_refuses_nothing_to_draw(ax):
    with pytest.raises(FastgradError, match="nothing to draw"):
        plots.heat_map(ax, ["a"], [0.0])
    with pytest.raises(FastgradError, match="2 names but 1"):
        plots.heat_map(ax, ["a", "b"], [1.0])


def test_front_holds_what_nothing_beats():
    assert plots.pareto_front(ARMS) == [ARMS[3], ARMS[1], ARMS[0]]
    assert plots.pareto_front([ArmPoint("a", 1, 1), ArmPoint("b", 1, 1)]) == [ArmPoint("a", 1, 1)]


def test_pareto_plot_shows_every_arm_and_one_entry_per_group(ax):
    plots.pareto_plot(ax, ARMS, xlabel="memory (MB)", before=5.0)
    points = np.concatenate([c.get_offsets() for c in ax.collections])
    assert sorted(map(tuple, points)) == sorted((a.resource, a.loss) for a in ARMS)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels.count("random") == 1
    assert any("5.00" in t.get_text() for t in ax.texts)  # far above: said, not drawn
    with pytest.raises(FastgradError, match="no arm"):
        plots.pareto_plot(ax, [])


def test_summary_figure_is_written_without_a_display_and_texts_do_not_overlap(tmp_path):
    curve, fit = curve_and_fit()
    figure = plots.summary_figure(
        curve=curve, gamma_fit=fit, names=NAMES, values=np.geomspace(1e-4, 1e-2, len(NAMES)),
        panels={"memory (MB)": ARMS, "time (s)": ARMS}, before=5.0, title="test",
    )  # fmt: skip
    target = tmp_path / "figure.png"
    figure.savefig(target)
    assert target.read_bytes().startswith(b"\x89PNG")
    renderer = figure.canvas.get_renderer()
    for ax in figure.get_axes():
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [
                t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_text()
            ]
            boxes.sort(key=lambda b: (b.x0, b.y0))
            for a, b in itertools.pairwise(boxes):
                assert not a.overlaps(b)


def test_without_matplotlib_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fastgrad import plots\n"
        "from fastgrad.errors import MissingExtraError\n"
        "try: plots.pareto_plot(None, [plots.ArmPoint('a', 1, 1)])\n"
        "except MissingExtraError as e: assert 'fastgrad[plots]' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
