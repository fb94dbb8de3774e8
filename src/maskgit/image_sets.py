# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Finished images, to be measured: from folders, .npz files and datasets."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .images import UnreadableImageError, crop_square, to_rgb


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FolderImages:
    """Images of a folder and its subfolders, in the order of their paths."""

    def __init__(self, folder: str | Path):
        files = (path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.paths = sorted(path for path in files if not path.name.startswith("."))
        if not self.paths:
            raise ValueError(f"There are no images in {folder} ({', '.join(IMAGE_SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


class ArrayImages:
    """Images of `arr_0`, uint8 (N, H, W, 3), in an .npz file: left on the disk where the file is not compressed."""

    def __init__(self, path: str | Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran_order, dtype = read(file)
                header_size = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
            raise ValueError(
                f"arr_0 of {path} is {dtype} of shape {shape}, but images are uint8 (N, height, width, 3)."
            )
        if member.compress_type == zipfile.ZIP_STORED and not fortran_order:
            with open(path, "rb") as file:
                # The local header: 30 bytes, of which the last four are the sizes of the two fields that follow.
                file.seek(member.header_offset + 26)
                field_sizes = np.frombuffer(file.read(4), dtype="<u2").tolist()
            offset = member.header_offset + 30 + sum(field_sizes) + header_size
            self.array = np.memmap(path, mode="r", offset=offset, shape=shape)
        else:
            with np.load(path) as file:
                self.array = file["arr_0"]

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"image {index} of {self.path}"

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


class DatasetImages:
    """Images of a split of whatever `maskgit.data.load_image_dataset` reads."""

    def __init__(self, source: str, split: str):
        import datasets

        from .data import load_image_dataset

        self.source = source
        self.dataset = load_image_dataset(source, split).cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset[index]["image"]["path"] or f"image {index} of {self.source}"

    def __getitem__(self, index: int) -> Image.Image:
        stored = self.dataset[index]["image"]
        return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))


ImageSource = FolderImages | ArrayImages | DatasetImages


def scan_headers(
    images: ImageSource, count: int, description: str
) -> tuple[dict[tuple[int, int], int], dict[str, int]]:
    """Of the first `count` images: the index of the first of each size (width, height), and how many there are of each mode."""
    sizes, modes = {}, {}
    for i in tqdm(range(count), desc=description, unit="image", leave=False):
        try:
            with images[i] as image:
                sizes.setdefault(image.size, i)
                modes[image.mode] = modes.get(image.mode, 0) + 1
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableImageError(f"{images.name(i)} cannot be read: {error}") from None
    return sizes, modes


def resize_clean(pixels: np.ndarray, side: int) -> np.ndarray:
    """
    Bytes (H, W, 3) to (side, side, 3) by PIL's bicubic filter on floats (Parmar et al., 2022, arXiv 2104.11222), then cut to
    bytes again, as Halton-MaskGIT and Partition Generative Modeling do.
    """
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(pixels, -1, 0)]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255).astype(np.uint8)


class ImageTensors(torch.utils.data.Dataset):
    """
    Images as uint8 tensors (3, H, W); grey ones are expanded, transparency is laid on white.

    Args:
        images (`ImageSource`): The images.
        count (`int`): How many of them, from the first on.
        image_size (`int`, *optional*): Resize the shorter side to this and cut out the centre.
        clean_size (`int`, *optional*): Resize to this side by `resize_clean` after that.
    """

    def __init__(self, images: ImageSource, count: int, image_size: int | None = None, clean_size: int | None = None):
        self.images, self.count, self.image_size, self.clean_size = images, count, image_size, clean_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            with self.images[index] as image:
                image = to_rgb(image) if self.image_size is None else crop_square(image, self.image_size)
        except Exception as error:  # PIL raises many kinds
            reason = " ".join(str(error).split())
            raise UnreadableImageError(f"{self.images.name(index)} cannot be read: {reason}") from None
        pixels = np.array(image)
        if self.clean_size is not None:
            pixels = resize_clean(pixels, self.clean_size)
        return torch.from_numpy(pixels).permute(2, 0, 1)
