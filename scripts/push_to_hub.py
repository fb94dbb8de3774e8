#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Upload a saved pipeline or model to the Hugging Face Hub, in one commit. Log in first with `hf auth login`, or set HF_TOKEN.

    python scripts/push_to_hub.py my-model my-name/my-model

In the folder, local paths are removed from the configs, and README.md (the model card) is written if it is missing.
"""

import argparse

from maskgit.options import user_errors
from maskgit.publishing import push_folder_to_hub


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", metavar="DIR", help="folder written by the converter, a training script or save_pretrained"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="repository, as user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--commit_message", default="Upload model", help="default: %(default)s")
    args = parser.parse_args(argv)
    with user_errors():
        print(f"uploaded: {push_folder_to_hub(args.folder, args.repo_id, args.private, args.commit_message)}")


if __name__ == "__main__":
    main()
