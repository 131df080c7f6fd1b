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
    """InputError, before anything is written, where `repo` is no name of a repository or the hub
    does not know the user."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{setting('push_to_hub')} {repo} is no name of a repository: {first_line(error)}") from error
    try:
        _api().whoami()
    except Exception as error:  # no token, a wrong one, no network: each its own kind
        raise InputError(
            f"{setting('push_to_hub')} {repo}: the hub does not know you ({first_line(error)}); hf auth login"
        ) from error


def push(folder: Path, repo: str, private: bool) -> str:
    """Makes the repository if need be and uploads the directory in one commit; returns its address.
    WorkError where that fails, the directory staying as it is."""
    api = _api()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="A hybrid made by hybridize")
    except Exception as error:  # HTTP errors of many kinds
        raise WorkError(f"{folder} is written, but could not be uploaded to {repo}: {first_line(error)}") from error
    return str(address)
