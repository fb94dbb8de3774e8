# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""What the commands of `maskgit` do; their options are in maskgit_cli.py."""

import json
import math
import os
import re
from pathlib import Path

import diffusers
import torch
from PIL import Image
from tqdm.auto import tqdm

from . import __version__
from .images import make_grid, mark_masked
from .loading import SCHEDULERS, load_pipeline
from .pipelines import MaskGitPipeline
from .pipelines.pipeline_maskgit import CALL_DEFAULTS
from .presets import apply_preset, load_preset


MAX_IMAGES_IN_GRID = 1000
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
def _decode(pipe: MaskGitPipeline, grids: torch.LongTensor) -> list[Image.Image]:
    """Images of token grids (N, height, width), one at a time: how a batch is rounded depends on its size."""
    images = [pipe.decode_latents(grid[None].to(pipe.device)) for grid in grids]
    return [pipe.image_processor.postprocess(image, output_type="pil")[0] for image in images]


def _save_steps(pipe: MaskGitPipeline, steps: torch.LongTensor, path: Path) -> None:
    """
    Write how an image came about, as an animation and as a picture of all steps.

    Args:
        steps (`torch.LongTensor` of shape `(steps, height, width)`): Its tokens after each step.
        path (`Path`): The files to write, without suffix.
    """
    mask_token_id = pipe.scheduler.config.mask_token_id
    steps = torch.cat([torch.full_like(steps[:1], mask_token_id), steps])
    masked = steps == mask_token_id
    # Under the cover are the tokens to come, so that the visible cells look as they will: one grid for all steps, if no
    # token is ever drawn again.
    grids, grid_of_step = torch.where(masked, steps[-1], steps).unique(dim=0, return_inverse=True)
    images = _decode(pipe, grids)
    frames = [mark_masked(images[k], cells) for k, cells in zip(grid_of_step.tolist(), masked.tolist())]
    milliseconds = [max(40, 3000 // len(frames))] * (len(frames) - 1) + [2000]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    make_grid(frames, columns=min(len(frames), 9)).save(path.with_suffix(".png"))


def _grid_columns(num_classes: int, images_per_class: int) -> int:
    if 1 < num_classes <= MAX_ROWS_OF_CLASSES and 1 < images_per_class <= MAX_ROWS_OF_CLASSES:
        return images_per_class
    return math.ceil(math.sqrt(min(num_classes * images_per_class, MAX_IMAGES_IN_GRID)))


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
    published = None if preset is None else load_preset(preset)
    pipe = load_pipeline(model, scheduler, dtype, device)
    class_ids = list(range(pipe.transformer.config.num_classes)) if classes is None else pipe.get_label_ids(classes)
    labels = [class_id for class_id in class_ids for _ in range(images_per_class)]
    stems = _file_stems(pipe, labels)
    files = [f"{stem}.png" for stem in stems] + ["grid.png", "settings.json"]
    files += [f"steps/{stem}.{suffix}" for stem in stems for suffix in ("gif", "png") if save_steps]
    in_the_way = next((name for name in files if (folder / name).is_dir()), None)
    if in_the_way:
        raise OSError(f"Cannot write '{folder / in_the_way}': there is a folder of this name.")

    sampling = CALL_DEFAULTS | (pipe.config.call_defaults or {})
    if published is not None:
        chosen = pipe.scheduler
        sampling = apply_preset(pipe, published)
        if scheduler is not None and SCHEDULERS[scheduler] is not type(pipe.scheduler):
            pipe.scheduler = chosen
    given = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "self_guidance_scale": self_guidance_scale,
    }
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

    steps = []

    def keep_tokens(pipe, step, timestep, tensors):
        steps.append(tensors["latents"].cpu())
        return {}

    images = []
    in_one_batch = len(labels) <= batch_size
    pipe.set_progress_bar_config(disable=not in_one_batch, unit="step")
    with tqdm(total=len(labels), unit="image", disable=in_one_batch) as progress_bar:
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            steps.clear()
            try:
                output = pipe(
                    batch,
                    **sampling,
                    generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
                    output_type="latent",
                    callback_on_step_end=keep_tokens if save_steps else None,
                )
                images_of_batch = _decode(pipe, output.images)
            except torch.OutOfMemoryError:
                raise ValueError(f"Out of memory with --batch_size {batch_size}: give a smaller one.") from None
            (folder / "steps" if save_steps else folder).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images_of_batch):
                image.save(folder / f"{stems[start + i]}.png")
                if save_steps:
                    _save_steps(
                        pipe, torch.stack([tokens[i] for tokens in steps]), folder / "steps" / stems[start + i]
                    )
            images += images_of_batch[: MAX_IMAGES_IN_GRID - len(images)]
            progress_bar.update(len(batch))

    make_grid(images, _grid_columns(len(class_ids), images_per_class)).save(folder / "grid.png")
    scheduler_config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = {
        "model": model,
        "preset": preset,
        "classes": class_ids,
        "class_names": [pipe.id2label.get(class_id) for class_id in class_ids],
        "images_per_class": images_per_class,
        "seed": seed,
        **sampling,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": scheduler_config,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": str(pipe.device),
        "versions": {"maskgit": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {len(labels)} images to {folder}, all of them in {folder / 'grid.png'}")
