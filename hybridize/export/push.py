"""Uploads an exported directory to a model hub, through huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hybridize.errors import InputError, WorkError, first_line, setting


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def check_push(repo: str) -> None:
    """Checks, before anything is written, that `repo` is a valid repository name and that the user
    is logged in to the hub. InputError otherwise."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{setting('push_to_hub')} {repo} is not a valid repository name: {first_line(error)}") from error
    try:
        _api().whoami()
    except Exception as error:  # no token, a wrong token and no network raise different types
        raise InputError(
            f"{setting('push_to_hub')} {repo}: not logged in to the hub ({first_line(error)}); run hf auth login"
        ) from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads the directory in one commit, creating the repository if necessary; returns its URL.
    WorkError if that fails; the directory is not changed."""
    api = _api()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="A hybrid made by hybridize")
    except Exception as error:  # many types of HTTP errors
        raise WorkError(f"{folder} is written, but could not be uploaded to {repo}: {first_line(error)}") from error
    return str(address)
