#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Fashion-MNIST as a `datasets` folder with the splits train (60,000 images) and test (10,000), for the training scripts.

Columns: `image` (28x28 grey, padded with black to 32x32 RGB) and `label` (the official ids 0..9, with names). The images are read from the
Debian package dataset-fashion-mnist where it is installed, else downloaded from the Hub (zalando-datasets/fashion_mnist).

    python scripts/prepare_fashion_mnist.py --output_dir data/fashion_mnist
"""

import argparse
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from maskgit.conversion.folders import new_folder
from maskgit.options import user_errors


DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HUB_ID = "zalando-datasets/fashion_mnist"
CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from a gzipped IDX file: two zeros, type 8 (uint8), number of dimensions, big-endian sizes, values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of bytes: reinstall the package dataset-fashion-mnist.")
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_images(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """The images, uint8 (28, 28), and official labels of a split, in the official order."""
    prefix, _ = SPLITS[split]
    if DEBIAN_FOLDER.is_dir():
        images = read_idx(DEBIAN_FOLDER / f"{prefix}-images-idx3-ubyte.gz")
        yield from zip(images, read_idx(DEBIAN_FOLDER / f"{prefix}-labels-idx1-ubyte.gz").tolist())
    else:
        for row in datasets.load_dataset(HUB_ID, split=split):
            yield np.asarray(row["image"].convert("L")), row["label"]


def to_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.pad(image, 2)).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="data/fashion_mnist", help="folder to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    args = parser.parse_args()

    output_dir = Path(args.output_dir)
    if output_dir.exists() and not args.overwrite:
        parser.error(f"{output_dir} is there already: give another --output_dir, or --overwrite to replace it")

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASS_NAMES)})
    splits = datasets.DatasetDict()
    for split, (_, count) in SPLITS.items():
        rows = {"image": [], "label": []}
        try:
            for image, label in tqdm(read_images(split), total=count, desc=split):
                rows["image"].append({"bytes": to_png(image), "path": None})
                rows["label"].append(label)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            parser.error(
                f"found no Fashion-MNIST: `apt install dataset-fashion-mnist` (Debian, Ubuntu), or connect to the internet so that "
                f"{HUB_ID} can be downloaded ({str(error).splitlines()[0]})"
            )
        splits[split] = datasets.Dataset.from_dict(rows, features=features)

    with user_errors(), new_folder(output_dir, args.overwrite) as folder:
        splits.save_to_disk(str(folder))
    print(f"wrote {', '.join(f'{len(rows)} {split} images' for split, rows in splits.items())} to {output_dir}")


if __name__ == "__main__":
    main()
