# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""What the commands of `maskgit` do; their options are in maskgit_cli.py."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from . import __version__
from .image_sets import FolderImages
from .images import crop_square, make_grid, make_pair_grid, mark_masked, to_rgb
from .loading import SCHEDULERS, find_device, load_pipeline
from .pipelines import MaskGitInpaintPipeline, MaskGitPipeline
from .pipelines.pipeline_maskgit import CALL_DEFAULTS
from .presets import apply_preset, load_preset
from .tokenization import decode_tokens, encode_images, load_tokenizer, psnr


MAX_IMAGES_IN_GRID = 1000
MAX_PAIRS_IN_GRID = 100
MAX_LINES = 20
MAX_ROWS_OF_CLASSES = 16


def _check_output_dir(folder: Path, overwrite: bool) -> None:
    """Raise an error if `folder` holds files already, or cannot be made or written to."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(
            f"The folder '{folder}' has files in it: give another --output_dir, or --overwrite to write over those of the "
            "same names."
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OSError(f"Cannot write to '{folder}': '{existing}' is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"Cannot write to '{folder}': no permission in '{existing}'.")


def _file_stems(pipe: MaskGitPipeline, labels: list[int]) -> list[str]:
    """A file name for each image, which sorts in their order: its number, and the first name of its class, or its id."""
    digits = max(5, len(str(len(labels) - 1)))
    stems = []
    for i, label in enumerate(labels):
        name = re.sub(r"\W+", "-", pipe.id2label.get(label, "").split(",")[0].lower()).strip("-")
        stems.append(f"{i:0{digits}}_{name or label}")
    return stems


@torch.no_grad()
def decode(
    pipe: MaskGitPipeline,
    grids: torch.LongTensor,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda image: image,
) -> list[Image.Image]:
    """Images of token grids (N, height, width), one at a time: how a batch is rounded depends on its size."""
    images = [finish(pipe.decode_latents(grid[None].to(pipe.device))) for grid in grids]
    return [pipe.image_processor.postprocess(image, output_type="pil")[0] for image in images]


def draw_steps(pipe: MaskGitPipeline, steps: torch.LongTensor) -> list[Image.Image]:
    """
    How an image came about: a picture of each step, masked cells covered.

    Args:
        steps (`torch.LongTensor` of shape `(steps + 1, height, width)`): Its tokens before the first step and after each.
    """
    masked = steps == pipe.scheduler.config.mask_token_id
    # Under the cover are the tokens to come, so that the visible cells look as they will: one grid for all steps, if no
    # token is ever drawn again.
    grids, grid_of_step = torch.where(masked, steps[-1], steps).unique(dim=0, return_inverse=True)
    images = decode(pipe, grids)
    return [mark_masked(images[k], cells) for k, cells in zip(grid_of_step.tolist(), masked.tolist())]


def _save_steps(frames: list[Image.Image], path: Path) -> None:
    """Write pictures of steps as an animation and as one picture: `path` with the suffixes .gif and .png."""
    milliseconds = [max(40, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    make_grid(frames, columns=min(len(frames), 9)).save(path.with_suffix(".png"))


def _grid_columns(num_classes: int, images_per_class: int) -> int:
    if 1 < num_classes <= MAX_ROWS_OF_CLASSES and 1 < images_per_class <= MAX_ROWS_OF_CLASSES:
        return images_per_class
    return math.ceil(math.sqrt(min(num_classes * images_per_class, MAX_IMAGES_IN_GRID)))


def _check_files(folder: Path, names: list[str]) -> None:
    """Raise an error if one of the files to write is a folder."""
    in_the_way = next((name for name in names if (folder / name).is_dir()), None)
    if in_the_way:
        raise OSError(f"Cannot write '{folder / in_the_way}': there is a folder of this name.")


def load_for_sampling(
    model: str, preset: str | None, scheduler: str | None, dtype: str, device: str | None, **given: float | None
) -> tuple[MaskGitPipeline, dict[str, Any]]:
    """A pipeline, and the arguments of its call: those `given` (not None), else the preset's or the model's own."""
    published = None if preset is None else load_preset(preset)
    pipe = load_pipeline(model, scheduler, dtype, device)
    sampling = CALL_DEFAULTS | (pipe.config.call_defaults or {})
    if published is not None:
        chosen = pipe.scheduler
        sampling = apply_preset(pipe, published)
        if scheduler is not None and SCHEDULERS[scheduler] is not type(pipe.scheduler):
            pipe.scheduler = chosen
    sampling |= {name: value for name, value in given.items() if value is not None}
    pipe.check_inputs(
        **sampling,
        batch_size=1,
        grid=(1, 1),
        guidance_interval=(0.0, 1.0),
        generator=[torch.Generator()],
        latents=None,
        output_type="latent",
        callback_on_step_end_tensor_inputs=["latents"],
    )
    return pipe, sampling


def _draw_in_batches(
    pipe: MaskGitPipeline,
    num_images: int,
    batch_size: int,
    seed: int,
    draw: Callable[[int, list[torch.Generator]], list[Image.Image]],
) -> Iterator[tuple[int, list[Image.Image]]]:
    """
    Batches of images as they get ready, with the number of their first one, behind a progress bar: of the steps if it is a
    single batch. `draw` is called with that number and a generator for each image, image i's of the seed `seed` + i.
    """
    in_one_batch = num_images <= batch_size
    pipe.set_progress_bar_config(disable=not in_one_batch, unit="step")
    with tqdm(total=num_images, unit="image", disable=in_one_batch) as progress_bar:
        for start in range(0, num_images, batch_size):
            numbers = range(start, min(start + batch_size, num_images))
            try:
                images = draw(start, [torch.Generator().manual_seed(seed + i) for i in numbers])
            except torch.OutOfMemoryError:
                raise ValueError(f"Out of memory with --batch_size {batch_size}: give a smaller one.") from None
            yield start, images
            progress_bar.update(len(images))


def _write_settings(folder: Path, pipe: MaskGitPipeline, settings: dict[str, Any]) -> None:
    """Write what images were made with to settings.json."""
    scheduler_config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = settings | {
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": scheduler_config,
        "device": str(pipe.device),
        "versions": {"maskgit": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def sample(
    model: str,
    classes: list[int | str] | None,
    images_per_class: int,
    output_dir: str,
    overwrite: bool,
    seed: int,
    num_inference_steps: int | None,
    scheduler: str | None,
    guidance_scale: float | None,
    self_guidance_scale: float | None,
    preset: str | None,
    batch_size: int,
    dtype: str,
    device: str | None,
    save_steps: bool,
) -> None:
    """Generate images of classes (None: all) into a folder."""
    folder = Path(output_dir)
    _check_output_dir(folder, overwrite)
    pipe, sampling = load_for_sampling(
        model,
        preset,
        scheduler,
        dtype,
        device,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        self_guidance_scale=self_guidance_scale,
    )
    class_ids = list(range(pipe.transformer.config.num_classes)) if classes is None else pipe.get_label_ids(classes)
    labels = [class_id for class_id in class_ids for _ in range(images_per_class)]
    stems = _file_stems(pipe, labels)
    files = [f"{stem}.png" for stem in stems] + ["grid.png", "settings.json"]
    files += [f"steps/{stem}.{suffix}" for stem in stems for suffix in ("gif", "png") if save_steps]
    _check_files(folder, files)

    steps = []

    def keep_tokens(pipe, step, timestep, tensors):
        steps.append(tensors["latents"].cpu())
        return {}

    def draw(start: int, generators: list[torch.Generator]) -> list[Image.Image]:
        steps.clear()
        tokens = pipe(
            labels[start : start + len(generators)],
            **sampling,
            generator=generators,
            output_type="latent",
            callback_on_step_end=keep_tokens if save_steps else None,
        ).images
        steps.insert(0, torch.full_like(tokens, pipe.scheduler.config.mask_token_id).cpu())
        return decode(pipe, tokens)

    images = []
    for start, images_of_batch in _draw_in_batches(pipe, len(labels), batch_size, seed, draw):
        (folder / "steps" if save_steps else folder).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images_of_batch):
            image.save(folder / f"{stems[start + i]}.png")
            if save_steps:
                frames = draw_steps(pipe, torch.stack([tokens[i] for tokens in steps]))
                _save_steps(frames, folder / "steps" / stems[start + i])
        images += images_of_batch[: MAX_IMAGES_IN_GRID - len(images)]

    make_grid(images, _grid_columns(len(class_ids), images_per_class)).save(folder / "grid.png")
    settings = {
        "model": model,
        "preset": preset,
        "classes": class_ids,
        "class_names": [pipe.id2label.get(class_id) for class_id in class_ids],
        "images_per_class": images_per_class,
        "seed": seed,
        **sampling,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    _write_settings(folder, pipe, settings)
    print(f"Wrote {len(labels)} images to {folder}, all of them in {folder / 'grid.png'}")


def _open_image(path: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"Cannot read the image '{path}': {getattr(error, 'strerror', None) or error}.") from None


def _box_mask(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A mask of `size` (width, height) that is white in the box (x, y, width, height)."""
    x, y, width, height = box
    if x >= size[0] or y >= size[1]:
        raise ValueError(
            f"The box {x},{y},{width},{height} is outside the image, which has {size[0]} x {size[1]} pixels."
        )
    mask = Image.new("L", size)
    mask.paste(255, (x, y, x + width, y + height))
    return mask


def inpaint(
    model: str,
    image: str,
    mask: str | tuple[int, int, int, int],
    label: int | str,
    num_images: int,
    output_dir: str,
    overwrite: bool,
    seed: int,
    num_inference_steps: int | None,
    scheduler: str | None,
    guidance_scale: float | None,
    self_guidance_scale: float | None,
    preset: str | None,
    batch_size: int,
    dtype: str,
    device: str | None,
    mask_dilation: int,
    no_composite: bool,
) -> None:
    """Paint a part of an image (a mask's file, or a box: x, y, width, height) anew as a class, several times, into a folder."""
    folder = Path(output_dir)
    _check_output_dir(folder, overwrite)
    picture = _open_image(image)
    mask_image = _open_image(mask) if isinstance(mask, str) else _box_mask(mask, picture.size)
    pipe, sampling = load_for_sampling(
        model,
        preset,
        scheduler,
        dtype,
        device,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        self_guidance_scale=self_guidance_scale,
    )
    pipe = MaskGitInpaintPipeline(
        **pipe.components, id2label=pipe.config.id2label, call_defaults=pipe.config.call_defaults
    )
    class_id = pipe.get_label_ids(label)[0]
    original, painted = (tensor.to(pipe.device) for tensor in pipe.prepare_inputs(picture, mask_image, mask_dilation))
    stems = _file_stems(pipe, [class_id] * num_images)
    _check_files(folder, [f"{stem}.png" for stem in stems] + ["grid.png", "settings.json"])
    with torch.no_grad():
        known = pipe.encode_images(original)

    def draw(start: int, generators: list[torch.Generator]) -> list[Image.Image]:
        tokens = pipe(
            picture,
            mask_image,
            class_id,
            **sampling,
            num_images_per_label=len(generators),
            generator=generators,
            latents=known.expand(len(generators), -1, -1),
            output_type="latent",
            mask_dilation=mask_dilation,
        ).images
        if no_composite:
            return decode(pipe, tokens)
        return decode(pipe, tokens, finish=lambda image: pipe.composite(image, original, painted))

    images = []
    for start, images_of_batch in _draw_in_batches(pipe, num_images, batch_size, seed, draw):
        folder.mkdir(parents=True, exist_ok=True)
        for i, result in enumerate(images_of_batch):
            result.save(folder / f"{stems[start + i]}.png")
        images += images_of_batch[: MAX_IMAGES_IN_GRID - len(images)]

    resized = pipe.image_processor.postprocess(original)[0]
    tiles = [resized, mark_masked(resized, painted[0].tolist()), *images]
    make_grid(tiles, columns=min(len(tiles), 8)).save(folder / "grid.png")
    settings = {
        "model": model,
        "preset": preset,
        "image": image,
        "mask": mask,
        "class": class_id,
        "class_name": pipe.id2label.get(class_id),
        "num_images": num_images,
        "seed": seed,
        **sampling,
        "mask_dilation": mask_dilation,
        "composite": not no_composite,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    _write_settings(folder, pipe, settings)
    print(f"Wrote {num_images} images to {folder}, all of them beside the original in {folder / 'grid.png'}")


def app(model: str, dtype: str, device: str | None, host: str, port: int | None) -> None:
    """Serve the web page until it is interrupted."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("The web page needs gradio, which is not installed: pip install gradio") from None
    from .app import build_page

    page = build_page(load_pipeline(model, None, dtype, device), model)
    try:
        page.launch(server_name=host, server_port=port)
    except OSError:
        ports = "a port from 7860 on" if port is None else f"port {port}"
        raise OSError(
            f"Cannot listen on {ports} of {host}: it is in use, or not this machine's. Try another --port."
        ) from None


def _read_for_tokenizer(path: Path, image_size: int | None, factor: int) -> Image.Image:
    """An image as a square of `image_size`, or as it is but for its margins, cut to whole tokens of `factor` pixels."""
    try:
        image = to_rgb(_open_image(str(path)))
    except (OSError, SyntaxError) as error:  # also what is found when the pixels are read
        raise OSError(f"Cannot read the image '{path}': {error}") from None
    if image_size is not None:
        return crop_square(image, image_size)
    width, height = (side // factor * factor for side in image.size)
    if not (width and height):
        raise ValueError(f"The image '{path}' is smaller than a token of {factor} pixels: give --image_size.")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def reconstruct(
    model: str, images_dir: str, output_dir: str, overwrite: bool, image_size: int | None, device: str | None
) -> None:
    """Images of a folder to tokens and back, into another folder."""
    folder = Path(output_dir)
    _check_output_dir(folder, overwrite)
    if not Path(images_dir).is_dir():
        raise OSError(f"There is no folder '{images_dir}' of images.")
    paths = FolderImages(images_dir).paths
    tokenizer = load_tokenizer(model).to(find_device(device))
    factor = 2 ** (len(tokenizer.config.block_out_channels) - 1)
    if image_size is not None and image_size % factor:
        raise ValueError(f"--image_size is {image_size}, but must be a multiple of this tokenizer's {factor} pixels.")
    digits = max(5, len(str(len(paths) - 1)))
    names = [f"{i:0{digits}}_{path.stem}.png" for i, path in enumerate(paths)]
    _check_files(folder, [*names, "grid.png", "psnr.json"])

    ratios, pairs = {}, []
    for path, name in zip(tqdm(paths, unit="image"), names):
        original = _read_for_tokenizer(path, image_size, factor)
        pixels = torch.from_numpy(np.array(original)).permute(2, 0, 1)[None].to(tokenizer.device) / 127.5 - 1
        try:
            decoded = decode_tokens(tokenizer, encode_images(tokenizer, pixels))
        except torch.OutOfMemoryError:
            raise ValueError(f"Out of memory with '{path}', {original.size}: give a smaller --image_size.") from None
        ratios[str(path)] = psnr(pixels, decoded).item()
        reconstruction = Image.fromarray(decoded[0].add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy())
        folder.mkdir(parents=True, exist_ok=True)
        reconstruction.save(folder / name)
        if len(pairs) < MAX_PAIRS_IN_GRID:
            pairs.append((original, reconstruction))

    make_pair_grid(pairs).save(folder / "grid.png")
    average = sum(ratios.values()) / len(ratios)
    report = {"model": model, "image_size": image_size, "average_psnr": average, "psnr": ratios}
    (folder / "psnr.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for path, ratio in sorted(ratios.items(), key=lambda item: item[1])[:MAX_LINES]:
        print(f"{ratio:6.2f} dB  {path}")
    if len(ratios) > MAX_LINES:
        print(f"... and {len(ratios) - MAX_LINES} better ones in {folder / 'psnr.json'}")
    print(
        f"Wrote {len(ratios)} images to {folder}, PSNR {average:.2f} dB on average, side by side in {folder / 'grid.png'}"
    )
