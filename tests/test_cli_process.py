"""The command as a process: Ctrl-C, closed pipes, colours, width."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrad as fg
from fastgrad import cli
from fastgrad.cli_common import check_writable, emit_text
from tests.test_cli import save_model

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "fastgrad.cli"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 40}" for i in range(60_000)))
    return path


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def listens():
    """A shell that runs these tests in its background makes them, and what they start, deaf to
    Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# -- Ctrl-C --------------------------------------------------------------------------------------


def test_ctrl_c_during_a_probe_leaves_nothing_half_written(model_dir, text_file, tmp_path):
    target = tmp_path / "out" / "stats.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"an earlier measurement")
    before = sorted(p.name for p in model_dir.iterdir())
    reader, writer = os.openpty()  # as a terminal: the progress bar says where it is
    process = subprocess.Popen(
        [*COMMAND, "probe", str(model_dir), str(text_file), "-o", str(target), "--length", "8",
         "--rows", "1", "--limit", "7000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=writer,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # see listens
    )  # fmt: skip
    os.close(writer)
    shown = b""
    try:
        while not re.search(rb"probing.* [1-9]\d*/7000", shown):
            part = _read(reader)
            assert part, shown.decode()  # it ended by itself
            shown += part
        process.send_signal(signal.SIGINT)
        while part := _read(reader):
            shown += part
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(reader)
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode()).split("\n")
    assert process.returncode == 130
    assert out == b""
    assert [x for x in lines if x.strip()][-1].strip() == (
        "interrupted: no file was left half written"
    )
    assert b"Traceback" not in shown
    assert target.read_bytes() == b"an earlier measurement"
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert sorted(p.name for p in model_dir.iterdir()) == before


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_ctrl_c_while_a_file_is_written(run, model_dir, text_file, tmp_path, monkeypatch):
    import safetensors.numpy

    target = tmp_path / "out" / "stats.safetensors"

    def interrupted(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    code, out, err = run("probe", model_dir, text_file, "-o", target, "--limit", 2)
    assert (code, out, err) == (130, "", "interrupted: no file was left half written\n")
    assert list(target.parent.iterdir()) == []


def test_ctrl_c_that_a_library_makes_an_error_of_its_own(run, tmp_path, monkeypatch):
    def from_pretrained(*args, **kwargs):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            raise RuntimeError("a callback failed") from None

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(fg.Blueprint, "from_pretrained", from_pretrained)
    code, out, err = run("blueprint", "show", tmp_path)
    assert (code, out, err) == (130, "", "interrupted: no file was left half written\n")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_mistake_of_ours_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(fg.Blueprint, "from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["blueprint", "show", str(tmp_path)])


# -- files ---------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    run, model_dir, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastgrad.cli_probe.load_model", lambda *a: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("x")
    code, out, err = run("probe", model_dir, text_file, "-o", tmp_path / "file" / "stats")
    assert (code, out) == (1, "")
    assert "Remedy" in err
    assert err.count("\n") == 1
    code, _, err = run("probe", model_dir, text_file, "-o", tmp_path)
    assert (code, "is a folder" in err) == (1, True)
    check_writable(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "text.txt"]


# -- start ---------------------------------------------------------------------------------------

TOLD = """
import atexit, gc, json, sys
atexit.register(lambda: print(json.dumps([sorted(sys.modules), gc.get_freeze_count(),
                                          gc.isenabled()]), file=sys.stderr))
from fastgrad.cli import main
main()
"""


def started(*args):
    """A command as a process: its exit code, the modules it imported, how many objects the garbage
    collector does not look at, and whether it works."""
    done = subprocess.run([sys.executable, "-c", TOLD, *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    return done.returncode, *json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("args", [
    ["--help"],
    ["plan", "--help"],
    ["blueprint", "private", "--help"],
    ["blueprint", "show", "docs/examples/minilm-prose"],
    ["blueprint", "validate", "docs/examples/minilm-prose", "docs/examples/minilm-code"],
    ["blueprint", "schema"],
], ids=" ".join)  # fmt: skip
def test_what_needs_no_model_starts_without_torch(args):
    code, modules, _, _ = started(*args)
    assert code == 0
    assert not {"torch", "transformers", "matplotlib", "huggingface_hub"} & set(modules)
    if "--help" in args:
        assert not {"numpy", "scipy", "fastgrad.blueprint_schema"} & set(modules)


def test_a_plan_imports_what_it_needs_out_of_the_collectors_sight(model_dir):
    code, modules, frozen, enabled = started("plan", model_dir)
    assert (code, enabled) == (0, True)
    assert "transformers.models.llama.modeling_llama" in modules
    assert not {"datasets", "peft", "trl", "matplotlib", "dp_accounting"} & set(modules)
    assert frozen > 100_000  # most of what torch and transformers made


def test_in_another_process_nothing_is_hidden_from_the_collector(model_dir):
    code = (
        "import gc, sys, fastgrad.cli as c\n"
        "try: c.main(['plan', sys.argv[1]])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert gc.get_freeze_count() == 0 and gc.isenabled()"
    )
    subprocess.run([sys.executable, "-c", code, model_dir], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip


# -- output --------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [*COMMAND, "blueprint", "schema"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (141, b"")


def test_long_lines_go_on_below_where_they_began_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    row = f"{'name':<20}  {'share':>6}  {'change':>8}  rank"
    text = f"k*         {'words ' * 10}end\nfresh: {'much ' * 12}\n\nshort\n{row}"
    emit_text(text)
    assert capsys.readouterr().out == text + "\n"  # a pipe is given the lines as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    emit_text(text)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["", "short", row]  # rows of a table stay whole
    assert all(len(line) <= 40 for line in lines[:-1])
    assert [line[:11] for line in lines[:3]] == ["k*         ", " " * 11, " " * 11]
    assert " ".join(" ".join(lines[:-3]).split()) == " ".join(text.split("\n\n")[0].split())


@pytest.mark.parametrize("no_color", [False, True])
def test_colours(no_color, tmp_path):
    (tmp_path / "gradient_blueprint.json").write_text("{[red]}")
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "40"}
    done = subprocess.run(
        [*COMMAND, "blueprint", "show", str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env=env | ({"NO_COLOR": "1"} if no_color else {}),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    colours = re.findall(r"\x1b\[[\d;]*3[1-7]m", done.stderr)
    assert bool(colours) is not no_color
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
