"""Figures: what is drawn, and where; looks are checked by eye."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from fastgrad import plots
from fastgrad.errors import FastgradError
from fastgrad.heavytail import fit_gamma, fit_tail, lorenz
from fastgrad.plots import ArmPoint
from fastgrad.plots_base import plain_log_ticks

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


def test_one_outlier_does_not_take_the_scale_and_what_is_absent_is_not_grey(ax):
    names = [f"layers.{i}.{m}.weight" for i in range(30) for m in ("q", "k")]
    values = np.geomspace(1, 2, 60)
    values[0], values[-1] = 1e-2, 1e3
    values[5] = 0.0
    plots.heat_map(ax, ["embed.weight", *names], [1.5, *values])
    mesh, blank = ax.collections[:2]
    assert 1 <= mesh.norm.vmin < mesh.norm.vmax <= 2
    bar = ax.figure.get_axes()[-1]
    assert bar._colorbar.extend == "both"
    assert blank.get_array().count() == 1  # not the 59 places where no parameter is
    assert "grey: no gradient" in ax.get_xlabel()
    ax.figure.draw_without_rendering()
    labels = [t.get_text() for t in bar.yaxis.get_ticklabels() if t.get_text()]
    assert len(labels) >= 2
    assert all(1 <= float(t) <= 2 for t in labels)


def test_ticks_of_a_logarithmic_axis(ax):
    def labels(low, high):
        ax.set(yscale="log", ylim=(low, high))
        plain_log_ticks(ax.yaxis, low, high)
        ax.figure.draw_without_rendering()
        return [t.get_text() for t in ax.get_yticklabels()]

    assert labels(0.03, 3) == ["0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert labels(2e-6, 7e-6) == [r"$2\times 10^{-6}$", r"$5\times 10^{-6}$"]
    assert labels(1e-5, 1.0) == ["$10^{-5}$", "$10^{-4}$", "0.001", "0.01", "0.1", "1"]
    assert len(labels(1e-30, 1.0)) <= 11


def test_heat_map_labels_do_not_crowd_for_deep_models(ax):
    names = [f"layers.{i}.fc.weight" for i in range(96)]
    plots.heat_map(ax, names, np.ones(96))
    assert [t.get_text() for t in ax.get_xticklabels()] == [str(i) for i in range(0, 96, 10)]
    ax.clear()
    plots.heat_map(ax, ["embed.weight", *names[:3], "head.weight"], np.ones(5))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["in", "0", "1", "2", "out"]


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

# -- rank-size ---------------------------------------------------------------------------


def pareto(n=60, a=1.5, seed=0):
    return np.random.default_rng(seed).pareto(1 / a, n) + 1


def test_rank_size_plot_shows_points_fit_xmin_and_verdict(ax):
    values = np.append(pareto(), [0.0, 1e-12])
    fit = fit_tail(values, n_bootstrap=30)
    plots.rank_size_plot(ax, values, fit)
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any("60 submodules, 2 dead left out" in t for t in texts)
    assert any(f"{fit.rank_exponent:.2f} [{fit.rank_interval[0]:.2f}" in t for t in texts)
    assert any(f"xmin = {fit.xmin:.3g}, {fit.n_tail} of 60" in t for t in texts)
    lines = [li for li in ax.lines if li.get_color() == plots.ORANGE]
    slopes = []
    for line in lines:  # the fit and the ends of its interval, through the same end
        x, y = np.array(line.get_xdata()), np.array(line.get_ydata())
        slopes.append(-np.polyfit(np.log(x), np.log(y), 1)[0])
        assert y[-1] == pytest.approx(fit.xmin)
        assert x[-1] == fit.n_tail
    assert slopes == pytest.approx([*fit.rank_interval, fit.rank_exponent])
    assert not ax.collections  # no area: a wide interval would cover the points
    assert ax.get_ylim()[1] < 2 * values.max()
    drawn = np.concatenate([li.get_ydata() for li in ax.lines if li.get_marker() == "o"])
    np.testing.assert_allclose(np.sort(drawn), np.sort(values[:60]))


def test_rank_size_plot_takes_what_a_blueprint_holds_and_says_each_verdict(ax):
    from fastgrad.blueprint_schema import Tail

    fit = fit_tail(pareto(), n_bootstrap=30)
    titles = {"supported": "is supported", "too_few": "too few", "rejected": "no power law",
              "indistinguishable": "something else"}  # fmt: skip
    for verdict, words in titles.items():
        ax.clear()
        plots.rank_size_plot(ax, pareto(), Tail(**fit.to_dict() | {
            "verdict": verdict, "rank_interval": [None, None],
        }))  # fmt: skip
        assert words in ax.get_title()
        line = next(li for li in ax.lines if "tail fit" in str(li.get_label()))
        assert (line.get_linestyle() == "-") == (verdict == "supported")


def test_rank_size_plot_without_a_fit_draws_the_points_alone(ax):
    values = [3.0, 2.0, 1.0]
    fit = fit_tail(values, n_bootstrap=10)
    assert fit.verdict == "too_few"
    plots.rank_size_plot(ax, values, fit)
    assert len(ax.lines) == 2
    with pytest.raises(FastgradError, match="3 live values, but 2"):
        plots.rank_size_plot(ax, values[:2], fit)
    with pytest.raises(FastgradError, match="nothing to draw"):
        plots.rank_size_plot(ax, [0.0], fit)


def test_what_lies_far_below_is_counted_and_does_not_take_the_axis(ax):
    values = np.append(pareto(), [1e-5] * 3)
    plots.rank_size_plot(ax, values, fit_tail(values, n_bootstrap=10))
    assert "3 far below" in ax.get_legend().get_texts()[0].get_text()
    assert ax.get_ylim()[0] > 0.1


# -- staleness, blueprints, domains ------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    """Two samples of one model and the blueprint of each; the second has another scale."""
    import torch

    import fastgrad as fg

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(8)))
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        with fg.Probe(model) as probe:
            for _ in range(6):
                (3 ** (2 * seed) * model(torch.randn(4, 6)).square().mean()).backward()
        found.append(probe.stats())
    return [
        (stats, fg.Blueprint.from_stats(stats, model, [tag], n_bootstrap=5))
        for stats, tag in zip(found, ("a", "b"), strict=True)
    ]


def test_staleness_plot_shows_every_submodule_once_and_the_bars_beside_the_statistics(ax, samples):
    (_, released), (local, _) = samples
    result = released.staleness(local)
    plots.staleness_plot(ax, released, local, name="here", local_name="there")
    points = np.concatenate([
        np.column_stack([li.get_xdata(), li.get_ydata()]) for li in ax.lines[1:]
    ])  # fmt: skip
    rms = {n: v[0] for n, v in released.scores("rms", "module").items()}
    own = dict(zip(local.names, local.grad_norm / np.sqrt(local.numel), strict=True))
    expected = [(rms[n], own[n]) for n in rms if n not in released.dead]
    np.testing.assert_allclose(sorted(map(tuple, points)), sorted(expected))
    assert result.verdict in ax.get_title()
    (table,) = [t.get_text() for t in ax.texts]
    assert " " not in table  # an SVG would take them together and the columns with them
    assert f"{result.spearman:.2f}" in table
    bar = min(result.local.spearman, result.released.spearman) - 0.1
    assert f"{bar:.2f}" in table
    both = sum(int(t.get_text().rpartition(": ")[2]) for t in ax.get_legend().get_texts()[1:])
    assert both == len(expected)


def test_a_statistic_below_its_bar_is_seen_as_such():
    from fastgrad.plots_staleness import statistics_text
    from fastgrad.staleness import SplitHalf, Staleness

    half = SplitHalf("batches", 8, 20, 0.9, 0.8, 0.7)
    result = Staleness("drifted", "", 0.7, 0.65, None, half, None, 20, True)
    lines = statistics_text(result).splitlines()
    assert lines[1].split() == ["Spearman", "0.70", "<", "0.80"]
    assert lines[2].split() == ["weighted", "tau", "0.65", ">=", "0.60"]
    assert lines[3].split()[-3:] == ["-", "-", "0.50"]


def test_figure_of_a_blueprint_and_of_its_domains(samples, tmp_path):
    from fastgrad.plots_blueprint import blueprint_figure, domains_figure

    (_, a), (_, b) = samples
    figure = blueprint_figure(a)
    assert len(figure.get_axes()) == 4  # with the colour bar
    with pytest.raises(FastgradError, match="one domain"):
        domains_figure(a)
    figure = domains_figure(a.with_domain(b))
    curves, shares, matrix, _ = figure.get_axes()
    assert [t.get_text()[:2] for t in curves.get_legend().get_texts()[1:]] == ["a:", "b:"]
    assert [t.get_text() for t in shares.get_legend().get_texts()] == ["a", "b"]
    cells = [float(t.get_text()) for t in matrix.texts]
    assert cells[0] == pytest.approx(a.split_half.spearman, abs=0.0006)
    assert cells[1] == cells[2]
    norm = matrix.collections[0].norm
    assert norm.vmax == 1
    assert min(cells) - 0.1 <= norm.vmin <= min(0.9, min(cells))  # the range of the data


def test_texts_of_the_figures_do_not_overlap_and_are_not_clipped(samples):
    from fastgrad.plots_blueprint import blueprint_figure, domains_figure
    from fastgrad.plots_card import WIDTH, _heat_map, _lorenz, _rank_size

    (stats, a), (_, b) = samples
    stale = plots.new_figure(6.3, 6.3)
    plots.staleness_plot(stale.subplots(), b, stats)
    card = [plots.new_figure(WIDTH, 4.6) for _ in range(3)]
    for figure, draw in zip(card, (_lorenz, _rank_size, _heat_map), strict=True):
        draw(figure.subplots(), a)
    for figure in (blueprint_figure(a), domains_figure(a.with_domain(b)), stale, *card):
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        for ax in figure.get_axes():
            for axis in (ax.xaxis, ax.yaxis):
                boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels()
                         if t.get_text()]  # fmt: skip
                inside = [x for x in boxes if ax.bbox.expanded(1.5, 1.05).overlaps(x)]
                inside.sort(key=lambda x: (x.x0, x.y0))
                assert not any(p.overlaps(q) for p, q in itertools.pairwise(inside))
            title = ax.title.get_window_extent(renderer)
            assert title.x0 >= 0
            assert title.x1 <= figure.bbox.x1


# -- files -------------------------------------------------------------------------------


def test_a_figure_is_saved_as_png_and_svg_that_do_not_change(tmp_path):
    def made():
        figure = plots.new_figure(4, 3)
        curve, fit = curve_and_fit()
        plots.lorenz_plot(figure.subplots(), curve, fit)
        return figure

    for name in ("one.png", "two.svg", "three", "v1.2"):
        written = plots.save_figure(made(), tmp_path / name)
        stem = name.removesuffix(".png").removesuffix(".svg")
        assert [p.name for p in written] == [f"{stem}.png", f"{stem}.svg"]
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        contents = [p.read_bytes() for p in tmp_path.glob(f"*.{kind}")]
        assert len(contents) == 4
        assert len(set(contents)) == 1
        assert contents[0].startswith(start)
    assert b"<dc:date>" not in (tmp_path / "one.svg").read_bytes()
    assert "fraction of parameters, densest first</text>" in (tmp_path / "one.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 8  # nothing temporary is left
    with pytest.raises(FastgradError, match="PNG and SVG"):
        plots.save_figure(made(), tmp_path / "figure.pdf")


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path):
    figure = plots.new_figure(4, 3)
    figure.text(0.5, 0.5, "$\\broken{$")
    (tmp_path / "figure.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="broken"):
        plots.save_figure(figure, tmp_path / "figure")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    assert (tmp_path / "figure.png").read_bytes() == b"old"


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
