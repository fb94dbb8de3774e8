# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Uploading saved folders to the Hugging Face Hub."""

import json
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from .model_card import MODEL_ID, write_model_card


# What training leaves beside a model.
IGNORED = ["checkpoint-*", "logs/*", "*__pycache__*"]


def prepare_folder(folder: str | Path, repo_id: str) -> None:
    """
    Makes a saved folder fit to be published: removes the paths of this disk from its configs, writes a model card if it has
    none, and names the repository in the card. Raises a ValueError if the folder is no saved model or pipeline.
    """
    folder = Path(folder)
    configs = [folder / "model_index.json", folder / "config.json", *folder.glob("*/*config.json")]
    configs = [path for path in configs if path.is_file() and not path.parent.name.startswith("checkpoint-")]
    if not configs:
        raise ValueError(f"{folder} is no saved model: it has neither a model_index.json nor a config.json.")
    for path in configs:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = folder / "README.md"
    if not card.is_file():
        write_model_card(folder, title=repo_id.split("/")[-1], summary="A class-conditional masked image model.")
    text = card.read_text(encoding="utf-8")
    if MODEL_ID in text:
        card.write_text(text.replace(MODEL_ID, repo_id), encoding="utf-8")


def push_folder_to_hub(
    folder: str | Path, repo_id: str, private: bool = False, commit_message: str = "Upload model"
) -> str:
    """
    Uploads a saved pipeline or model in one commit, except training checkpoints and logs.

    Args:
        folder (`str` or `Path`): The saved folder; see `prepare_folder` for what is changed in it.
        repo_id (`str`): The repository, as user/name; made if it is not there.
        private (`bool`, defaults to `False`): Whether a new repository is private.
        commit_message (`str`): Message of the commit.

    Returns:
        `str`: The address of the commit.
    """
    validate_repo_id(repo_id)
    prepare_folder(folder, repo_id)
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, ignore_patterns=IGNORED
        )
    except Exception as error:  # no token, no connection, refused: the client's errors share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} could not be uploaded to {repo_id}: {reason}") from error
    return commit.commit_url
