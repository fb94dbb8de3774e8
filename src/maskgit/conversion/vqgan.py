# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""The network that the tokenizers of taming transformers and LlamaGen share, as `diffusers.VQModel`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .checkpoints import Converted, Rename, common_size, count_indices, rename_tensors


@dataclass(frozen=True)
class Names:
    """
    What a project calls the parts of the network.

    Args:
        encoder_levels (`str`): The encoder's levels, which all count from the image inwards.
        decoder_levels (`str`): The decoder's levels.
        decoder_from_image (`bool`): Whether these count from the image inwards too, else outwards.
        residual (`str`): The residual blocks of a level.
        middle (`tuple[str, str, str]`): The residual block, the attention and the residual block in the middle.
    """

    encoder_levels: str
    decoder_levels: str
    decoder_from_image: bool
    residual: str
    middle: tuple[str, str, str]

    def encoder(self, level: int) -> str:
        return f"{self.encoder_levels}.{level}"

    def decoder(self, level: int, num_levels: int) -> str:
        """The decoder's level, counted from the image inwards."""
        return f"{self.decoder_levels}.{level if self.decoder_from_image else num_levels - 1 - level}"


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


def _middle(part: str, names: tuple[str, str, str], channels: int) -> Iterator[Rename]:
    first, attention, second = (f"{part}.mid.{name}" for name in names)
    yield from _residual_block(first, f"{part}.mid_block.resnets.0", channels, channels)
    yield from _attention(attention, f"{part}.mid_block.attentions.0", channels)
    yield from _residual_block(second, f"{part}.mid_block.resnets.1", channels, channels)


def _renames(
    names: Names,
    channels: list[int],
    attention: set[int],
    layers_per_block: int,
    latent_channels: int,
    embed_dim: int,
    image_channels: tuple[int, int],
    change_codes: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Iterator[Rename]:
    """`channels` of the levels from the image inwards; `attention`: the levels that have it."""
    last = len(channels) - 1
    yield from _pair("encoder.conv_in", "encoder.conv_in", channels[0], image_channels[0], 3, 3)
    for level, out_channels in enumerate(channels):
        source, target = names.encoder(level), f"encoder.down_blocks.{level}"
        in_channels = channels[max(level - 1, 0)]
        for i in range(layers_per_block):
            residual = (f"{source}.{names.residual}.{i}", f"{target}.resnets.{i}")
            yield from _residual_block(*residual, in_channels, out_channels)
            if level in attention:
                yield from _attention(f"{source}.attn.{i}", f"{target}.attentions.{i}", out_channels)
            in_channels = out_channels
        if level < last:
            convolution = (out_channels, out_channels, 3, 3)
            yield from _pair(f"{source}.downsample.conv", f"{target}.downsamplers.0.conv", *convolution)
    yield from _middle("encoder", names.middle, channels[-1])
    yield from _pair("encoder.norm_out", "encoder.conv_norm_out", channels[-1])
    yield from _pair("encoder.conv_out", "encoder.conv_out", latent_channels, channels[-1], 3, 3)

    yield from _pair("quant_conv", "quant_conv", embed_dim, latent_channels, 1, 1)
    yield Rename("quantize.embedding.weight", "quantize.embedding.weight", (0, embed_dim), change_codes)
    yield from _pair("post_quant_conv", "post_quant_conv", latent_channels, embed_dim, 1, 1)

    yield from _pair("decoder.conv_in", "decoder.conv_in", channels[-1], latent_channels, 3, 3)
    yield from _middle("decoder", names.middle, channels[-1])
    in_channels = channels[-1]
    for block, level in enumerate(range(last, -1, -1)):  # from the deepest level outwards
        source, target = names.decoder(level, len(channels)), f"decoder.up_blocks.{block}"
        out_channels = channels[level]
        for i in range(layers_per_block + 1):
            residual = (f"{source}.{names.residual}.{i}", f"{target}.resnets.{i}")
            yield from _residual_block(*residual, in_channels, out_channels)
            if level in attention:
                yield from _attention(f"{source}.attn.{i}", f"{target}.attentions.{i}", out_channels)
            in_channels = out_channels
        if level > 0:
            convolution = (out_channels, out_channels, 3, 3)
            yield from _pair(f"{source}.upsample.conv", f"{target}.upsamplers.0.conv", *convolution)
    yield from _pair("decoder.norm_out", "decoder.conv_norm_out", channels[0])
    yield from _pair("decoder.conv_out", "decoder.conv_out", image_channels[1], channels[0], 3, 3)


def convert_vqgan(
    weights: Mapping[str, torch.Tensor],
    names: Names,
    what: str,
    image_channels: tuple[int, int] = (3, 3),
    change_codes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Converted:
    """
    A tokenizer of any number of levels as a `diffusers.VQModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Its tensors, and no others.
        names (`Names`): What the project calls them.
        what (`str`): What it should be, for error messages.
        image_channels (`tuple[int, int]`): Channels of the images that it takes and gives.
        change_codes (`Callable`, *optional*): What is done to the codebook.
    """
    num_levels = max(
        count_indices(weights, names.encoder_levels + "."), count_indices(weights, names.decoder_levels + "."), 1
    )
    levels = range(num_levels)
    layers_per_block = max(count_indices(weights, f"{names.encoder(level)}.{names.residual}.") for level in levels)
    channels = [
        common_size(
            weights,
            [
                (f"{block}.{names.residual}.{i}.{layer}", 0)
                for block in (names.encoder(level), names.decoder(level, num_levels))
                for i in range(layers_per_block)
                for layer in ("conv1.weight", "norm2.weight", "conv2.weight", "conv2.bias")
            ],
        )
        for level in levels
    ]
    attention = {level for level in levels if count_indices(weights, f"{names.encoder(level)}.attn.")}
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
    renames = _renames(
        names, channels, attention, layers_per_block, latent_channels, embed_dim, image_channels, change_codes
    )
    state_dict = rename_tensors(weights, list(renames), what)

    config = {
        "in_channels": image_channels[0],
        "out_channels": image_channels[1],
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
    return Converted(config, state_dict, [])
