# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


# Shapes: B images, H x W pixels, f = 2 ** (levels - 1) pixels a token and side, C latent_channels.


class MaskGitVQResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        if hasattr(self, "conv_shortcut"):
            # Where the width changes, the original's shortcut starts from this branch, not from the block's input.
            residual = self.conv_shortcut(hidden_states)
        return hidden_states + residual


class MaskGitVQBlock(nn.Module):
    """The residual blocks of one level, then a halving (`downsample`) or a doubling (`upsample`) of height and width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_num_groups: int,
        norm_eps: float,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.downsample = downsample
        self.resnets = nn.ModuleList(
            [
                MaskGitVQResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_num_groups, norm_eps)
                for i in range(num_layers)
            ]
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels, use_conv=True)] if upsample else [])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        if self.downsample:
            # An odd last row or column is averaged alone.
            hidden_states = F.avg_pool2d(hidden_states, 2, ceil_mode=True, count_include_pad=False)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states)
        return hidden_states


class MaskGitVQEncoder(nn.Module):
    """Images (B, in_channels, H, W) in [0, 1] -> latents (B, C, H / f, W / f), rounded up."""

    def __init__(
        self,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        last = len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1, bias=False)
        self.down_blocks = nn.ModuleList(
            [
                MaskGitVQBlock(
                    block_out_channels[max(i - 1, 0)],
                    channels,
                    layers_per_block,
                    norm_num_groups,
                    norm_eps,
                    downsample=i < last,
                )
                for i, channels in enumerate(block_out_channels)
            ]
        )
        channels = block_out_channels[-1]
        self.mid_block = MaskGitVQBlock(channels, channels, layers_per_block, norm_num_groups, norm_eps)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.conv_out = nn.Conv2d(channels, latent_channels, 1)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in (*self.down_blocks, self.mid_block):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class MaskGitVQDecoder(nn.Module):
    """Quantised latents (B, C, h, w) -> images (B, out_channels, h * f, w * f), about in [0, 1]."""

    def __init__(
        self,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        norm_num_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        outwards = block_out_channels[::-1]
        last = len(outwards) - 1
        self.conv_in = nn.Conv2d(latent_channels, outwards[0], 3, padding=1)
        self.mid_block = MaskGitVQBlock(outwards[0], outwards[0], layers_per_block, norm_num_groups, norm_eps)
        self.up_blocks = nn.ModuleList(
            [
                MaskGitVQBlock(
                    outwards[max(i - 1, 0)], channels, layers_per_block, norm_num_groups, norm_eps, upsample=i < last
                )
                for i, channels in enumerate(outwards)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, outwards[-1], eps=norm_eps)
        self.conv_out = nn.Conv2d(outwards[-1], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(hidden_states)
        for block in (self.mid_block, *self.up_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(hidden_states)))


class MaskGitVQModel(ModelMixin, ConfigMixin):
    """
    The tokenizer of Google's MaskGIT: a convolutional VQGAN without attention, with the interface of
    [`diffusers.VQModel`]. Images are in [-1, 1] outside; the network itself works in [0, 1].

    Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022, arXiv 2202.04200).

    Args:
        in_channels (`int`, defaults to 3): Channels of the images that are encoded.
        out_channels (`int`, defaults to 3): Channels of the images that are decoded.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 128, 256, 256, 512)`): Width of each level from the image
            inwards. Each level but the last halves height and width.
        layers_per_block (`int`, defaults to 2): Residual blocks of each level, in encoder and decoder.
        latent_channels (`int`, defaults to 256): Channels C of the latents and the codes.
        num_vq_embeddings (`int`, defaults to 1024): Number of codes.
        norm_num_groups (`int`, defaults to 32): Groups of each norm; they divide every width.
        norm_eps (`float`, defaults to 1e-6): What is added to the variance in each norm.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskGitVQBlock"]
    _skip_layerwise_casting_patterns = ["quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        num_vq_embeddings: int = 1024,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        sizes = (block_out_channels, layers_per_block, latent_channels, norm_num_groups, norm_eps)
        self.encoder = MaskGitVQEncoder(in_channels, *sizes)
        # Of both forms of its loss, the one whose `beta` weighs the latents' distance to the codes, as in the paper.
        self.quantize = VectorQuantizer(num_vq_embeddings, latent_channels, beta=0.25, legacy=False)
        self.decoder = MaskGitVQDecoder(out_channels, *sizes)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Images (B, in_channels, H, W) in [-1, 1] -> latents (B, C, H / f, W / f), not quantised."""
        latents = self.encoder(x * 0.5 + 0.5)
        if not return_dict:
            return (latents,)
        return VQEncoderOutput(latents=latents)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            h (`torch.Tensor`): Latents (B, C, h, w), or with `force_not_quantize` codes, long with B * h * w elements.
            force_not_quantize (`bool`, defaults to `False`): Whether `h` are codes.
            return_dict (`bool`, defaults to `True`): Whether to return a `DecoderOutput`, else a tuple.
            shape (`tuple[int, int, int, int]`, *optional*): (B, h, w, C), for codes.

        Returns:
            `DecoderOutput` with `sample`, images of shape (B, out_channels, h * f, w * f) about in [-1, 1], not clipped, and
            `commit_loss`, the quantiser's loss.
        """
        if force_not_quantize:
            quantized = self.quantize.get_codebook_entry(h, shape)
            commit_loss = quantized.new_zeros(len(quantized))
        else:
            quantized, commit_loss, _ = self.quantize(h)
        sample = self.decoder(quantized) * 2 - 1
        if not return_dict:
            return (sample, commit_loss)
        return DecoderOutput(sample=sample, commit_loss=commit_loss)

    def forward(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Images (B, in_channels, H, W) in [-1, 1] through codes and back, as `decode` returns them."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)
