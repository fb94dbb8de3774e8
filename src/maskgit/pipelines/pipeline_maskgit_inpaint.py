# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import difflib
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin


# This file works where it lies alone beside the weights, so it repeats what is marked as copied. A test compares the copies.
# Copied from pipeline_maskgit
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
# Those whose `full_vocabulary` logits are the codes' and then the mask token's.
MASK_LOGIT_TRANSFORMERS = ("MaskGitDiTTransformer2DModel", "MaskGitViTTransformer2DModel")
CALL_DEFAULTS = {
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "self_guidance_scale": 0.0,
    "num_inference_steps": 32,
}


# Copied from pipeline_maskgit
def _is_count(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def box_token_mask(top: int, left: int, height: int, width: int, grid_size: int) -> torch.BoolTensor:
    """
    The tokens that the published code of MaskGIT's class-conditional editing paints for a box. It paints one token more
    before the box; after it, one more only if corner and size are multiples of 16, and the box's last partial token not at
    all if the remainders of both add up to more than 16. Give it as `mask_image` where this matters; to cover a box, paint
    its pixels white.

    Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022, arXiv 2202.04200).

    Args:
        top (`int`): Pixels above the box; an image has 16 * `grid_size` pixels a side.
        left (`int`): Pixels left of the box.
        height (`int`): Pixels from the box's top to its bottom.
        width (`int`): Pixels from the box's left to its right.
        grid_size (`int`): Tokens a side, g.

    Returns:
        `torch.BoolTensor` of shape `(g, g)`.
    """
    rows, columns = (
        slice(max(0, start // 16 - 1), size // 16 + start // 16 + 1) for start, size in ((top, height), (left, width))
    )
    token_mask = torch.zeros(grid_size, grid_size, dtype=torch.bool)
    token_mask[rows, columns] = True
    return token_mask


def blurred_token_mask(token_mask: torch.BoolTensor) -> torch.Tensor:
    """
    The weights w with which that published code blends: `w * painted + (1 - w) * image`. The blur is so wide that they stay
    below 1 where few tokens are painted (at most 0.47 for 2 x 2 of 16 x 16), so `composite=True` uses others.

    Args:
        token_mask (`torch.BoolTensor` of shape `(g, g)`): Such as that of `box_token_mask`.

    Returns:
        `torch.Tensor` of shape `(16 * g, 16 * g)`: float32 in [0, 1], multiples of 1 / 255.
    """
    grid_size = len(token_mask)
    mask = PIL.Image.fromarray(token_mask.cpu().numpy().astype(np.uint8) * 255)
    mask = mask.resize((16 * grid_size, 16 * grid_size), PIL.Image.Resampling.BICUBIC)
    mask = mask.filter(PIL.ImageFilter.GaussianBlur(grid_size - 1))
    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)


def _to_tensors(images: PipelineImageInput, name: str) -> list[torch.Tensor]:
    """Images, or masks, of any allowed kind one by one: float32 (channels, height, width); images in [-1, 1], masks in [0, 1]."""
    is_mask = name == "mask_image"
    tensors = []
    for image in images if isinstance(images, (list, tuple)) else [images]:
        if isinstance(image, PIL.Image.Image):
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"`{name}` is a PIL image of mode {image.mode}: convert it to 8 bits (mode RGB or L)."
                )
            image = np.array(image.convert("L" if is_mask else "RGB"))
        if not isinstance(image, (np.ndarray, torch.Tensor)):
            raise ValueError(
                f"`{name}` is of type {type(image).__name__}, but must be a PIL image, an array, a tensor or a list of these. "
                "`diffusers.utils.load_image` opens a file."
            )
        channel_dim = -1 if isinstance(image, np.ndarray) else -3
        tensor = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
        shape = tuple(tensor.shape)
        if is_mask and tensor.ndim == 3 and shape[channel_dim] in (3, 4):
            raise ValueError(
                f"`{name}` has the shape {shape}, which may be a mask in colour or several masks: give one channel, or several "
                "masks with a channel of their own."
            )
        # Three dimensions are an image, but several masks, if they are not one mask with its channel.
        if tensor.ndim == 2 or (tensor.ndim == 3 and is_mask and shape[channel_dim] != 1):
            tensor = tensor[..., None] if channel_dim == -1 else tensor.unsqueeze(channel_dim)
        if tensor.ndim in (3, 4):
            tensor = tensor.movedim(channel_dim, -3)
        if tensor.ndim not in (3, 4) or tensor.shape[-3] not in ((1,) if is_mask else (1, 3, 4)) or 0 in shape:
            channels = "one channel or none" if is_mask else "1, 3 or 4 channels, or none"
            layout = "(height, width, channels)" if channel_dim == -1 else "(channels, height, width)"
            raise ValueError(
                f"`{name}` has the shape {shape}, but must be {layout} with {channels}, or a batch of such."
            )

        values = tensor.float()
        smallest, largest = values.min().item(), values.max().item()
        is_integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
        if is_integer and not (is_mask and largest <= 1):
            values = values / 255
        if not (values.max() <= 1 and values.min() >= (-1 if tensor.is_floating_point() and not is_mask else 0)):
            floats = "[0, 1]" if is_mask else "[0, 1] or [-1, 1]"
            raise ValueError(
                f"`{name}` has values from {smallest:.4g} to {largest:.4g}, but floats must be in {floats}, and integers "
                "from 0 to 255."
            )
        if not is_mask:
            values = values if values.min() < 0 else 2 * values - 1
            values = values.expand(*values.shape[:-3], 3, -1, -1) if tensor.shape[-3] == 1 else values[..., :3, :, :]
        tensors += values[None] if values.ndim == 3 else values
    if not tensors:
        raise ValueError(f"`{name}` is empty: give at least one.")
    return tensors


class MaskGitInpaintPipeline(DiffusionPipeline):
    """
    Paints a part of an image anew, as a class, with a masked generative transformer: inpainting, outpainting and
    class-conditional editing. The image becomes tokens, those under the mask are masked, and the transformer fills them in
    as it does for a whole image. It loads from the folders of `MaskGitPipeline`; `MaskGitInpaintPipeline.from_pipe(pipe)` shares
    the models of one.

    Args:
        transformer ([`ModelMixin`]): A MaskGIT transformer: tokens and classes in, logits of the codes out.
        vqvae ([`ModelMixin`]): The tokenizer, a [`VQModel`] or of the same interface.
        scheduler ([`SchedulerMixin`]): A `HaltonScheduler`, `ConfidenceScheduler` or `SelfGuidedScheduler`, or diffusers'
            [`AmusedScheduler`].
        toast ([`ModelMixin`], *optional*): A `ToastAdapter` of this transformer, for self-guidance.
        id2label (`dict`, *optional*): Names of the classes by id; synonyms are separated by commas.
        call_defaults (`dict`, *optional*): What `guidance_scale`, `guidance_schedule`, `self_guidance_scale` and
            `num_inference_steps` are when a call leaves them out.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    # Small, and needed between two passes of the transformer, which must not make room for it.
    _exclude_from_cpu_offload = ["toast"]
    _optional_components = ["vqvae", "toast"]
    _callback_tensor_inputs = ["latents"]

    # Copied from pipeline_maskgit.MaskGitPipeline.__init__
    def __init__(
        self,
        transformer: ModelMixin,
        vqvae: ModelMixin,
        scheduler: SchedulerMixin,
        toast: ModelMixin | None = None,
        id2label: dict | None = None,
        call_defaults: dict | None = None,
    ):
        super().__init__()
        unknown = set(call_defaults or {}) - set(CALL_DEFAULTS)
        if unknown:
            raise ValueError(f"Unknown `call_defaults` {sorted(unknown)}: they can be {', '.join(CALL_DEFAULTS)}.")
        self.register_modules(transformer=transformer, vqvae=vqvae, scheduler=scheduler, toast=toast)
        self.register_to_config(id2label=id2label, call_defaults=call_defaults)
        # JSON turns integer keys into strings.
        self.id2label = {int(label): name for label, name in (id2label or {}).items()}
        levels = len(vqvae.config.block_out_channels) if vqvae is not None else 1
        self.vae_scale_factor = 2 ** (levels - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # Copied from pipeline_maskgit.MaskGitPipeline.get_label_ids
    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.LongTensor) -> list[int]:
        """
        Class ids of labels given as ids or names, one or several.

        Names are compared without case; each of a class's comma-separated synonyms is one.
        """
        if hasattr(class_labels, "tolist"):  # torch or numpy, arrays or single numbers
            class_labels = class_labels.flatten().tolist()
        elif not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty: give at least one class.")

        num_classes = self.transformer.config.num_classes
        ids_of_name: dict[str, set[int]] = {}
        for label, names in self.id2label.items():
            for name in {names, *names.split(",")}:
                ids_of_name.setdefault(name.strip().lower(), set()).add(label)

        label_ids = []
        for label in class_labels:
            label = label.tolist() if hasattr(label, "tolist") else label
            if isinstance(label, str):
                ids = ids_of_name.get(label.strip().lower(), set())
                if len(ids) > 1:
                    raise ValueError(
                        f"The class name {label!r} means several classes: give one of the ids {sorted(ids)}."
                    )
                if not ids:
                    near = difflib.get_close_matches(label.strip().lower(), ids_of_name, n=3)
                    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                    if not near and len(self.id2label) <= 20:
                        hint = f" The classes are {', '.join(self.id2label.values())}."
                    if not ids_of_name:
                        hint = " This model has no class names (`id2label`): give class ids."
                    raise ValueError(f"Unknown class name {label!r}.{hint}")
                label = ids.pop()
            elif isinstance(label, bool) or not isinstance(label, int):
                raise ValueError(f"A class label is an id (int) or a name (str), but one is {label!r}.")
            if not 0 <= label < num_classes:
                raise ValueError(f"There is no class {label}: this model's classes are 0 to {num_classes - 1}.")
            label_ids.append(label)
        return label_ids

    # Copied from pipeline_maskgit.MaskGitPipeline.check_inputs
    def check_inputs(
        self,
        batch_size: int,
        grid: tuple[int, int],
        guidance_scale: float,
        guidance_schedule: str,
        guidance_interval: tuple[float, float],
        self_guidance_scale: float,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.LongTensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a ValueError for what cannot be sampled, before any work."""
        codebook_size = self.transformer.config.codebook_size
        if "mask_token_id" not in self.scheduler.config:
            raise ValueError(
                f"{type(self.scheduler).__name__} does not sample masked tokens: use a HaltonScheduler, ConfidenceScheduler, "
                "SelfGuidedScheduler or AmusedScheduler."
            )
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        if (
            self.scheduler.config.get("mask_logit_counts")
            and type(transformer).__name__ not in MASK_LOGIT_TRANSFORMERS
        ):
            raise ValueError(
                f"The scheduler has `mask_logit_counts`, but a {type(transformer).__name__} has no logit of the mask token: "
                "load the scheduler with mask_logit_counts=False."
            )
        if self.scheduler.config.mask_token_id != codebook_size:
            raise ValueError(
                f"The scheduler's mask_token_id is {self.scheduler.config.mask_token_id}, but this transformer's mask "
                f"token is {codebook_size}: load a scheduler with mask_token_id={codebook_size}."
            )
        if not isinstance(guidance_scale, Real) or guidance_scale < 0 or not math.isfinite(guidance_scale):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale!r}, but must be a number of at least 0; 1 is no guidance."
            )
        if guidance_scale != 1 and not self.transformer.config.has_null_class:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this transformer was trained without a 'no class' label, which "
                "classifier-free guidance needs: leave it at 1."
            )
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"`guidance_schedule` is {guidance_schedule!r}, but must be one of {', '.join(GUIDANCE_SCHEDULES)}."
            )
        is_pair = isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2
        if not is_pair or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {guidance_interval}, but must be two fractions of the steps, 0 <= start <= stop <= 1."
            )
        if (
            not isinstance(self_guidance_scale, Real)
            or self_guidance_scale < 0
            or not math.isfinite(self_guidance_scale)
        ):
            raise ValueError(
                f"`self_guidance_scale` is {self_guidance_scale!r}, but must be a number of at least 0; 0 is no "
                "self-guidance."
            )
        if self_guidance_scale > 0:
            self._check_toast()
        if not _is_count(num_inference_steps):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}, but must be an int of at least 1.")
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(g, torch.Generator) for g in generators):
            raise ValueError(f"`generator` is {generator!r}, but must be a torch.Generator or a list of them.")
        if isinstance(generator, list):
            if len(generator) != batch_size:
                raise ValueError(
                    f"`generator` is a list of {len(generator)}, but {batch_size} images are asked for: one each, or a "
                    "single generator for all."
                )
            if not hasattr(self.scheduler, "positions_to_predict"):
                raise ValueError(f"{type(self.scheduler).__name__} takes a single generator, not a list.")
        if latents is not None:
            if not isinstance(latents, torch.Tensor):
                raise ValueError(
                    f"`latents` is of type {type(latents).__name__}, but must be a torch.Tensor of tokens."
                )
            if latents.is_floating_point() or tuple(latents.shape) != (batch_size, *grid):
                raise ValueError(
                    f"`latents` has the shape {tuple(latents.shape)} and type {latents.dtype}, but must be integer tokens "
                    f"of shape {(batch_size, *grid)}."
                )
            if latents.min() < 0 or latents.max() > codebook_size:
                raise ValueError(
                    f"`latents` has tokens from {latents.min()} to {latents.max()}, but they must be in "
                    f"[0, {codebook_size}], where {codebook_size} is a masked token."
                )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be one of pil, np, pt, latent.")
        if output_type != "latent" and self.vqvae is None:
            raise ValueError("This pipeline has no `vqvae` to decode with: ask for output_type='latent'.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but can only have "
                f"{self._callback_tensor_inputs}."
            )

    # Copied from pipeline_maskgit.MaskGitPipeline._check_toast
    def _check_toast(self) -> None:
        """Raise a ValueError if there can be no self-guidance: no adapter, or one of another transformer."""
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        if "top_down_features" not in inspect.signature(type(transformer).forward).parameters:
            raise ValueError(
                f"`self_guidance_scale` must be 0: a {type(transformer).__name__} cannot guide itself, as it has no pass "
                "over a blank canvas."
            )
        if self.toast is None:
            raise ValueError(
                "`self_guidance_scale` needs a `toast` adapter, and this pipeline has none: train one for its transformer "
                "with train_toast.py, or leave the scale at 0."
            )
        # A BERT-style transformer has its mask token to hide the class with.
        if (
            self.toast.config.use_blank_second
            and not transformer.config.has_null_class
            and type(transformer).__name__ != "MaskGitBertTransformer2DModel"
        ):
            raise ValueError(
                f"`self_guidance_scale` must be 0: this {type(transformer).__name__} was trained without a 'no class' label, "
                "which the adapter's pass over a blank canvas needs."
            )
        for name in ("hidden_size", "num_layers", "num_classes"):
            if self.toast.config[name] != transformer.config[name]:
                raise ValueError(
                    f"The `toast` adapter is of another transformer: its {name} is {self.toast.config[name]}, this one's is "
                    f"{transformer.config[name]}."
                )

    # Copied from pipeline_maskgit.MaskGitPipeline._guidance_strengths
    def _guidance_strengths(
        self, schedule: str, interval: tuple[float, float], num_inference_steps: int
    ) -> list[float]:
        """Share of the guidance in each step: 0 outside the interval, inside 1, or growing from the first step to the last."""
        strengths = []
        for i in range(num_inference_steps):
            progress = i / (num_inference_steps - 1) if num_inference_steps > 1 else 1.0
            growth = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[schedule]
            inside = int(interval[0] * num_inference_steps) <= i < int(interval[1] * num_inference_steps)
            strengths.append(growth if inside else 0.0)
        return strengths

    # Copied from pipeline_maskgit.MaskGitPipeline._positions_to_predict
    def _positions_to_predict(
        self, timestep: torch.Tensor, latents: torch.LongTensor, generator
    ) -> torch.LongTensor | None:
        """The flat positions (B, M) whose logits the scheduler's next step needs, None for all."""
        if not hasattr(self.scheduler, "positions_to_predict"):
            return None  # diffusers' AmusedScheduler
        positions = self.scheduler.positions_to_predict(timestep, latents, generator=generator)
        if positions is None:
            # The step depends on the logits, which are needed where tokens are masked; rows are filled up with known ones.
            masked = latents.flatten(1) == self.scheduler.config.mask_token_id
            positions = masked.int().argsort(dim=-1, descending=True, stable=True)[:, : int(masked.sum(-1).max())]
        return positions

    # Copied from pipeline_maskgit.MaskGitPipeline._predict
    def _predict(
        self,
        latents: torch.LongTensor,
        class_labels: torch.LongTensor,
        positions: torch.LongTensor | None,
        guidance_scale: float,
        self_guidance_scale: float,
    ) -> torch.Tensor:
        """
        Logits (B, M or N, K) in float32. With guidance they are of one doubled batch; with self-guidance there is a second
        pass. Each adds its own difference to the plain logits, as diffusers combines guidance by perturbed attention with
        that by classes: plain + (guidance_scale - 1) * (plain - unconditional) + self_guidance_scale * (plain - refined).
        """
        batch, asked = (latents, class_labels), positions
        if guidance_scale != 1:
            null_labels = torch.full_like(class_labels, self.transformer.config.num_classes)
            batch = (torch.cat([latents, latents]), torch.cat([class_labels, null_labels]))
            asked = None if positions is None else torch.cat([positions, positions])
        extra = {"full_vocabulary": True} if self.scheduler.config.get("mask_logit_counts") else {}
        hidden = {"output_hidden_states": True} if self_guidance_scale > 0 else {}
        output = self.transformer(*batch, positions=asked, return_dict=False, **extra, **hidden)
        logits = plain = output[0][: len(latents)].float()
        if guidance_scale != 1:
            unconditional = output[0][len(latents) :].float()
            logits = unconditional + guidance_scale * (plain - unconditional)
        if self_guidance_scale > 0:
            features = self.toast(output[1][: len(latents)], class_labels)
            if self.toast.config.use_blank_second:
                latents, class_labels = torch.full_like(latents, self.scheduler.config.mask_token_id), None
            refined = self.transformer(
                latents, class_labels, positions=positions, top_down_features=features, return_dict=False, **extra
            )[0]
            logits = logits + self_guidance_scale * (plain - refined.float())
        return logits

    def prepare_inputs(
        self, image: PipelineImageInput, mask_image: PipelineImageInput, mask_dilation: int = 0
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        Images of the model's size, and which of their tokens are painted, of any input that a call takes.

        Returns:
            `torch.Tensor` of shape `(number of images, 3, height, width)` in [-1, 1], and `torch.BoolTensor` of shape
            `(number of masks, grid height, grid width)`.
        """
        if isinstance(mask_dilation, bool) or not isinstance(mask_dilation, Integral) or mask_dilation < 0:
            raise ValueError(f"`mask_dilation` is {mask_dilation!r}, but must be an int of at least 0.")
        images, masks = _to_tensors(image, "image"), _to_tensors(mask_image, "mask_image")
        sample_size = self.transformer.config.sample_size
        grid = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        for i in range(max(len(images), len(masks))):
            image_size, mask_size = (tuple(several[i % len(several)].shape[-2:]) for several in (images, masks))
            if mask_size not in (image_size, grid):
                raise ValueError(
                    f"`mask_image` is {mask_size[0]} x {mask_size[1]} (height x width), but must be of the image's size, "
                    f"{image_size[0]} x {image_size[1]}, or hold one value for each of the {grid[0]} x {grid[1]} tokens."
                )

        size = tuple(side * self.vae_scale_factor for side in grid)
        images = [
            image[None]
            if image.shape[-2:] == size
            else F.interpolate(image[None], size, mode="bicubic", antialias=True).clamp(-1, 1)
            for image in images
        ]
        # Pooled from their own size: a line that is thinner than a pixel of the model's size still counts.
        masks = [F.adaptive_max_pool2d((mask >= 0.5).float()[None], grid) for mask in masks]
        masks = F.max_pool2d(torch.cat(masks), 2 * mask_dilation + 1, stride=1, padding=mask_dilation)
        return torch.cat(images), masks[:, 0] > 0

    def encode_images(self, images: torch.Tensor) -> torch.LongTensor:
        """Tokens (B, height, width) of images (B, 3, H, W) in [-1, 1]."""
        # In float32 whatever the precision: a lookup in half precision finds other codes, or is not implemented.
        dtype = self.vqvae.dtype
        torch.nn.Module.to(self.vqvae, torch.float32)
        try:
            latents = self.vqvae.encode(images.to(self._execution_device, torch.float32)).latents
            tokens = self.vqvae.quantize(latents)[2][2]
        finally:
            torch.nn.Module.to(self.vqvae, dtype)
        return tokens.view(len(latents), *latents.shape[-2:])

    def composite(self, images: torch.Tensor, originals: torch.Tensor, token_mask: torch.BoolTensor) -> torch.Tensor:
        """
        Painted images where tokens are painted, and the original pixels elsewhere. Around each painted cell the one fades into
        the other over the width of a cell: what the tokenizer makes of known tokens is close to the original there.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): The painted images.
            originals (`torch.Tensor` of shape `(B, 3, H, W)`): The images that were given.
            token_mask (`torch.BoolTensor` of shape `(B, height, width)`): True for the tokens that were painted.
        """
        cell = self.vae_scale_factor
        weights = token_mask[:, None].float().repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        # Grown by half a cell, and smoothed over as much to both sides: still 1 in the painted cells.
        radius = cell // 2
        weights = F.max_pool2d(weights, 2 * radius + 1, stride=1, padding=radius)
        weights = F.avg_pool2d(weights, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
        return weights * images.float() + (1 - weights) * originals

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        class_labels: int | str | list[int | str] | torch.LongTensor,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        self_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.LongTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        mask_dilation: int = 0,
        composite: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Paint the masked part of images anew.

        `image`, `mask_image` and `class_labels` are as many as each other, or one for all: the n-th image is painted under the
        n-th mask as the n-th class.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): The images to paint on. Arrays are of
                shape `(H, W)`, `(H, W, channels)` or `(B, H, W, channels)`, tensors `(H, W)`, `(channels, H, W)` or
                `(B, channels, H, W)`; integers are from 0 to 255, floats in [0, 1], or in [-1, 1] if any is negative. Grey
                images are taken as coloured, and transparency is ignored. Images of another size are resized to the
                model's, whatever their proportions.
            mask_image (as `image`, with one channel): White, or True, where to paint; greys count as the nearer of black and white. Each mask
                has the size of its image, or one value for each token. A token is painted if any pixel of its cell is.
            class_labels (`int`, `str`, a list of them, or `torch.LongTensor`): Class ids or names of what to paint.
            guidance_scale (`float`, *optional*): Classifier-free guidance; 1 is off. The papers' w is `guidance_scale - 1`.
                Defaults to the checkpoint's own (`call_defaults`), else 1.
            guidance_schedule (`str`, *optional*): "constant", or "linear" or "cosine" for a w (and a self-guidance) that
                grows from 0 at the first step. Defaults to the checkpoint's own, else "constant".
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Fractions of the steps between which there
                is guidance (and self-guidance). Elsewhere, and where a scale is off, what it needs is not computed.
            self_guidance_scale (`float`, *optional*): Guidance by the `toast` adapter: with s, the logits are
                `refined + (1 + s) * (plain - refined)`. 0 is off; the published value is 1. It adds to `guidance_scale`.
                Defaults to the checkpoint's own, else 0.
            num_inference_steps (`int`, *optional*): Number of steps, which share the masked tokens. Defaults to the
                checkpoint's own, else 32.
            num_images_per_label (`int`, defaults to 1): Results for each image; those of an image follow each other.
            generator (`torch.Generator` or a list of them, one a result, *optional*): Source of the random numbers. With a
                list, a result does not depend on the batch that it is in.
            latents (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*): The images' tokens, where they
                are known, so that they are not encoded. Mask tokens (`codebook_size`) among them are painted too.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt", or "latent" for tokens.
            return_dict (`bool`, defaults to `True`): Whether to return an [`ImagePipelineOutput`], else a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each step as `callback(pipe, step, timestep, kwargs)`;
                what it returns under "latents" goes on.
            callback_on_step_end_tensor_inputs (`list[str]`): Which tensors `kwargs` holds: "latents" or none.
            mask_dilation (`int`, defaults to 0): Cells by which the painted part grows to all sides, for example to take in
                an object's shadow.
            composite (`bool`, defaults to `True`): Whether to put the original pixels back outside the painted part, with a
                soft edge. Otherwise the whole result comes from the tokenizer, which changes the rest a little.

        Returns:
            [`ImagePipelineOutput`] with `images`, of the model's size: a list of PIL images, an array (B, H, W, 3) or a
            tensor (B, 3, H, W) in [0, 1], or tokens, long (B, height, width).
        """
        defaults = CALL_DEFAULTS | (self.config.call_defaults or {})
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        guidance_schedule = defaults["guidance_schedule"] if guidance_schedule is None else guidance_schedule
        if self_guidance_scale is None:
            self_guidance_scale = defaults["self_guidance_scale"]
        num_inference_steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        if not _is_count(num_images_per_label):
            raise ValueError(f"`num_images_per_label` is {num_images_per_label!r}, but must be an int of at least 1.")
        label_ids = self.get_label_ids(class_labels)
        originals, token_mask = self.prepare_inputs(image, mask_image, mask_dilation)
        counts = [len(originals), len(token_mask), len(label_ids)]
        if not set(counts) <= {1, max(counts)}:
            raise ValueError(
                "`image`, `mask_image` and `class_labels` are {}, {} and {}, but must be as many as each other, or one "
                "for all.".format(*counts)
            )
        batch_size = max(counts) * num_images_per_label
        grid = tuple(token_mask.shape[1:])
        self.check_inputs(
            batch_size,
            grid,
            guidance_scale,
            guidance_schedule,
            guidance_interval,
            self_guidance_scale,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if latents is None and self.vqvae is None:
            raise ValueError("This pipeline has no `vqvae` to encode with: give the image's tokens as `latents`.")

        device = self._execution_device

        def repeat(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(device).expand(max(counts), *tensor.shape[1:])
            return tensor.repeat_interleave(num_images_per_label, dim=0)

        mask_token_id = self.scheduler.config.mask_token_id
        token_mask = repeat(token_mask)
        if latents is not None:
            latents = latents.to(device, torch.long)
            token_mask = token_mask | (latents == mask_token_id)
        is_empty = ~token_mask.flatten(1).any(-1)
        if is_empty.any():
            which = int(is_empty.int().argmax()) // num_images_per_label
            raise ValueError(
                f"There is nothing to paint in image {which}: its mask is black, and white is what is painted."
            )
        labels = repeat(torch.tensor(label_ids))
        if latents is None:
            latents = repeat(self.encode_images(originals))
        latents = latents.masked_fill(token_mask, mask_token_id)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        strengths = self._guidance_strengths(guidance_schedule, guidance_interval, num_inference_steps)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                positions = self._positions_to_predict(timestep, latents, generator)
                scales = (1 + (guidance_scale - 1) * strengths[i], self_guidance_scale * strengths[i])
                if positions is None:
                    logits = self._predict(latents, labels, None, *scales).movedim(-1, 1).unflatten(-1, grid)
                    latents = self.scheduler.step(
                        logits,
                        timestep,
                        latents,
                        starting_mask_ratio=token_mask.float().mean(),
                        generator=generator,
                    ).prev_sample
                else:
                    if positions.shape[1] > 0:
                        logits = self._predict(latents, labels, positions, *scales)
                    else:
                        # Nothing is left for the transformer to do. The scheduler steps all the same: a step must take
                        # the same random numbers in every batch.
                        logits = torch.empty(batch_size, 0, self.transformer.config.codebook_size, device=device)
                    step = self.scheduler.step(logits, timestep, latents, positions=positions, generator=generator)
                    latents = step.prev_sample

                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, i, timestep, tensors).pop("latents", latents)
                progress_bar.update()

        images = latents
        if output_type != "latent":
            images = self.decode_latents(latents)
            if composite:
                images = self.composite(images, repeat(originals), token_mask)
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    # Copied from pipeline_maskgit.MaskGitPipeline.decode_latents
    def decode_latents(self, latents: torch.LongTensor) -> torch.Tensor:
        """Images in [-1, 1], not clipped, (B, 3, H, W), of tokens (B, height, width)."""
        shape = (*latents.shape, self.vqvae.quantize.vq_embed_dim)
        return self.vqvae.decode(latents, force_not_quantize=True, shape=shape).sample

    # Copied from pipeline_maskgit.MaskGitPipeline.from_pipe
    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        # diffusers hands over models of exactly the annotated type, and what is annotated here is their base class.
        names, _ = cls._get_signature_keys(cls)
        components = {name: component for name, component in pipeline.components.items() if name in names}
        return super().from_pipe(pipeline, **components | kwargs)

    # The rest makes a saved folder load anywhere, as for `MaskGitPipeline`: with the installed classes, or where this package is
    # not installed, with the source files that lie beside the weights.

    # Copied from pipeline_maskgit.MaskGitPipeline.save_config
    def save_config(self, save_directory, **kwargs):
        super().save_config(save_directory, **kwargs)
        root = Path(save_directory)
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)
        owned = {"": type(self)}
        for name, component in self.components.items():
            if component is None:
                continue
            # A component that was loaded from a folder remembers where: nobody else's business.
            config_path = root / name / component.config_name
            config = json.loads(config_path.read_text())
            if config.pop("_name_or_path", None) is not None:
                config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            cls = getattr(component, "_orig_mod", component).__class__
            if not cls.__module__.startswith(("diffusers.", "transformers.")):
                owned[name] = cls
        for name, cls in owned.items():
            source = Path(inspect.getsourcefile(cls))
            # All the schedulers travel, so that users can switch.
            sources = source.parent.glob("scheduling_*.py") if name == "scheduler" else [source]
            for path in sources:
                if path.resolve() != (root / name / path.name).resolve():
                    shutil.copyfile(path, root / name / path.name)
            index[name or "_class_name"] = [source.stem, cls.__name__]
        (root / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    # Copied from pipeline_maskgit.MaskGitPipeline._dict_from_json_file
    @classmethod
    def _dict_from_json_file(cls, json_file):
        index = super()._dict_from_json_file(json_file)
        if __name__.startswith("maskgit.") and isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index

    # Copied from pipeline_maskgit.MaskGitPipeline.load_config
    @classmethod
    def load_config(cls, *args, **kwargs):
        config = super().load_config(*args, **kwargs)
        if __name__.startswith("maskgit."):
            package = sys.modules["maskgit"]
            for name, value in config.items():
                if isinstance(value, list) and len(value) == 2 and hasattr(package, value[1] or ""):
                    config[name] = [getattr(package, value[1]).__module__, value[1]]
        return config
