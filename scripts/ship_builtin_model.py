# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Put a trained pipeline into the package as a built-in model, in float16; or add a self-guidance adapter to one that is there.

    python scripts/ship_builtin_model.py outputs/maskgit_fashion_mnist/pipeline fashion-mnist
    python scripts/ship_builtin_model.py outputs/pgm_fashion_mnist/pipeline partition
    python scripts/ship_builtin_model.py outputs/toast_fashion_mnist/pipeline fashion-mnist --toast_only
"""

import argparse
import filecmp
import shutil
from pathlib import Path

import torch

from maskgit import MaskGitPipeline
from maskgit.conversion.folders import make_readable
from maskgit.loading import BUILTIN_MODELS, load_pipeline
from maskgit.options import user_errors


MAX_MEGABYTES = 15  # of all built-in models together: they travel with every clone


def with_adapter_of(pipe: MaskGitPipeline, trained: MaskGitPipeline) -> MaskGitPipeline:
    """The built-in model `pipe` with the adapter of `trained`, and nothing else of it."""
    if trained.toast is None:
        raise ValueError("the pipeline has no toast adapter: train one with training/train_toast.py.")
    weights, expected = trained.transformer.state_dict(), pipe.transformer.state_dict()
    if weights.keys() != expected.keys() or not all(torch.equal(weights[name], expected[name]) for name in weights):
        raise ValueError("the adapter was trained on another transformer than the built-in one.")
    pipe.register_modules(toast=trained.toast)
    return pipe


def share_tokenizer(target: Path) -> None:
    """Replaces the tokenizer's folder by a link to another built-in model's, if it is the same: it need not travel twice."""
    weights = "diffusion_pytorch_model.safetensors"
    for other in sorted(BUILTIN_MODELS.glob(f"*/vqvae/{weights}")):
        tokenizer = other.parent
        if tokenizer.parent != target and not tokenizer.is_symlink():
            if filecmp.cmp(other, target / "vqvae" / weights, shallow=False):
                shutil.rmtree(target / "vqvae")
                (target / "vqvae").symlink_to(Path("..") / tokenizer.relative_to(BUILTIN_MODELS))
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of the pipeline")
    parser.add_argument("name", help="what `--model builtin-NAME` will call it")
    parser.add_argument("--overwrite", action="store_true", help="replace the built-in model of this name")
    parser.add_argument(
        "--toast_only",
        action="store_true",
        help="add only the pipeline's self-guidance adapter to the built-in model of this name, which stays as it is",
    )
    args = parser.parse_args()

    target = BUILTIN_MODELS / args.name
    with user_errors():
        if target.exists() and not args.overwrite and not args.toast_only:
            raise ValueError(f"there is a built-in model {args.name!r}: add --overwrite to replace it.")
        pipe = load_pipeline(args.pipeline, dtype="float16", device="cpu")
        if args.toast_only:
            pipe = with_adapter_of(load_pipeline(f"builtin-{args.name}", dtype="float16", device="cpu"), pipe)
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target)
    # Inside the package its own classes are used: copies of their sources would only grow old.
    for source in target.rglob("*.py"):
        source.unlink()
    make_readable(target)
    share_tokenizer(target)
    total = sum(path.stat().st_size for path in BUILTIN_MODELS.rglob("*") if path.is_file()) / 1e6
    print(f"Wrote {target}. The built-in models are {total:.1f} MB together.")
    with user_errors():
        if total > MAX_MEGABYTES:
            raise ValueError(f"that is more than {MAX_MEGABYTES} MB: make a model smaller.")


if __name__ == "__main__":
    main()
