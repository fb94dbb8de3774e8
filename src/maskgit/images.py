# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Pictures of pictures: grids, and token grids that are not finished yet."""

import math

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps


MIN_SIDE = 96
MAX_GRID_SIDE = 4096
MASK_FILL, MASK_OUTLINE = (60, 64, 82), (88, 94, 118)


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
