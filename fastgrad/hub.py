"""Blueprints in model repositories of the Hugging Face Hub: read at one commit, pushed in one.

Through ``huggingface_hub``, which comes with transformers and is imported only when a hub id is
used. The hub asked is the one that ``HF_ENDPOINT`` names; ``HF_HUB_OFFLINE`` is respected.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrad.blueprint_schema import (
    DOMAIN_VECTORS_NAME,
    FILE_NAME,
    MAX_BYTES,
    VECTORS_NAME,
)
from fastgrad.errors import BlueprintError, MissingExtraError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

#: Vectors beside a file; also what :mod:`fastgrad.blueprint` reads at most.
MAX_VECTOR_BYTES = 2**30

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Whether ``text`` is written as ``organisation/name``."""
    return len(text) <= 96 and _REPO_ID.fullmatch(text) is not None


def located(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Path, Callable[[str], Path]]:
    """Where a blueprint's JSON file is on this machine, and what finds a file beside it.

    A text that is no local path and looks like ``organisation/name`` is a hub id: the JSON file is
    fetched, and files beside it are fetched from the same commit, however the branch has moved on.

    Returns:
        The path, and a function from the name of a file beside it to that file's path.

    Raises:
        BlueprintError: if the hub does not give it, or ``revision`` and the like are given with a
            local path.
        MissingExtraError: if a hub id is given and ``huggingface_hub`` is not installed.
    """
    if not isinstance(path, str) or os.path.exists(path) or not is_repo_id(path):
        if revision is not None:
            raise BlueprintError(
                f"revision={revision!r} is of a hub repository, and this is a local path. Remedy: "
                "leave it out, or give a hub id such as org/name"
            )
        target = Path(path)
        target = target / FILE_NAME if target.is_dir() else target
        return target, target.with_name
    return _Repository(path, token, local_files_only, cache_dir).open(revision)


class _Repository:
    def __init__(
        self, repo_id: str, token: str | bool | None, local_files_only: bool,
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:  # fmt: skip
        self.hub = _hub()
        self.repo_id, self.token, self.cache_dir = repo_id, token, cache_dir
        self.offline = local_files_only or bool(self.hub.constants.HF_HUB_OFFLINE)

    def open(self, revision: str | None) -> tuple[Path, Callable[[str], Path]]:
        path = self.fetch(FILE_NAME, revision, MAX_BYTES)
        commit = path.parent.name  # .../snapshots/<commit>/gradient_blueprint.json
        if not _COMMIT.fullmatch(commit):
            raise BlueprintError(
                f"the cache does not say which commit {path} is of. Remedy: "
                "download the repository and give its folder"
            )
        return path, lambda name: self.fetch(name, commit, MAX_VECTOR_BYTES)

    def fetch(self, name: str, revision: str | None, limit: int) -> Path:
        commit = None
        at = "" if revision is None else f" at revision {revision}"
        with _hub_errors(f"{name} cannot be fetched from the hub{at}", self.offline):
            if not self.offline:
                # Asked first: the commit, so that nothing older is taken from the cache when the
                # hub does not answer, and the size, before a byte is fetched.
                found = self.hub.get_hf_file_metadata(
                    self.hub.hf_hub_url(self.repo_id, name, revision=revision), token=self.token
                )
                if found.size is not None and found.size > limit:
                    raise BlueprintError(
                        f"{name} is larger than {limit} bytes, which no blueprint is"
                    )
                commit = found.commit_hash
            path = self.download(name, revision)  # notes in the cache what the revision stands for
            if commit is not None and path.parent.name != commit:
                path = self.download(name, commit)
            return path

    def download(self, name: str, revision: str | None) -> Path:
        return Path(
            self.hub.hf_hub_download(
                self.repo_id, name, revision=revision, token=self.token, cache_dir=self.cache_dir,
                local_files_only=self.offline,
            )
        )  # fmt: skip


def push(
    text: str,
    beside: Mapping[str, bytes],
    repo_id: str,
    *,
    revision: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """The files of a blueprint into a model repository, in one commit.

    Vectors that are there from an earlier blueprint are removed in the same commit if this one has
    none: they would be of other numbers. See :meth:`fastgrad.Blueprint.push_to_hub`.

    Args:
        text: of the JSON file.
        beside: name -> content of the files of vectors beside it.

    Raises:
        BlueprintError: if the hub refuses.
        MissingExtraError: if ``huggingface_hub`` is not installed.
    """
    hub = _hub()
    if not is_repo_id(repo_id):
        raise BlueprintError(
            f"{repo_id!r} is no hub id. Remedy: organisation/name, without spaces or a scheme"
        )
    offline = bool(hub.constants.HF_HUB_OFFLINE)
    with _hub_errors(f"the blueprint was not pushed to {repo_id}", offline):
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations: list[Any] = [hub.CommitOperationAdd(FILE_NAME, text.encode("utf-8"))]
        for name in (VECTORS_NAME, DOMAIN_VECTORS_NAME):
            if name in beside:
                operations.append(hub.CommitOperationAdd(name, beside[name]))
            elif api.file_exists(repo_id, name, revision=revision):
                operations.append(hub.CommitOperationDelete(name))
        done: CommitInfo = api.create_commit(
            repo_id, operations, revision=revision, create_pr=create_pr,
            commit_message=commit_message or "Gradient blueprint: where the gradient is",
        )  # fmt: skip
        return done


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    return huggingface_hub


@contextlib.contextmanager
def _hub_errors(failed: str, offline: bool) -> Iterator[None]:
    """The client's errors, which differ from version to version, as one of ours."""
    try:
        yield
    except (BlueprintError, MissingExtraError):
        raise
    except Exception as error:
        kind = type(error).__name__
        if offline:
            remedy = (
                "a local folder, or without local_files_only and HF_HUB_OFFLINE once, so that it "
                "is fetched"
            )
        elif "EntryNotFound" in kind:
            remedy = "a repository and revision that holds a blueprint, or a local folder"
        elif "NotFound" in kind or "Gated" in kind:
            remedy = (
                "check the id and the revision, and for a private or gated repository the token "
                "(`hf auth login`); no local folder has that name either"
            )
        else:
            remedy = "check the connection and the token (`hf auth login`), or use a local folder"
        line = next((part for part in str(error).splitlines() if part.strip()), kind)
        raise BlueprintError(f"{failed} ({kind}: {line[:200]}). Remedy: {remedy}") from error
