# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Images as tensors, and pictures of pictures: grids, and token grids that are not finished yet."""

import math

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps


MIN_SIDE = 96
MAX_GRID_SIDE = 4096
MASK_FILL, MASK_OUTLINE = (60, 64, 82), (88, 94, 118)


class UnreadableImageError(ValueError):
    """An image is broken. From a `DataLoader`'s worker it arrives with a traceback as its message, of which the last line is kept."""

    def __init__(self, message: str):
        super().__init__(message.rstrip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: grey and palette images are expanded, transparency is laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def crop_square(image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """
    Resizes the shorter side to `size` (bicubic) and cuts out a square. An image of that size is not touched.

    Args:
        image (`PIL.Image.Image`): of any mode and size.
        size (`int`): side of the square, in pixels.
        crop (`tuple[float, float]`): where to cut, as shares of the room left (x, y); (0.5, 0.5) is the centre.

    Returns:
        `PIL.Image.Image`: RGB, `size` x `size`.
    """
    image = to_rgb(image)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) * share) for side, share in zip(image.size, crop))
    return image.crop((left, top, left + size, top + size))


def image_to_tensor(image: Image.Image, size: int, crop: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """`crop_square` of an image, as float32 (3, size, size) in [-1, 1]."""
    pixels = np.asarray(crop_square(image, size, crop), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def enlarge(image: Image.Image) -> Image.Image:
    """A tiny image, enlarged by a whole number without smoothing until no side is below 96 pixels. Others are returned."""
    factor = math.ceil(MIN_SIDE / min(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def make_grid(images: list[Image.Image], columns: int) -> Image.Image:
    """
    Images of one size side by side, row by row: tiny ones enlarged, and many large ones shrunk to a grid of 4096 pixels a
    side at most.
    """
    rows = math.ceil(len(images) / columns)
    largest = MAX_GRID_SIDE // max(rows, columns) - 2
    tiles = []
    for image in images:
        tile = enlarge(image)
        tile.thumbnail((largest, largest))
        tiles.append(ImageOps.expand(tile, border=1, fill="white"))
    blank = Image.new("RGB", tiles[0].size, "white")
    return make_image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)


def make_pair_grid(pairs: list[tuple[Image.Image, Image.Image]], columns: int = 10) -> Image.Image:
    """Rows of first images, each above a row of the second ones. If sizes differ, all are fitted into squares of 256 pixels."""
    if len({image.size for pair in pairs for image in pair}) > 1:
        pairs = [tuple(ImageOps.pad(image, (256, 256), color="white") for image in pair) for pair in pairs]
    columns = min(columns, len(pairs))
    blank = Image.new("RGB", pairs[0][0].size, "white")
    tiles = []
    for start in range(0, len(pairs), columns):
        for row in zip(*pairs[start : start + columns]):
            tiles += [*row] + [blank] * (columns - len(row))
    return make_grid(tiles, columns)


def mark_masked(image: Image.Image, masked: list[list[bool]]) -> Image.Image:
    """`image`, enlarged if tiny, with the cells of the token grid covered that are `masked` (rows of booleans)."""
    image = enlarge(image)
    draw = ImageDraw.Draw(image)
    height, width = image.height // len(masked), image.width // len(masked[0])
    for i, row in enumerate(masked):
        for j, is_masked in enumerate(row):
            if is_masked:
                box = (j * width, i * height, (j + 1) * width - 1, (i + 1) * height - 1)
                draw.rectangle(box, fill=MASK_FILL, outline=MASK_OUTLINE)
    return image
