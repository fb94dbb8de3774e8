# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""The web page of `maskgit app`: sample classes, watch the steps, and paint on images."""

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from .commands import decode, draw_steps
from .images import enlarge
from .loading import SCHEDULERS
from .pipelines import MaskGitInpaintPipeline, MaskGitPipeline
from .pipelines.pipeline_maskgit import CALL_DEFAULTS


MAX_STEPS = 64
MAX_IMAGES = 16
EDITOR_SIDE = 320  # pixels that a side has at least in the editor, to be drawn on


@contextlib.contextmanager
def _errors_on_the_page() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def drawn_mask(drawing: dict[str, Any]) -> Image.Image:
    """The mask that was drawn in a `gr.ImageEditor`: white where any of its layers was drawn on, in whatever colour."""
    alphas = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in drawing["layers"]]
    if not alphas:
        return Image.new("L", drawing["background"].size)
    return Image.fromarray(np.where(np.max(alphas, axis=0) > 0, 255, 0).astype(np.uint8))


def for_the_editor(image: Image.Image) -> Image.Image:
    """`image`, enlarged if it is too small to be drawn on."""
    factor = max(1, EDITOR_SIDE // min(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


class Painter:
    """What the buttons of the page do, with one pipeline."""

    def __init__(self, pipe: MaskGitPipeline):
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        # The model's own scheduler with its settings, the others with their defaults.
        mask_token_id = pipe.scheduler.config.mask_token_id
        self.schedulers = {name: cls(mask_token_id=mask_token_id) for name, cls in SCHEDULERS.items()}
        self.own_scheduler = next((name for name, cls in SCHEDULERS.items() if type(pipe.scheduler) is cls), "own")
        self.schedulers[self.own_scheduler] = pipe.scheduler

    def sample(
        self,
        label: int,
        scheduler: str,
        num_steps: float,
        guidance_scale: float,
        self_guidance_scale: float,
        num_images: float,
        seed: float,
    ) -> tuple[list[Image.Image], list[tuple[Image.Image, str]]]:
        """Images of a class, and the first of them before the first step and after each."""
        self.pipe.scheduler = self.schedulers[scheduler]
        mask_token_id = self.pipe.scheduler.config.mask_token_id
        steps = []

        def keep_tokens(pipe, step, timestep, tensors):
            steps.append(tensors["latents"][0].cpu())
            return {}

        with _errors_on_the_page():
            tokens = self.pipe(
                label,
                **self._arguments(num_steps, guidance_scale, self_guidance_scale, num_images, seed),
                output_type="latent",
                callback_on_step_end=keep_tokens,
            ).images
        frames = draw_steps(self.pipe, torch.stack([torch.full_like(steps[0], mask_token_id), *steps]))
        images = [enlarge(image) for image in decode(self.pipe, tokens)]
        return images, [(frame, f"{i}") for i, frame in enumerate(frames)]

    def inpaint(
        self,
        drawing: dict[str, Any],
        mask_dilation: float,
        composite: bool,
        label: int,
        scheduler: str,
        num_steps: float,
        guidance_scale: float,
        self_guidance_scale: float,
        num_images: float,
        seed: float,
    ) -> list[Image.Image]:
        """The drawn part of an image painted anew as a class."""
        with _errors_on_the_page():
            if drawing["background"] is None:
                raise ValueError("There is no image to paint on: upload one, or click one that you sampled.")
            mask = drawn_mask(drawing)
            if mask.getbbox() is None:
                raise ValueError("Nothing is drawn: draw over what is to be painted.")
            pipe = MaskGitInpaintPipeline(
                **self.pipe.components | {"scheduler": self.schedulers[scheduler]},
                id2label=self.pipe.config.id2label,
                call_defaults=self.pipe.config.call_defaults,
            )
            pipe.set_progress_bar_config(disable=True)
            images = pipe(
                drawing["background"],
                mask,
                label,
                **self._arguments(num_steps, guidance_scale, self_guidance_scale, num_images, seed),
                mask_dilation=int(mask_dilation),
                composite=composite,
            ).images
        return [enlarge(image) for image in images]

    def _arguments(
        self, num_steps: float, guidance_scale: float, self_guidance_scale: float, num_images: float, seed: float
    ) -> dict[str, Any]:
        return {
            "num_inference_steps": int(num_steps),
            "guidance_scale": guidance_scale,
            "self_guidance_scale": self_guidance_scale,
            "num_images_per_label": int(num_images),
            "generator": [torch.Generator().manual_seed(int(seed) + i) for i in range(int(num_images))],
        }


def build_page(pipe: MaskGitPipeline, name: str) -> gr.Blocks:
    """
    The page, to be launched.

    Args:
        pipe (`MaskGitPipeline`): What it samples with.
        name (`str`): What the page calls the model.
    """
    painter = Painter(pipe)
    defaults = CALL_DEFAULTS | (pipe.config.call_defaults or {})
    num_classes = pipe.transformer.config.num_classes
    classes = [(f"{i}: {pipe.id2label[i]}" if i in pipe.id2label else f"{i}", i) for i in range(num_classes)]
    has_null_class, has_toast = pipe.transformer.config.has_null_class, pipe.toast is not None

    with gr.Blocks(title="maskgit", analytics_enabled=False) as page:
        gr.Markdown(f"# maskgit\n{name}: {num_classes} classes")
        with gr.Row():
            label = gr.Dropdown(classes, value=0, label="Class")
            scheduler = gr.Radio(list(painter.schedulers), value=painter.own_scheduler, label="Scheduler")
        with gr.Row():
            num_steps = gr.Slider(1, MAX_STEPS, defaults["num_inference_steps"], step=1, label="Steps")
            guidance_scale = gr.Slider(
                1, 10, defaults["guidance_scale"], step=0.1, label="Guidance (1: off)", visible=has_null_class
            )
            self_guidance_scale = gr.Slider(
                0, 4, defaults["self_guidance_scale"], step=0.1, label="Self-guidance (0: off)", visible=has_toast
            )
            num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        settings = [label, scheduler, num_steps, guidance_scale, self_guidance_scale, num_images, seed]
        # One model, and schedulers that count steps: one request at a time.
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}

        with gr.Tab("Sample"):
            sample = gr.Button("Sample", variant="primary")
            samples = gr.Gallery(label="Images", columns=8, format="png", type="pil", interactive=False)
            steps = gr.Gallery(label="The first image after each step", columns=8, format="png", interactive=False)
        sample.click(painter.sample, settings, [samples, steps], api_name="sample", **one_at_a_time)

        with gr.Tab("Inpaint"):
            gr.Markdown(
                "Upload an image, or click one that you sampled, and draw over what is to be painted as the class."
            )
            with gr.Row():
                editor = gr.ImageEditor(
                    type="pil",
                    label="Image and mask",
                    sources=("upload", "clipboard"),
                    transforms=("crop",),
                    brush=gr.Brush(default_size=40, colors=["#ffffff"], color_mode="fixed"),
                )
                painted = gr.Gallery(label="Painted", columns=4, format="png", interactive=False)
            with gr.Row():
                mask_dilation = gr.Slider(0, 4, 0, step=1, label="Grow the mask by cells")
                composite = gr.Checkbox(True, label="Put the original back outside the mask")
            paint = gr.Button("Paint", variant="primary")
        paint.click(
            painter.inpaint,
            [editor, mask_dilation, composite, *settings],
            painted,
            api_name="inpaint",
            **one_at_a_time,
        )

        def take(images: list[tuple[Image.Image, str | None]], event: gr.SelectData) -> Image.Image:
            return for_the_editor(images[event.index][0])

        samples.select(take, samples, editor, api_visibility="private")
    return page
