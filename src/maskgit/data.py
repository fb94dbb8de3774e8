# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Images and tokens for training: where they are read from, and how an image becomes a tensor."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch

from .images import UnreadableImageError, image_to_tensor


TOKEN_DATASET_INFO = "token_dataset.json"
IMAGE_COLUMNS = ("image", "img", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
# Folders of images with these very names are splits, as in `datasets`.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def load_image_dataset(source: str, split: str = "train") -> datasets.Dataset:
    """
    Images of one split, with a column `image` (`datasets.Image`) and, if the source has classes, `label` (`datasets.ClassLabel`).

    Args:
        source (`str`):
            A folder saved by `datasets` (`save_to_disk`), a folder of parquet files, of webdataset shards (`.tar`) or of images
            (with a folder per class, whose sorted names give the class ids; folders `train/`, `validation/`, `test/` in `source` are
            splits, without one all images are in "train"), or the name of a dataset on the Hub.
        split (`str`, defaults to `"train"`): Which split; `datasets` slices (`"train[:1000]"`) work except for saved folders.
    """
    folder = Path(source)
    if not folder.exists() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise ValueError(
            f"there is no folder {source!r}: give a folder of images or the name of a dataset on the Hub."
        )
    suffixes = {path.suffix for pattern in ("*.*", "*/*.*") for path in folder.glob(pattern)}
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            dataset = datasets.load_from_disk(source)
        elif not folder.is_dir() or ".parquet" in suffixes:
            dataset = datasets.load_dataset(source, split=split)
        elif ".tar" in suffixes:
            dataset = datasets.load_dataset("webdataset", data_dir=source, split=split)
        else:
            # Left alone, `datasets` also takes `bullet_train/` and `photo-test.png` for splits.
            found = {
                name: [f"{subfolder}/**" for subfolder in subfolders if (folder / subfolder).is_dir()]
                for name, subfolders in SPLIT_FOLDERS.items()
            }
            files = {name: patterns for name, patterns in found.items() if patterns} or {"train": "**"}
            dataset = datasets.load_dataset("imagefolder", data_dir=source, data_files=files, split=split)
    except (datasets.exceptions.DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        looked = "" if folder.exists() else " (there is no such folder here, so it was looked for on the Hub)"
        raise ValueError(f"cannot read split {split!r} of images from {source!r}{looked}: {reason}") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{source!r} has no split {split!r}, only {', '.join(dataset)}.")
        dataset = dataset[split]

    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise ValueError(f"{source!r} has no images: its columns are {', '.join(dataset.column_names)}.")
    image = next((name for name in IMAGE_COLUMNS if name in images), images[0])
    classes = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    label = next((name for name in (*LABEL_COLUMNS, *classes) if name in dataset.column_names), None)
    dataset = dataset.select_columns([image] if label is None else [image, label])
    dataset = dataset.rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old and old != new}
    )
    if label is not None and not isinstance(dataset.features["label"], datasets.ClassLabel):
        if dataset.features["label"].dtype.startswith(
            "int"
        ):  # class_encode_column would sort ids as text: 0, 1, 10, 11, 2
            count = max(dataset.unique("label")) + 1
            dataset = dataset.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(count)]))
        else:
            dataset = dataset.class_encode_column("label")
    return dataset


class ImageDataset(torch.utils.data.Dataset):
    """
    Images as tensors: `{"pixel_values": float32 (3, size, size) in [-1, 1], "label": int}` (no label if the source has none).

    Random crops and flips depend on the seed, the epoch (`set_epoch`) and the image alone, so that a resumed run, and a run on another
    number of processes or workers, sees the same images.

    Args:
        dataset (`datasets.Dataset`): from `load_image_dataset`.
        size (`int`): side of the images, in pixels.
        random_crop (`bool`): cut at random places instead of the centre.
        random_flip (`bool`): mirror half of the images left to right.
        seed (`int`): of the random crops and flips.
    """

    def __init__(
        self, dataset: datasets.Dataset, size: int, random_crop: bool = False, random_flip: bool = False, seed: int = 0
    ):
        self.dataset = dataset
        self.size = size
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        try:
            row = self.dataset[index]
        except Exception as error:  # PIL raises many kinds
            stored = self.dataset.cast_column("image", datasets.Image(decode=False))[index]["image"]
            name = f"image {index}" + (f" ({stored['path']})" if stored["path"] else "")
            raise UnreadableImageError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
        x, y, flip = np.random.default_rng((self.seed, self.epoch, index)).random(3)
        pixels = image_to_tensor(row["image"], self.size, (x, y) if self.random_crop else (0.5, 0.5))
        if self.random_flip and flip < 0.5:
            pixels = pixels.flip(-1)
        return {"pixel_values": pixels} | ({"label": row["label"]} if "label" in row else {})


class TokenDataset(torch.utils.data.Dataset):
    """
    Images as tokens, written by `training/encode_dataset.py`; all of them are kept in memory (2 bytes a token).

    Items are `{"input_ids": long (height, width), "label": int}`.

    Attributes:
        tokens (`np.ndarray`): uint16 (images, height * width), row-major grids.
        labels (`np.ndarray`): int64 (images,).
        label_names (`list[str]`): name of each class, in the order of the ids.
        grid_size (`tuple[int, int]`): height and width of a grid, in tokens.
        codebook_size (`int`): tokens are 0..codebook_size-1.
        tokenizer (`str`): folder or Hub id of the tokenizer that made the tokens.
        tokenizer_checksum (`str`): of its weights, by `maskgit.tokenization.tokenizer_checksum`.

    Args:
        folder (`str` or `Path`): the `--output_dir` of `encode_dataset.py`.
        split (`str`, defaults to `"train"`): which of the splits written there.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        folder = Path(folder)
        if not (folder / TOKEN_DATASET_INFO).is_file():
            raise ValueError(
                f"{str(folder)!r} is no token dataset (no {TOKEN_DATASET_INFO} in it): make one with training/encode_dataset.py."
            )
        info = json.loads((folder / TOKEN_DATASET_INFO).read_text(encoding="utf-8"))
        if split not in info["splits"]:
            raise ValueError(f"{str(folder)!r} has no split {split!r}, only {', '.join(info['splits'])}.")
        parts = sorted((folder / "data").glob(f"{split}-*-of-*.parquet"))
        if len(parts) != info["splits"][split]["num_parts"]:
            raise ValueError(
                f"split {split!r} of {str(folder)!r} is not complete: {len(parts)} of {info['splits'][split]['num_parts']} parts are "
                "there. Run encode_dataset.py again with the same options, it goes on where it stopped."
            )
        table = pyarrow.parquet.read_table(parts)
        self.grid_size = (info["grid_height"], info["grid_width"])
        self.codebook_size = info["codebook_size"]
        self.tokenizer = info["tokenizer"]
        self.tokenizer_checksum = info["tokenizer_checksum"]
        self.label_names = datasets.Features.from_arrow_schema(table.schema)["label"].names
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table["tokens"].chunks]
        self.tokens = np.concatenate(chunks).reshape(-1, self.grid_size[0] * self.grid_size[1])
        self.labels = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        grid = torch.from_numpy(self.tokens[index].astype(np.int64)).view(self.grid_size)
        return {"input_ids": grid, "label": int(self.labels[index])}
