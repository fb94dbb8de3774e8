# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Images to tokens and back, with any tokenizer that has the interface of `diffusers.VQModel`: the one place where this is done."""

import hashlib

import torch
from diffusers import ModelMixin, VQModel

from .loading import resolve_builtin
from .models import MaskGitVQModel


TOKENIZERS = {"VQModel": VQModel, "MaskGitVQModel": MaskGitVQModel}


def load_tokenizer(name_or_path: str) -> ModelMixin:
    """
    Loads a tokenizer in float32 and evaluation mode.

    Args:
        name_or_path (`str`):
            A folder or Hub id holding either the tokenizer itself or a pipeline with the tokenizer in `vqvae/`; or builtin, builtin-NAME.
    """
    name_or_path = resolve_builtin(name_or_path)
    for subfolder in ("vqvae", None):
        try:
            config = VQModel.load_config(name_or_path, subfolder=subfolder)
            break
        except OSError as error:
            if subfolder is None:
                raise ValueError(
                    f"found no tokenizer in {name_or_path!r}: expected the folder or Hub id of a tokenizer (config.json) "
                    f"or of a pipeline (vqvae/config.json). {str(error).splitlines()[0]}"
                ) from None
    tokenizer_class = TOKENIZERS.get(config.get("_class_name"))
    if tokenizer_class is None:
        raise ValueError(
            f"{name_or_path!r} holds a {config.get('_class_name')}, not a tokenizer ({' or '.join(TOKENIZERS)})."
        )
    return tokenizer_class.from_pretrained(name_or_path, subfolder=subfolder).float().eval()


def tokenizer_checksum(tokenizer: ModelMixin) -> str:
    """SHA-256 of a tokenizer's weights in float32: tokens are of use only with the weights that they were made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_images(tokenizer: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """
    Images to tokens, always in float32: in half precision close calls between codes fall the other way.

    Args:
        tokenizer (`ModelMixin`): a `VQModel` or a model with its interface, in float32.
        images (`torch.Tensor`): float (batch, 3, height, width) in [-1, 1].

    Returns:
        `torch.Tensor`: long (batch, grid height, grid width), values 0..codebook_size-1.
    """
    if tokenizer.dtype != torch.float32:
        raise ValueError(
            f"the tokenizer is in {tokenizer.dtype}, encoding needs float32: call tokenizer.float() first."
        )
    with torch.autocast(images.device.type, enabled=False):
        latents = tokenizer.encode(images.float()).latents
        indices = tokenizer.quantize(latents)[2][2]
    return indices.view(latents.shape[0], *latents.shape[-2:])


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, float (batch,), of both (batch, 3, height, width) in [-1, 1], as bytes."""
    errors = (
        (images.add(1).mul(127.5).round() - reconstructions.add(1).mul(127.5).round()).square().mean(dim=(1, 2, 3))
    )
    return 10 * torch.log10(255**2 / errors.clamp(min=1e-3))  # at most 78 dB, for equal images


@torch.no_grad()
def decode_tokens(tokenizer: ModelMixin, tokens: torch.Tensor) -> torch.Tensor:
    """
    Tokens to images, in the tokenizer's own precision.

    Args:
        tokenizer (`ModelMixin`): a `VQModel` with `lookup_from_codebook=True`, or a model with its interface.
        tokens (`torch.Tensor`): long (batch, grid height, grid width), values 0..codebook_size-1.

    Returns:
        `torch.Tensor`: float32 (batch, 3, height, width), clamped to [-1, 1].
    """
    shape = (*tokens.shape, tokenizer.quantize.vq_embed_dim)
    images = tokenizer.decode(tokens, force_not_quantize=True, shape=shape).sample
    return images.float().clamp(-1, 1)
