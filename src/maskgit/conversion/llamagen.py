# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers of LlamaGen (Sun et al., arXiv 2406.06525; github.com/FoundationVision/LlamaGen), as `diffusers.VQModel`."""

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .cards import Card
from .checkpoints import Converted
from .vqgan import Names, convert_vqgan


NAMES = Names(
    encoder_levels="encoder.conv_blocks",
    decoder_levels="decoder.conv_blocks",
    decoder_from_image=False,
    residual="res",
    middle=("0", "1", "2"),
)


def convert_llamagen_tokenizer(weights: Mapping[str, torch.Tensor]) -> Converted:
    """
    The published tokenizer, of any number of levels, as a `diffusers.VQModel`: the same codes and images.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `model` (or `ema`). Its statistic of used codes is dropped.
    """
    dropped = [name for name in ("quantize.codebook_used",) if name in weights]
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}
    # LlamaGen divides codes and latents by their length whenever it compares them, and decodes the codes of length 1. Of
    # codes of the same length the nearest is that of the largest inner product, whatever the latent's length.
    converted = convert_vqgan(
        weights, NAMES, "LlamaGen tokenizer", change_codes=lambda codes: F.normalize(codes, dim=-1)
    )
    return dataclasses.replace(converted, dropped=dropped)


CITATION = """\
@article{sun2024autoregressive,
  title   = {Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation},
  author  = {Sun, Peize and Jiang, Yi and Chen, Shoufa and Zhang, Shilong and Peng, Bingyue and Luo, Ping and Yuan, Zehuan},
  journal = {arXiv preprint arXiv:2406.06525},
  year    = {2024}
}
"""


def describe_tokenizer(config: Mapping) -> Card:
    """The model card's part about a converted tokenizer."""
    return Card(
        title="LlamaGen tokenizer",
        summary="The tokenizer between images and codes is in the format of "
        "[LlamaGen](https://github.com/FoundationVision/LlamaGen) ([paper](https://arxiv.org/abs/2406.06525)), "
        "converted to `diffusers.VQModel`.",
        conversion="The tokenizer's codes were scaled to length 1, as LlamaGen does at each use. On small random checkpoints "
        "its codes equal those of the published code, and its images agree to 1e-4 (float32, CPU).",
        licence="LlamaGen, code and weights: MIT.",
        citation=CITATION,
        license="mit",
        base_model="FoundationVision/LlamaGen",
    )
