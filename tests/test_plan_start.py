"""What makes a plan quick changes nothing in it: the same figures come out without."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgrad as fg
from fastgrad import cli_end, cli_imports
from fastgrad.flop_graph import Count
from fastgrad.flops import plan_flops
from fastgrad.known_values import KnownValues
from fastgrad.live_bytes import LiveBytes
from fastgrad.planner import working_copies
from fastgrad.turns import _Around
from fastgrad_kernels.adamw_cpu import PIECE
from tests.test_partial import selection_of

ROOT = Path(__file__).parent.parent


def config(kind: str, **others) -> dict:
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 7,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "model_type": kind, "dtype": "bfloat16",
    }  # fmt: skip
    return sizes | others


CONFIGS = {
    "llama": config("llama", architectures=["LlamaForCausalLM"]),
    "mixtral": config("mixtral", architectures=["MixtralForCausalLM"], num_local_experts=4),
    # with buffers that it makes with scipy
    "fnet": config("fnet", architectures=["FNetForMaskedLM"], use_tpu_fourier_optimizations=True,
                   tpu_short_seq_length=24, dtype="float32"),
}  # fmt: skip


def meta_model(kind: str):
    import transformers

    settings = transformers.AutoConfig.for_model(**CONFIGS[kind])
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


# -- dispatch modes ------------------------------------------------------------------------------


class Outer(TorchDispatchMode):
    """Counts what comes out of the modes inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.prim.device.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("mode", [LiveBytes, KnownValues, Count, _Around])
def test_a_mode_hands_the_question_for_a_device_to_the_tensor(mode, device):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inner = {KnownValues: lambda: KnownValues(fake), _Around: lambda: _Around("layers", 2)}
    with fake:
        x, w = torch.empty(2, 3, device=device), torch.empty(4, 3, device=device)
    where = torch.device(device, 0 if device == "cuda" else None)
    with fake, Outer() as outer:
        expected = torch.nn.functional.linear(x, w)
    assert outer.asked > 0  # PyTorch's own code asks
    with fake, Outer() as outer, inner.get(mode, mode)():
        assert torch.ops.prim.device.default(x) == where
        found = torch.nn.functional.linear(x, w)
    assert outer.asked == 0
    assert found.device == expected.device == where


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_plans_are_those_of_modes_that_look_at_every_question(kind, monkeypatch):
    model = meta_model(kind)
    names = [n for n, _ in model.named_parameters() if ".3." in n]  # of one layer
    selection = selection_of(model, "row", names=names)

    def plans():
        for chosen in (None, selection):
            yield fg.plan_memory(model, chosen, batch_shape=(2, 8)).to_dict()
            yield plan_flops(model, chosen, batch_shape=(2, 8)).to_dict()

    quick = list(plans())
    for module in ("live_bytes", "known_values", "turns", "flop_graph"):
        monkeypatch.setattr(f"fastgrad.{module}.DEVICE", None)
    assert list(plans()) == quick


# -- working copies ------------------------------------------------------------------------------


def piece_by_piece(trained) -> int:
    """:func:`working_copies`, by going through all pieces."""
    most, kinds = 0, {}
    for shape, dtype in trained:
        if dtype is torch.float32:
            continue
        unit = shape[1] * shape[2] if len(shape) == 3 else 1
        size, left = max(PIECE // unit, 1) * unit, math.prod(shape)
        waiting = kinds.get(dtype, 0)
        while left:
            piece = min(size, left)
            left, waiting = left - piece, waiting + piece
            most = max(most, waiting)
            waiting *= waiting < PIECE
        kinds[dtype] = waiting
    return 2 * 4 * most


def test_whole_turns_of_working_copies_are_those_of_their_pieces():
    draw = random.Random(0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for _ in range(300):
        trained = []
        for _ in range(draw.randint(1, 5)):
            shape = draw.choice([
                (draw.randint(1, 9 * PIECE),),
                (draw.randint(1, 9), draw.randint(1, PIECE)),
                (draw.randint(1, 300), draw.randint(1, 600), draw.randint(1, 900)),
                (draw.randint(1, 4), 1, PIECE + draw.randint(-1, 1)),
            ])  # fmt: skip
            trained.append((shape, draw.choice(dtypes)))
        assert working_copies(trained) == piece_by_piece(trained), trained


# -- imports -------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """``outer`` uses ``inner`` where it is installed and remembers whether it is, and reads the
    folders of its ``models`` as transformers does."""

    def write(path, text):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))

    write("inner/__init__.py", "")
    write("outer/utils/__init__.py", "")
    write("outer/utils/import_utils.py", """
        import functools, importlib.util

        read = []

        @functools.lru_cache
        def is_inner_available():
            return importlib.util.find_spec("inner") is not None

        @functools.lru_cache(maxsize=2)
        def create_import_structure_from_path(number):
            read.append(number)
            return number
    """)  # fmt: skip
    write("outer/__init__.py", """
        from .utils import import_utils

        uses_inner = import_utils.is_inner_available()
        if uses_inner:
            import inner
        for number in (*range(5), *range(5)):
            import_utils.create_import_structure_from_path(number)
    """)
    write("needy/__init__.py", "import inner\n")
    write("broken/__init__.py", "import inner\nraise ImportError('always')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield write
    assert sys.meta_path == finders
    names = [m for m in sys.modules if m.partition(".")[0] in ("outer", "inner", "needy", "broken")]
    assert all(sys.modules[name] is not None for name in names)
    for name in names:
        del sys.modules[name]


def load(name):
    return cli_imports.imported_lightly(name, lambda: __import__(name), ["inner"])


def test_a_package_is_imported_without_another_which_is_there_again_afterwards(
    packages, monkeypatch
):
    monkeypatch.setattr(cli_imports, "_own", True)
    outer = load("outer")
    tools = outer.utils.import_utils
    assert not outer.uses_inner
    assert "inner" not in sys.modules
    assert tools.is_inner_available()
    assert tools.read == list(range(5))  # once, with a memory of two
    import inner  # noqa: F401

    assert load("outer") is outer


def test_in_another_process_a_package_is_imported_as_it_is(packages):
    outer = load("outer")
    assert outer.uses_inner
    assert outer.utils.import_utils.read == [*range(5), *range(5)]


def test_what_is_imported_already_is_used(packages, monkeypatch):
    import inner  # noqa: F401

    monkeypatch.setattr(cli_imports, "_own", True)
    assert load("outer").uses_inner


def test_a_package_that_cannot_do_without_another_gets_it(packages, monkeypatch):
    monkeypatch.setattr(cli_imports, "_own", True)
    load("needy")
    assert "inner" in sys.modules
    with pytest.raises(ImportError, match="always"):
        load("broken")


@pytest.mark.parametrize("text", [
    "create_import_structure_from_path = len",
    "import functools\ncreate_import_structure_from_path = functools.cache(lambda n: n)",
    "",
])  # fmt: skip
def test_another_way_to_remember_is_left_alone(text, packages, monkeypatch):
    monkeypatch.setattr(cli_imports, "_own", True)
    packages("outer/utils/import_utils.py", text)
    packages("outer/__init__.py", "from .utils import import_utils\n")
    tools = load("outer").utils.import_utils
    function = getattr(tools, "create_import_structure_from_path", None)
    assert function is len or (function is None) is (text == "")
    assert not hasattr(function, "cache_info") or function(7) == 7
    assert not hasattr(tools, "is_inner_available")


def test_transformers_remembers_what_it_has_read_as_is_assumed():
    """Otherwise :func:`cli_imports._scanned_once` is of no use any more."""
    from transformers.utils import import_utils

    assert import_utils.create_import_structure_from_path.cache_parameters()["maxsize"] == 128
    for name in ("scipy", "torchao"):
        assert hasattr(getattr(import_utils, f"is_{name}_available"), "cache_clear")


@pytest.mark.parametrize("kind", ["fnet", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_process_of_its_own_plans_the_same(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    args = ["plan", str(tmp_path), "--batch", "2x24", "--flops", "--json"]
    told = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        "from fastgrad.cli import main; main({})"
    )
    own, other = (
        subprocess.run([sys.executable, "-c", told.format(given), *args], capture_output=True,
                       text=True, check=True, cwd=ROOT)
        for given in ("", "sys.argv[1:]")
    )  # fmt: skip
    plan = json.loads(own.stdout)
    assert plan == json.loads(other.stdout)
    modules = set(own.stderr.splitlines()[-1].split())
    assert "torchao" not in modules
    assert ("scipy.linalg" in modules) is (kind == "fnet")
    if kind == "fnet":  # two matrices of the hidden size and of the length, of complex numbers
        assert plan["terms_bytes"]["buffers"] >= (16**2 + 24**2) * 8


# -- the end -------------------------------------------------------------------------------------


def ended(before: str, *args: str, flags: tuple[str, ...] = ()):
    """A command as a process, in which ``before`` is run first, and a file is written out when
    Python takes the process apart."""
    told = (
        "import atexit, os, sys, threading, time\n"
        "late = os.fdopen(os.dup(2), 'w')\nlate.write('taken apart')\n"
        "atexit.register(print, 'registered')\n"
        f"{before}\nfrom fastgrad.cli import main\nmain()"
    )
    return subprocess.run([sys.executable, *flags, "-c", told, *args], cwd=ROOT, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.parametrize(("args", "code"), [(["--version"], 0), (["plan"], 2)])
def test_the_process_ends_with_its_code_and_what_was_registered(args, code):
    done = ended("", *args)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "registered"
    assert "taken apart" not in done.stderr


@pytest.mark.parametrize(("before", "flags"), [
    ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", ()),
    ("sys.setprofile(lambda *a: None)", ()),
    ("import cProfile; cProfile.Profile().enable()", ()),
    ("sys.settrace(lambda *a: None)", ()),
    ("", ("-i",)),
])  # fmt: skip
def test_python_ends_the_process_where_somebody_is_still_there(before, flags):
    done = ended(before, "--version", flags=flags)
    assert done.stdout.splitlines()[-1] == "registered"
    assert "taken apart" in done.stderr
    assert done.returncode == 0


def test_python_ends_the_process_whose_output_cannot_be_written(monkeypatch):
    class Full:
        def flush(self):
            raise OSError("no room")

    done = []
    monkeypatch.setattr(cli_end.os, "_exit", done.append)
    monkeypatch.setattr(cli_end.atexit, "_run_exitfuncs", lambda: done.append("registered"))
    monkeypatch.setattr(cli_end.threading, "active_count", lambda: 1)
    monkeypatch.setattr(cli_end, "_looked_at", lambda: False)
    cli_end.end_process(3)
    assert done == ["registered", 3]
    monkeypatch.setattr(sys, "stdout", Full())
    cli_end.end_process(3)
    assert done == ["registered", 3]
