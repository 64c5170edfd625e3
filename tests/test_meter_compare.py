"""Arms side by side: gains per resource, fronts, remarks, and the figure."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import fastgrad as fg
from fastgrad.errors import FastgradError, ResourceError
from fastgrad.plots import save_figure
from tests.meters import Clock, plain


def arm(steps, losses, start=4.0, modes=None, **options):
    """A meter of an arm with a check before and after each of the steps, of so many seconds."""
    clock = Clock()
    meter = plain(clock=clock, cpu_clock=clock, **options)
    meter.check(-start)
    for seconds, loss in zip(steps, losses, strict=True):
        with meter.step():
            clock.now += seconds
        meter.check(-loss)
    meter.modes |= modes or {}
    return meter


def test_gains_per_unit_and_the_front(tmp_path):
    full = arm([4, 4], [2.0, 1.0])
    part = arm([1, 1], [3.0, 2.0])
    worse = arm([2, 3], [3.5, 2.5])
    worse.save(tmp_path / "worse.json")
    table = fg.compare_meters({"full": full, "part": part, "worse": tmp_path / "worse.json"})
    by_name = {a.arm: a for a in table.arms}
    assert by_name["full"].gain_per["seconds"] == 3 / 8
    assert by_name["part"].gain_per["seconds"] == 2 / 2
    assert by_name["worse"].gain_per["cpu_seconds"] == 1.5 / 5
    assert table.fronts["seconds"] == ("part", "full")
    peak = by_name["full"].spent["peak_bytes"]
    assert by_name["full"].gain_per["peak_bytes"] == 3 / peak
    assert "joules" in table.not_compared
    assert by_name["part"].path["seconds"] == [(0.0, -4.0), (1.0, -3.0), (2.0, -2.0)]
    again = json.loads(json.dumps(table.to_dict()))
    assert again["arms"]["part"]["gain_per"]["seconds"] == 1.0
    assert again["fronts"]["seconds"] == ["part", "full"]


def test_the_best_check_instead_of_the_last():
    meter = arm([1, 1, 1], [2.0, 1.0, 3.0])
    assert fg.compare_meters({"a": meter}).arms[0].last == -3.0
    best = fg.compare_meters({"a": meter}, at="best").arms[0]
    assert (best.last, best.step, best.spent["seconds"]) == (-1.0, 2, 2.0)
    assert len(best.path["seconds"]) == 3
    with pytest.raises(ResourceError, match="at is"):
        fg.compare_meters({"a": meter}, at="first")


def test_spending_before_the_first_check_does_not_count():
    clock = Clock()
    meter = plain(clock=clock)
    with meter.step():
        clock.now += 50
    meter.check(-2.0)
    with meter.step():
        clock.now += 4
    meter.check(-1.0)
    table = fg.compare_meters({"a": meter})
    assert table.arms[0].gain_per["seconds"] == 0.25
    assert any("from step 1" in note for note in table.notes)


def test_arms_alike_in_both_share_the_front():
    table = fg.compare_meters({"a": arm([2], [1.0]), "b": arm([2], [1.0]), "c": arm([2], [1.5])})
    assert table.fronts["seconds"] == ("a", "b")


def test_measured_and_estimated_are_not_compared(tmp_path):
    guess = {"seconds": "estimated (by eye)"}
    table = fg.compare_meters({"a": arm([2], [1.0]), "b": arm([1], [1.0], modes=guess)})
    assert "seconds" not in table.fronts
    assert table.not_compared["seconds"] == "measured in a, estimated in b"
    text = table.to_markdown()
    assert "| ~1 | ~3 |" in text
    assert "- ~ estimated, not measured" in text
    assert "wall time is not compared: measured in a, estimated in b" in text
    with pytest.raises(FastgradError, match=r"measured in a, estimated in b.*cpu_seconds"):
        table.plot(None, "seconds")


def test_remarks_say_what_a_reader_would_not_see(tmp_path):
    meter = arm([1], [2.0], start=5.0)
    meter.save(tmp_path / "m.json")
    clock = Clock()
    again = fg.Meter.load(tmp_path / "m.json", device="cpu", clock=clock, cpu_clock=clock)
    with again.step():
        clock.now += 1
    again.check(-1.0)
    again.sessions[-1] |= {"process": 1, "processes": 4}
    other = {"cpu_seconds": "measured (another way)"}
    table = fg.compare_meters({"x|y": again, "b": arm([1], [2.0], modes=other)})
    notes = "\n".join(table.notes)
    assert "x|y: resumed at step 1; all runs are added up" in notes
    assert "x|y: process 1 of 4 alone" in notes
    assert "different figures of merit (-5 to -4)" in notes
    assert "processor time was not found in the same way" in notes
    assert "x\\|y" in table.to_markdown()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "x|y" in text
    assert "gain per cpu s" in text
    assert "gain per FLOP" not in text  # nobody has operations
    assert "resumed at step 1" in text


def test_arms_without_a_beginning_and_an_end_are_refused(tmp_path):
    with pytest.raises(ResourceError, match="no arm"):
        fg.compare_meters({})
    with pytest.raises(ResourceError, match="'a' has 0 checks"):
        fg.compare_meters({"a": plain()})
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ResourceError, match=r"m\.json"):
        fg.compare_meters({"a": tmp_path / "m.json"})


@pytest.mark.parametrize("loss", [True, False])
def test_the_figure_draws_every_arm_where_it_ended(loss, tmp_path):
    pytest.importorskip("matplotlib")
    table = fg.compare_meters({"full": arm([4, 4], [2.0, 1.0]), "part": arm([1, 1], [3.0, 2.0])})
    figure = table.figure(["seconds", "peak_bytes"], loss=loss)
    first = figure.axes[0]
    ends = {c.get_label(): tuple(c.get_offsets()[0]) for c in first.collections}
    assert ends == {"full": (8.0, 1.0), "part": (2.0, 2.0)}
    front, full, part = (line.get_xydata().tolist() for line in first.lines)
    assert part == [[0, 4], [1, 3], [2, 2]]
    assert full[0] == [0, 4]
    assert front[0] == [2, 2]
    low, high = first.get_ylim()
    assert (low < high) == loss  # better is lower, or turned over
    figure.canvas.draw()
    labels = [t.get_text() for t in first.get_yticklabels()]
    assert any(label.startswith(("-", "\N{MINUS SIGN}")) for label in labels) != loss
    assert first.get_xlabel() == "wall time (s)"
    if loss:
        assert all(path.stat().st_size > 1000 for path in save_figure(figure, tmp_path / "arms"))
    with pytest.raises(FastgradError, match="joules"):
        table.figure(["joules"])
