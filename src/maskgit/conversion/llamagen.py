# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers of LlamaGen (Sun et al., arXiv 2406.06525; github.com/FoundationVision/LlamaGen), as `diffusers.VQModel`."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from .cards import Card
from .checkpoints import Converted, Rename, common_size, count_indices, rename_tensors


def _pair(source: str, target: str, *shape: int) -> Iterator[Rename]:
    yield Rename(source + ".weight", target + ".weight", shape)
    yield Rename(source + ".bias", target + ".bias", shape[:1])


def _residual_block(source: str, target: str, in_channels: int, out_channels: int) -> Iterator[Rename]:
    yield from _pair(source + ".norm1", target + ".norm1", in_channels)
    yield from _pair(source + ".conv1", target + ".conv1", out_channels, in_channels, 3, 3)
    yield from _pair(source + ".norm2", target + ".norm2", out_channels)
    yield from _pair(source + ".conv2", target + ".conv2", out_channels, out_channels, 3, 3)
    if in_channels != out_channels:
        yield from _pair(source + ".nin_shortcut", target + ".conv_shortcut", out_channels, in_channels, 1, 1)


def _attention(source: str, target: str, channels: int) -> Iterator[Rename]:
    yield from _pair(source + ".norm", target + ".group_norm", channels)
    for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        # 1x1 convolutions there, linear layers here
        shape = (channels, channels, 1, 1)
        yield Rename(f"{source}.{old}.weight", f"{target}.{new}.weight", shape, lambda weight: weight[:, :, 0, 0])
        yield Rename(f"{source}.{old}.bias", f"{target}.{new}.bias", (channels,))


def _middle(part: str, channels: int) -> Iterator[Rename]:
    yield from _residual_block(f"{part}.mid.0", f"{part}.mid_block.resnets.0", channels, channels)
    yield from _attention(f"{part}.mid.1", f"{part}.mid_block.attentions.0", channels)
    yield from _residual_block(f"{part}.mid.2", f"{part}.mid_block.resnets.1", channels, channels)


def _renames(
    channels: list[int],
    attention: set[int],
    layers_per_block: int,
    latent_channels: int,
    embed_dim: int,
) -> Iterator[Rename]:
    """`channels` of the levels from the image inwards; `attention`: the levels that have it."""
    last = len(channels) - 1
    yield from _pair("encoder.conv_in", "encoder.conv_in", channels[0], 3, 3, 3)
    for level, out_channels in enumerate(channels):
        source, target = f"encoder.conv_blocks.{level}", f"encoder.down_blocks.{level}"
        in_channels = channels[max(level - 1, 0)]
        for i in range(layers_per_block):
            yield from _residual_block(f"{source}.res.{i}", f"{target}.resnets.{i}", in_channels, out_channels)
            if level in attention:
                yield from _attention(f"{source}.attn.{i}", f"{target}.attentions.{i}", out_channels)
            in_channels = out_channels
        if level < last:
            convolution = (out_channels, out_channels, 3, 3)
            yield from _pair(f"{source}.downsample.conv", f"{target}.downsamplers.0.conv", *convolution)
    yield from _middle("encoder", channels[-1])
    yield from _pair("encoder.norm_out", "encoder.conv_norm_out", channels[-1])
    yield from _pair("encoder.conv_out", "encoder.conv_out", latent_channels, channels[-1], 3, 3)

    yield from _pair("quant_conv", "quant_conv", embed_dim, latent_channels, 1, 1)
    # LlamaGen divides codes and latents by their length whenever it compares them, and decodes the codes of length 1. Of
    # codes of the same length the nearest is that of the largest inner product, whatever the latent's length.
    name = "quantize.embedding.weight"
    yield Rename(name, name, (0, embed_dim), lambda codes: F.normalize(codes, dim=-1))
    yield from _pair("post_quant_conv", "post_quant_conv", latent_channels, embed_dim, 1, 1)

    yield from _pair("decoder.conv_in", "decoder.conv_in", channels[-1], latent_channels, 3, 3)
    yield from _middle("decoder", channels[-1])
    in_channels = channels[-1]
    for block in range(len(channels)):  # from the deepest level outwards
        source, target = f"decoder.conv_blocks.{block}", f"decoder.up_blocks.{block}"
        out_channels = channels[last - block]
        for i in range(layers_per_block + 1):
            yield from _residual_block(f"{source}.res.{i}", f"{target}.resnets.{i}", in_channels, out_channels)
            if last - block in attention:
                yield from _attention(f"{source}.attn.{i}", f"{target}.attentions.{i}", out_channels)
            in_channels = out_channels
        if block < last:
            convolution = (out_channels, out_channels, 3, 3)
            yield from _pair(f"{source}.upsample.conv", f"{target}.upsamplers.0.conv", *convolution)
    yield from _pair("decoder.norm_out", "decoder.conv_norm_out", channels[0])
    yield from _pair("decoder.conv_out", "decoder.conv_out", 3, channels[0], 3, 3)


def convert_llamagen_tokenizer(weights: Mapping[str, torch.Tensor]) -> Converted:
    """
    The published tokenizer, of any number of levels, as a `diffusers.VQModel`: the same codes and images.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `model` (or `ema`). Its statistic of used codes is dropped.
    """
    dropped = [name for name in ("quantize.codebook_used",) if name in weights]
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}

    num_levels = max(count_indices(weights, "encoder.conv_blocks."), count_indices(weights, "decoder.conv_blocks."), 1)
    levels = range(num_levels)
    layers_per_block = max(count_indices(weights, f"encoder.conv_blocks.{level}.res.") for level in levels)
    channels = [
        common_size(
            weights,
            [
                (f"{block}.res.{i}.{layer}", 0)
                for block in (f"encoder.conv_blocks.{level}", f"decoder.conv_blocks.{num_levels - 1 - level}")
                for i in range(layers_per_block)
                for layer in ("conv1.weight", "norm2.weight", "conv2.weight", "conv2.bias")
            ],
        )
        for level in levels
    ]
    attention = {level for level in levels if count_indices(weights, f"encoder.conv_blocks.{level}.attn.")}
    latent_channels = common_size(
        weights,
        [("encoder.conv_out.weight", 0), ("encoder.conv_out.bias", 0), ("quant_conv.weight", 1)]
        + [("post_quant_conv.weight", 0), ("post_quant_conv.bias", 0), ("decoder.conv_in.weight", 1)],
    )
    embed_dim = common_size(
        weights,
        [("quantize.embedding.weight", 1), ("quant_conv.weight", 0), ("quant_conv.bias", 0)]
        + [("post_quant_conv.weight", 1)],
    )
    renames = _renames(channels, attention, layers_per_block, latent_channels, embed_dim)
    state_dict = rename_tensors(weights, list(renames), "LlamaGen tokenizer")

    config = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": channels,
        "down_block_types": [
            "AttnDownEncoderBlock2D" if level in attention else "DownEncoderBlock2D" for level in levels
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if level in attention else "UpDecoderBlock2D" for level in reversed(levels)
        ],
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "vq_embed_dim": embed_dim,
        "num_vq_embeddings": len(state_dict["quantize.embedding.weight"]),
        "sample_size": 256,
        "lookup_from_codebook": True,
    }
    return Converted(config, state_dict, dropped)


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
