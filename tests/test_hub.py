"""Blueprints in repositories of a hub: a stand-in on localhost, never the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastgrad as fg
from fastgrad import cli
from fastgrad.blueprint_schema import DOMAIN_VECTORS_NAME, FILE_NAME, VECTORS_NAME
from fastgrad.errors import BlueprintError, MissingExtraError
from fastgrad.hub import is_repo_id
from tests.hub_stand_in import TOKEN, stand_in

ROOT = Path(__file__).parent.parent


def blueprint_of(
    blocks: str = "row", seed: int = 0, data_seed: int | None = None, tag: str = "toy"
) -> fg.Blueprint:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    if data_seed is not None:
        torch.manual_seed(data_seed)
    with fg.Probe(model, blocks=blocks) as probe:
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
    return fg.Blueprint.from_stats(probe.stats(), model, [tag], created="2025-01-02")


def files_of(blueprint: fg.Blueprint, folder: Path) -> dict[str, bytes]:
    blueprint.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def with_rows():
    return blueprint_of()


@pytest.fixture(scope="module")
def without_rows():
    return blueprint_of("module", seed=1)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that huggingface_hub takes for the hub, with an empty cache."""
    from huggingface_hub import constants

    with stand_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "right"), [
    ("org/name", True), ("o.r-g_1/n.a-m_e", True), ("name", False), ("a/b/c", False),
    ("./name", False), ("/name", False), ("org/", False), ("org/name ", False), ("..//x", False),
    ("../name", False), ("org/..", False), ("o/" + "n" * 95, False),
])  # fmt: skip
def test_what_a_hub_id_looks_like(text, right):
    assert is_repo_id(text) is right


def test_from_pretrained_of_a_hub_id(hub, with_rows, tmp_path):
    files = files_of(with_rows, tmp_path / "made")
    assert set(files) == {FILE_NAME, VECTORS_NAME}
    hub.add("org/model", files)
    found = fg.Blueprint.from_pretrained("org/model")
    assert found.to_json() == with_rows.to_json()
    assert found.block_sq.keys() == with_rows.block_sq.keys()
    for name, values in with_rows.block_sq.items():
        assert np.array_equal(found.block_sq[name], values)
    elsewhere = fg.Blueprint.from_pretrained("org/model", cache_dir=tmp_path / "elsewhere")
    assert elsewhere.to_json() == with_rows.to_json()
    assert list((tmp_path / "elsewhere").rglob(FILE_NAME))


def test_a_local_folder_of_that_name_comes_first(hub, with_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_rows.save_pretrained("org/model")
    assert fg.Blueprint.from_pretrained("org/model").to_json() == with_rows.to_json()
    assert hub.requests == []
    with pytest.raises(BlueprintError, match="is of a hub repository, and this is a local path"):
        fg.Blueprint.from_pretrained("org/model", revision="main")


def test_both_files_come_from_one_commit(hub, with_rows, tmp_path, monkeypatch):
    """The branch moves on between the two files: they still belong together."""
    import huggingface_hub

    first = hub.add("org/model", files_of(with_rows, tmp_path / "a"))
    other = files_of(blueprint_of(seed=3), tmp_path / "b")
    download = huggingface_hub.hf_hub_download

    def moved_on(repo_id, filename, **kwargs):
        path = download(repo_id, filename, **kwargs)
        if filename == FILE_NAME:
            hub.add("org/model", other)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moved_on)
    found = fg.Blueprint.from_pretrained("org/model")
    assert found.to_json() == with_rows.to_json()
    asked = [r for r in hub.requests if VECTORS_NAME in r]
    assert asked
    assert all(f"/resolve/{first}/" in r for r in asked)


def test_revisions(hub, with_rows, without_rows, tmp_path):
    first = hub.add("org/model", files_of(with_rows, tmp_path / "a"))
    hub.add("org/model", files_of(without_rows, tmp_path / "b"))
    load = fg.Blueprint.from_pretrained
    assert load("org/model").to_json() == without_rows.to_json()
    assert load("org/model", revision=first).to_json() == with_rows.to_json()
    assert load("org/model", revision="main").to_json() == without_rows.to_json()
    with pytest.raises(BlueprintError, match=r"org/model: .* at revision v9 .*Revision.*Remedy"):
        load("org/model", revision="v9")


def test_without_the_network(hub, with_rows, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.add("org/model", files_of(with_rows, tmp_path / "made"))
    with pytest.raises(BlueprintError, match="without local_files_only"):
        fg.Blueprint.from_pretrained("org/model", local_files_only=True)
    fg.Blueprint.from_pretrained("org/model")
    n = len(hub.requests)
    again = fg.Blueprint.from_pretrained("org/model", local_files_only=True)
    assert again.to_json() == with_rows.to_json()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fg.Blueprint.from_pretrained("org/model").to_json() == with_rows.to_json()
    assert len(hub.requests) == n


def test_a_hub_that_does_not_answer_is_not_replaced_by_the_cache(
    hub, with_rows, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    hub.add("org/model", files_of(with_rows, tmp_path / "made"))
    fg.Blueprint.from_pretrained("org/model")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    with pytest.raises(BlueprintError, match="check the connection"):
        fg.Blueprint.from_pretrained("org/model")


def test_private_repositories_need_the_token(hub, with_rows, tmp_path, monkeypatch):
    hub.add("org/secret", files_of(with_rows, tmp_path / "made"), private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BlueprintError, match="the token"):
        fg.Blueprint.from_pretrained("org/secret", token=False)
    assert fg.Blueprint.from_pretrained("org/secret", token=TOKEN).to_json() == with_rows.to_json()


def test_what_a_repository_may_hold(hub, with_rows, tmp_path):
    files = files_of(with_rows, tmp_path / "made")
    hub.add("org/empty", {"config.json": b"{}"})
    hub.add("org/broken", {FILE_NAME: b"{"})
    hub.add("org/half", {FILE_NAME: files[FILE_NAME]})
    hub.add("org/mixed", files | {VECTORS_NAME: files[VECTORS_NAME][:-1] + b"\x01"})
    for repo_id, said in (
        ("org/empty", "a repository and revision that holds a blueprint"),
        ("org/broken", "not a usable blueprint"),
        ("org/half", f"{VECTORS_NAME} cannot be fetched"),
        ("org/mixed", "damaged or belongs to another blueprint"),
        ("org/none", "check the id"),
    ):
        with pytest.raises(BlueprintError, match=said):
            fg.Blueprint.from_pretrained(repo_id)
    hub.lying_sizes[FILE_NAME] = 2**40
    before = len(hub.requests)
    with pytest.raises(BlueprintError, match="larger than"):
        fg.Blueprint.from_pretrained("org/broken")
    assert [r.split()[0] for r in hub.requests[before:]] == ["HEAD"]  # not a byte was fetched


# -- pushing -------------------------------------------------------------------------------------


def test_push_and_read_again(hub, with_rows, without_rows, tmp_path):
    done = with_rows.push_to_hub("org/new", commit_message="first", private=True)
    repository = hub.repositories["org/new"]
    assert repository.private
    assert done.oid == repository.branches["main"]
    assert repository.files() == files_of(with_rows, tmp_path / "a") | {".gitattributes": b""}
    assert repository.messages == ["initial commit", "first"]  # both files in one
    assert fg.Blueprint.from_pretrained("org/new").to_json() == with_rows.to_json()
    hub.add("org/new", repository.files() | {"model.safetensors": b"weights"})
    without_rows.push_to_hub("org/new")  # vectors of the earlier one go, in the same commit
    assert repository.files() == files_of(without_rows, tmp_path / "b") | {
        ".gitattributes": b"", "model.safetensors": b"weights"
    }  # fmt: skip
    assert fg.Blueprint.from_pretrained("org/new").to_json() == without_rows.to_json()
    n = len(repository.commits)
    without_rows.push_to_hub("org/new")  # nothing new
    assert len(repository.commits) == n


def test_several_domains_with_their_vectors(hub, with_rows):
    other = blueprint_of(data_seed=9, tag="other")
    both = with_rows.with_domain(other)
    both.push_to_hub("org/both")
    repository = hub.repositories["org/both"]
    assert {FILE_NAME, VECTORS_NAME, DOMAIN_VECTORS_NAME} < set(repository.files())
    found = fg.Blueprint.from_pretrained("org/both")
    assert found.to_json() == both.to_json()
    for name, values in other.block_sq.items():
        assert np.array_equal(found.domain("other").block_sq[name], values)
    with_rows.push_to_hub("org/both")  # of one domain again
    assert DOMAIN_VECTORS_NAME not in repository.files()


def test_push_as_a_pull_request_or_to_a_branch(hub, with_rows, tmp_path):
    hub.add("org/model", {"config.json": b"{}"})
    done = with_rows.push_to_hub("org/model", create_pr=True)
    assert done.pr_url.endswith("/discussions/1")
    repository = hub.repositories["org/model"]
    assert set(repository.files()) == {"config.json"}
    repository.branches["dev"] = repository.branches["main"]
    with_rows.push_to_hub("org/model", revision="dev")
    assert FILE_NAME in repository.files("dev")
    assert FILE_NAME not in repository.files("main")


def test_push_refuses(hub, with_rows, monkeypatch):
    with pytest.raises(BlueprintError, match="is no hub id"):
        with_rows.push_to_hub("my model")
    with pytest.raises(BlueprintError, match=r"was not pushed to org/new .*Remedy"):
        with_rows.push_to_hub("org/new", token="hf_wrong")
    assert hub.repositories == {}
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BlueprintError, match="was not pushed"):
        with_rows.push_to_hub("org/new")


def test_a_missing_extra_is_named(with_rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: fg.Blueprint.from_pretrained("org/model"),
                 lambda: with_rows.push_to_hub("org/model")):  # fmt: skip
        with pytest.raises(MissingExtraError, match=r"fastgrad\[hf\]"):
            call()


# -- the command ---------------------------------------------------------------------------------


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_command_pushes_and_reads_at_a_revision(hub, with_rows, without_rows, tmp_path, capsys):
    with_rows.save_pretrained(tmp_path / "a")
    code, out, err = run(capsys, "blueprint", "push", tmp_path / "a", "org/new", "--message", "one",
                         "--private", "--json")  # fmt: skip
    assert code == 0, err
    first = json.loads(out)["commit"]
    assert hub.repositories["org/new"].messages[-1] == "one"
    assert hub.repositories["org/new"].private
    without_rows.save_pretrained(tmp_path / "b")
    code, out, _ = run(capsys, "blueprint", "push", tmp_path / "b", "org/new", "--pull-request")
    assert (code, "discussions/1" in out) == (0, True)
    code, out, _ = run(capsys, "blueprint", "push", tmp_path / "b", "org/new")
    assert (code, out.startswith("pushed to http")) == (0, True)
    assert run(capsys, "blueprint", "show", "org/new", "--json")[1] == without_rows.to_json()
    assert run(capsys, "blueprint", "show", f"org/new@{first}", "--json")[1] == with_rows.to_json()
    assert run(capsys, "blueprint", "validate", "org/new")[0] == 0
    hub.add("org/bad", {FILE_NAME: b"{}"})
    assert run(capsys, "blueprint", "validate", "org/new", "org/bad")[0] == 3
    assert run(capsys, "blueprint", "validate", "org/none")[0] == 1
    target = tmp_path / "selection.json"
    code, _, err = run(capsys, "select", "org/new", "--fraction", 0.5, "-o", target)
    assert code == 0, err
    assert fg.Selection.load(target) == fg.select(without_rows, fraction=0.5)


def test_probe_plan_and_verify_take_a_hub_id(hub, tmp_path, capsys):
    from tests.test_cli import save_model

    folder = save_model(tmp_path / "model", "llama")
    first = hub.add("org/llama", {p.name: p.read_bytes() for p in folder.iterdir()})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 40}" for i in range(200)))
    local, remote = tmp_path / "local", tmp_path / "remote"
    for reference, output in ((folder, local), ("org/llama", remote)):
        code, _, err = run(capsys, "probe", reference, text, "-o", output, "--length", 16)
        assert code == 0, err
    a, b = fg.GradientStats.load(local), fg.GradientStats.load(remote)
    assert np.array_equal(a.sq, b.sq)
    assert (a.meta["weights_hash"], b.meta["name_or_path"]) == (b.meta["weights_hash"], "org/llama")
    code, out, _ = run(capsys, "plan", f"org/llama@{first}", "--json")
    assert json.loads(out) == json.loads(run(capsys, "plan", folder, "--json")[1])
    fg.Blueprint.from_stats(b).push_to_hub("org/llama")
    code, out, err = run(capsys, "blueprint", "verify", "org/llama")
    assert (code, "org/llama was made for the weights in org/llama" in out) == (0, True), err
    code, _, err = run(capsys, "plan", "org/none")
    assert (code, "the config of org/none cannot be read" in err) == (1, True)
    assert run(capsys, "plan", "no such folder")[0] == 2


def test_the_environment_names_the_hub(with_rows, tmp_path):
    """A process of its own finds the stand-in by HF_ENDPOINT, as users point it at a mirror."""
    with stand_in() as server:
        server.add("org/model", files_of(with_rows, tmp_path / "made"))
        done = subprocess.run(
            [sys.executable, "-m", "fastgrad.cli", "blueprint", "show", "org/model", "--json"],
            capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0",
                              "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == with_rows.to_json()
