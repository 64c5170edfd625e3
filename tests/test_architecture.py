"""The rooms and arrows of the design: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lower ranks know nothing of higher ones. Modules of one rank may know each other where the
# table of peers says so.
RANKS: list[set[str]] = [
    {"fastgrad_kernels"},
    {"errors", "mode_queries"},
    {"files", "data_sources", "dead", "known_values", "live_bytes", "identity", "blocks",
     "transfer", "optim_arguments", "optim_prepared"},
    {"ownership", "rows", "regions", "probe_arguments", "chain_rule", "random_state"},
    {"function_kinds", "trials", "cross_terms"},
    {"choices"},
    {"ownership_uniform"},
    {"ownership_explicit"},
    {"ownership_written"},
    {"propagation"},
    {"records"},
    {"derived", "batches", "unannounced"},
    {"tap_functions", "checkpoints"},
    {"tap_watch", "tap_recurrent"},
    {"tap_contraction"},
    {"handlers_common"},
    {"handlers_elementwise", "handlers_contractions"},
    {"handlers_products", "handlers_convolutions", "handlers_lookups", "handlers_norms"},
    {"handlers_attention", "handlers_bilinear", "handlers_recurrent"},
    {"handlers"},
    {"one_by_one"},
    {"taps"},
    {"under_way"},
    {"stats", "stats_merge", "stats_files", "stats_shards", "recorder"},
    {"concentration", "heads", "granularity"},
    {"measurement", "heavytail", "resources"},
    {"mass"},
    {"multiplicativity", "interaction"},
    {"influence", "scores"},
    {"replicas"},
    {"probe", "distributed"},
    {"blueprint_strict_json", "printable"},
    {"ranking", "blueprint_schema", "blueprint_provenance", "blueprint_text", "hub", "selection",
     "selection_report", "rank_agreement", "release_noise"},
    {"spread", "filling", "blueprint_coarse"},
    {"joint"},
    {"sparse_layers", "sparse_conv", "sparse_experts", "readings",
     "conversion", "reachable"},
    {"blueprint_files", "blueprint_fits", "staleness", "packed", "sharded", "optim", "meter",
     "meter_energy", "meter_flops", "meter_log", "meter_memory", "meter_processes",
     "directions"},
    {"step_guard", "blueprint_make", "blueprint_blend", "blueprint_diff", "blueprint_domains",
     "blueprint_merge"},
    {"blueprint", "partial", "partial_state", "layouts", "reselection", "in_backward"},
    {"folding"},
    {"dry_run"},
    {"turns"},
    {"plans", "train_step", "flop_graph"},
    {"flops", "planner"},
    {"budgets"},
    {"choosing"},
    {"jointly"},
    {"delta_files", "delta", "delta_stack", "delta_merge", "plots", "plots_base",
     "plots_blueprint", "plots_card", "plots_staleness", "plots_tail", "reselection_schedule",
     "model_card"},
    {"held_out", "blueprint_schedule", "evaluation_budget", "measuring", "measuring_together",
     "blueprint_about", "blueprint_log", "online", "meter_compare"},
    {"curvature", "proxy_report"},
    {"proxy"},
    {"clipping"},
    {"privacy"},
    {"integrations"},
    {"quickstart"},
    {"cli", "cli_app", "cli_blueprint", "cli_common", "cli_compare", "cli_data", "cli_delta",
     "cli_docs", "cli_end", "cli_exit", "cli_export", "cli_imports", "cli_influence", "cli_models",
     "cli_plan", "cli_private", "cli_probe", "cli_release", "cli_select", "cli_values"},
]
RANK = {name: i for i, names in enumerate(RANKS) for name in names}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "fastgrad").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also inside functions; not for type checking only."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(a.name for a in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "fastgrad":
                found.update(f"fastgrad.{a.name}" for a in node.names)
            elif node.module:
                found.add(node.module)

    Visitor().visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "fastgrad").rglob("*.py")) if p.name != "__init__.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_arrows_point_down(path):
    own = room(path)
    assert own in RANK, f"{own} has no rank: give it a room in this test and in the design"
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top in ("tests", "bench"):
            pytest.fail(f"{path.name} imports {module}")
        if top == "fastgrad":
            target = rest.split(".")[0]
            if target and target in RANK and target != own:
                assert RANK[target] <= RANK[own], f"{path.name} imports {module}: an arrow back up"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_fastgrad(path):
    for module in imports(path):
        assert module.split(".")[0] != "fastgrad"


def test_statistics_and_blueprint_import_no_model_code():
    code = (
        "import sys; import fastgrad.heavytail, fastgrad.blueprint_schema;"
        "assert not any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_lazy_and_every_public_name_loads():
    code = (
        "import sys, fastgrad as fg; assert 'torch' not in sys.modules; "
        "[getattr(fg, n) for n in fg.__all__]; "
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u, fastgrad, fastgrad_kernels; s = u.find_spec('kernels');"
        f"assert s is None or {str(ROOT)!r} not in str(s.origin)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_files_stay_small():
    for path in [*(ROOT / "fastgrad").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 600, f"{path.name}: has it one duty?"


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_imports_bare(tmp_path):
    """Built from the tree, installed elsewhere, with every optional package out of reach."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("fastgrad-*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True
    )
    tops = {p.name for p in target.iterdir() if p.suffix != ".dist-info" and p.name != "bin"}
    assert tops == {"fastgrad", "fastgrad_kernels"}
    assert (target / "fastgrad" / "py.typed").exists()
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('transformers', 'peft', 'accelerate', 'matplotlib', 'tokenizers',
                                  'opacus', 'powerlaw', 'pytest', 'kernels'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(target)!r})
import torch
assert not torch.cuda.is_available()
import fastgrad as fg, fastgrad_kernels.ops
for package in (fg, fastgrad_kernels):
    assert package.__file__.startswith({str(target)!r})
[getattr(fg, n) for n in fg.__all__]
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
with fg.Probe(model) as probe:
    model(torch.randn(3, 4)).square().mean().backward()
assert probe.stats().T.shape == (4, 3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_readme_shows_the_committed_results():
    subprocess.run([sys.executable, str(ROOT / "bench" / "readme.py"), "--check"], check=True)
