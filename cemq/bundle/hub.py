"""Bundles on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cemq.bundle.manifest import MANIFEST, read_bundle
from cemq.errors import HubError, InputError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = "README.md"


def find_bundle(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundle: a local one, or the Hub's ``owner/name``, downloaded if it is not in the cache yet.

    Args:
        revision: Branch, tag or commit on the Hub.

    Raises:
        HubError: No such folder, and nothing of that name can be fetched; or there is, but it is no bundle.
    """
    folder = Path(name)
    if folder.exists() or not _REPOSITORY.fullmatch(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    def fetch(**options: Any) -> Path:
        try:
            return Path(snapshot_download(str(name), revision=revision, **options))
        except Exception as error:  # huggingface_hub and its transport raise many unrelated types
            raise HubError(
                f"'{name}' is no folder here and cannot be fetched from the Hub: {_reason(error)}"
            ) from error

    if not (fetch(allow_patterns=[MANIFEST]) / MANIFEST).is_file():  # before gigabytes of something else arrive
        raise HubError(f"'{name}' on the Hub is no cemq bundle: make one with cemq quantize-and-schedule {name}")
    return fetch()


def push_to_hub(
    bundle: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a bundle with its model card, in one commit, and return the address of the repository.

    Args:
        repo_id: ``owner/name``; created if it is not there.
        private: Of a repository that is created; None takes the owner's default.
        revision: Branch to commit to; None takes the main one.
        create_pr: Propose the commit as a pull request.
        token: None takes the one that ``hf auth login`` stored.

    Raises:
        BundleError: The bundle is incomplete or damaged.
        InputError: ``repo_id`` is no ``owner/name``.
        HubError: The Hub refuses, or cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise InputError(f"repository {repo_id!r}: write owner/name")
    folder = Path(bundle)
    manifest = read_bundle(folder, verify="always")
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    paths = sorted({*listed, MANIFEST} - {_CARD})
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(folder / path)) for path in paths]
    card = folder / _CARD
    if card.is_file():
        text = _card(card.read_text(encoding="utf-8"), repo_id, manifest.model)
        operations.append(CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=text.encode()))
    steps = f"{manifest.full_steps:g} of {manifest.schedule.num_steps} steps in full"
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"cemq bundle: {manifest.scheme}, {steps}",
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:
        raise HubError(f"'{repo_id}' cannot be written on the Hub: {_reason(error)}") from error
    return str(repository)


def _card(text: str, repo_id: str, model: str) -> str:
    """The bundle's card for the Hub: under its name there, and without a base model that the Hub does not know."""
    text = text.replace('"this-folder"', f'"{repo_id}"')
    if not _REPOSITORY.fullmatch(model):
        text = re.sub(r"^base_model: .*\n", "", text, count=1, flags=re.MULTILINE)
    return text


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
