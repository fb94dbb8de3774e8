# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Put a trained pipeline into the package as a built-in model, in float16.

    python scripts/ship_builtin_model.py outputs/maskgit_fashion_mnist/pipeline fashion-mnist
"""

import argparse
import shutil

from maskgit.loading import BUILTIN_MODELS, load_pipeline
from maskgit.options import user_errors


MAX_MEGABYTES = 15  # of all built-in models together: they travel with every clone


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of the pipeline")
    parser.add_argument("name", help="what `--model builtin-NAME` will call it")
    parser.add_argument("--overwrite", action="store_true", help="replace the built-in model of this name")
    args = parser.parse_args()

    target = BUILTIN_MODELS / args.name
    with user_errors():
        if target.exists() and not args.overwrite:
            raise ValueError(f"there is a built-in model {args.name!r}: add --overwrite to replace it.")
        pipe = load_pipeline(args.pipeline, dtype="float16", device="cpu")
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target)
    # Inside the package its own classes are used: copies of their sources would only grow old.
    for source in target.rglob("*.py"):
        source.unlink()
    total = sum(path.stat().st_size for path in BUILTIN_MODELS.rglob("*") if path.is_file()) / 1e6
    print(f"Wrote {target}. The built-in models are {total:.1f} MB together.")
    with user_errors():
        if total > MAX_MEGABYTES:
            raise ValueError(f"that is more than {MAX_MEGABYTES} MB: make a model smaller.")


if __name__ == "__main__":
    main()
