"""Pictures that the command line draws, and where the figures are found in Python."""

from __future__ import annotations

import json
import re
import struct

import pytest

import fastgrad as fg
from fastgrad import plots
from fastgrad.errors import FastgradError
from tests.test_cli_compare import made, run  # noqa: F401  (fixtures)

pytest.importorskip("matplotlib")


def texts_of(svg):
    """All text of an SVG."""
    return re.sub(r"<[^>]*>", " ", " ".join(re.findall(r"<text.*?</text>", svg, re.DOTALL)))


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_show_draws_what_it_says(run, made, tmp_path):  # noqa: F811
    svg, png = tmp_path / "new" / "a.svg", tmp_path / "a.PNG"
    code, out, err = run("blueprint", "show", made / "a", "--plot", svg)
    assert (code, err) == (0, f"wrote {svg}\n")
    assert out == run("blueprint", "show", made / "a")[1]
    said = texts_of(svg.read_text())
    for title in ("Concentration (Lorenz curve)", "Rank-size", "Influence by module and layer",
                  "near"):  # fmt: skip
        assert title in said, title
    tail = fg.Blueprint.from_pretrained(made / "a").file.fits.norm.tail
    assert f"tail fit, rank exponent {tail.rank_exponent:.2f} [" in said
    code, out, err = run("blueprint", "show", made / "a", "--plot", png, "--json")
    assert (code, err) == (0, f"wrote {png}\n")
    assert out == (made / "a" / "gradient_blueprint.json").read_text()
    assert min(size_of(png)) > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.PNG", "new"]
    assert [p.name for p in svg.parent.iterdir()] == ["a.svg"]  # the one that was asked for


def test_show_draws_one_domain_of_several(run, made, tmp_path):  # noqa: F811
    load = fg.Blueprint.from_pretrained
    both = load(made / "a").with_domain(load(made / "far"))
    both.save_pretrained(tmp_path)
    drawn = tmp_path / "far.svg"
    code, out, err = run("blueprint", "show", tmp_path, "--domain", "far", "--plot", drawn)
    assert code == 0, err
    assert out.strip() == both.domain("far").summary().strip()
    assert "Sequential: far" in texts_of(drawn.read_text())
    assert "Sequential: near" not in texts_of(drawn.read_text())
    assert run("blueprint", "show", tmp_path, "--domain", "sea")[0] == 1


def test_staleness_draws_the_scatter_beside_its_verdict(run, made, tmp_path):  # noqa: F811
    svg, png = tmp_path / "s.svg", tmp_path / "s.png"
    sample = made / "far.safetensors"
    plain = run("staleness", made / "a", sample)
    code, out, err = run("staleness", made / "a", sample, "--plot", svg)
    assert (code, out) == plain[:2]
    assert err == f"wrote {svg}\n"
    verdict = out.split(":")[0]
    assert f"released against local sample: {verdict}" in texts_of(svg.read_text())
    code, out, err = run("staleness", made / "a", sample, "--plot", png, "--json")
    assert (code, err, json.loads(out)["plot"]) == (plain[0], "", str(png))
    width, height = size_of(png)
    assert width == height > 900
    assert "plot" not in json.loads(run("staleness", made / "a", sample, "--json")[1])


def test_a_verdict_without_a_picture_stands(run, made, tmp_path):  # noqa: F811
    target = tmp_path / "s.png"
    code, out, err = run("staleness", made / "wide", made / "a.safetensors", "--plot", target)
    assert (code, out.split(":")[0]) == (3, "different model")
    assert err == f"wrote {target}\n"  # some submodules are in both
    fg.Blueprint.from_pretrained(made / "a").coarse("ranks").save_pretrained(tmp_path / "coarse")
    code, out, err = run(
        "staleness", tmp_path / "coarse", made / "a.safetensors", "--plot", tmp_path / "c.png",
        "--json",
    )  # fmt: skip
    assert (code, json.loads(out)["verdict"], json.loads(out)["plot"]) == (0, "fresh", None)
    assert err.startswith("no picture: the blueprint holds ranks alone")
    code, out, err = run("blueprint", "show", tmp_path / "coarse", "--plot", tmp_path / "c.png")
    assert (code, "holds ranks alone" in err, "Remedy" in err) == (1, True, True)
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("verb", [["blueprint", "show", "a"], ["staleness", "a", "a.safetensors"]])
def test_a_picture_that_cannot_be_is_refused_before_the_work(
    run, made, tmp_path, verb  # noqa: F811
):
    args = [made / part if part.startswith("a") else part for part in verb]
    code, out, err = run(*args, "--plot", tmp_path / "a.pdf")
    assert (code, out) == (2, "")
    assert "ends in .png or .svg" in " ".join(re.sub("[│\n]", " ", err).split())
    (tmp_path / "file").write_text("x")
    code, out, err = run(*args, "--plot", tmp_path / "file" / "a.png")
    assert (code, out, "Remedy" in err) == (1, "", True)


def test_all_figures_are_found_in_one_place(made, tmp_path):  # noqa: F811
    load = fg.Blueprint.from_pretrained
    both = load(made / "a").with_domain(load(made / "far"))
    for figure, name in ((fg.plots.blueprint_figure(both), "one"),
                         (fg.plots.domains_figure(both), "domains")):  # fmt: skip
        paths = fg.plots.save_figure(figure, tmp_path / name)
        assert [p.name for p in paths] == [f"{name}.png", f"{name}.svg"]
        assert size_of(paths[0])[0] > 1500
        assert "Concentration" in texts_of(paths[1].read_text())
    assert {"blueprint_figure", "domains_figure"} <= set(plots.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pie_chart'"):
        _ = plots.pie_chart
    with pytest.raises(FastgradError, match=r"PNG or SVG\. Remedy"):
        plots.write_figure(fg.plots.new_figure(1, 1), tmp_path / "a.pdf")
