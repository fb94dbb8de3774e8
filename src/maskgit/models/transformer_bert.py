# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import GELU
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


# Shapes: B images, N = H * W image tokens, S = N + 1 sequence (the class token is the first), M queried positions,
# C hidden_size, K codebook_size, V = K + num_classes + 1 rows of the one embedding table: codes, classes, mask.

ACTIVATIONS = {"gelu": "none", "gelu-approximate": "tanh"}


@dataclass
class MaskGitTransformerOutput(BaseOutput):
    """
    Output of a MaskGIT transformer.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_positions, codebook_size)`):
            Unnormalised log-probabilities of the codes, at all positions in row-major order or at the `positions` asked
            for.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            Output of the last block for the whole sequence, the class token at its start.
    """

    logits: torch.Tensor
    last_hidden_state: torch.Tensor | None = None


class MaskGitBertAttnProcessor:
    """Self-attention through diffusers' attention backends, with features added to the values where there are any."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MaskGitBertAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states)  # (B, M or S, C)
        key = attn.to_k(encoder_hidden_states)  # (B, S, C)
        value = attn.to_v(encoder_hidden_states)
        if top_down_features is not None:
            value = value + attn.to_v(top_down_features)  # the bias counts twice, as UnlockMGM trains it
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        return attn.to_out[1](hidden_states)


class MaskGitBertAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = MaskGitBertAttnProcessor
    _available_processors = [MaskGitBertAttnProcessor]
    # Queries may come from fewer positions than keys and values, so the three projections stay apart.
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int, dropout: float, out_dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size), nn.Dropout(out_dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, top_down_features)


def _select(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The image tokens `positions` (B, M) of `hidden_states` (B, S, C), as (B, M, C)."""
    return hidden_states[:, 1:].gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


class MaskGitBertBlock(nn.Module):
    """Transformer block that normalises after its attention and after its feed-forward layers, as BERT's."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        activation_fn: str,
        norm_eps: float,
        dropout: float,
        attention_out_dropout: bool,
    ):
        super().__init__()
        out_dropout = dropout if attention_out_dropout else 0.0
        self.attn = MaskGitBertAttention(hidden_size, num_attention_heads, dropout, out_dropout)
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.ff = FeedForward(hidden_size, inner_dim=intermediate_size, activation_fn=activation_fn)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states, top_down_features (B, S, C) -> (B, S, C), or (B, M, C) for `positions` (B, M) alone."""
        context = hidden_states
        if positions is not None:
            hidden_states = _select(hidden_states, positions)
        hidden_states = self.norm1(hidden_states + self.attn(hidden_states, context, top_down_features))
        return self.norm2(hidden_states + self.dropout(self.ff(hidden_states)))


class MaskGitBertTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """
    The class-conditional masked transformer of Google's MaskGIT: a BERT over a token for the class and the image tokens.
    Codes, classes and mask share one embedding table, which is the output layer's weight too. UnlockMGM guides this model
    by itself.

    Sources: Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022, arXiv 2202.04200); Hur et al.,
    "Unlocking the Capabilities of Masked Generative Models for Image Synthesis via Self-Guidance" (NeurIPS 2024, arXiv
    2410.13136).

    Args:
        codebook_size (`int`, defaults to 1024): Number K of image codes. Token K is the mask.
        num_classes (`int`, defaults to 1000): Number of classes.
        sample_size (`int` or `tuple[int, int]`, defaults to 16): Tokens a side, or (height, width) of the token grid.
        hidden_size (`int`, defaults to 768): Width of the hidden states.
        num_layers (`int`, defaults to 24): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Heads of each attention; they divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): Width inside the feed-forward layers.
        activation_fn (`str`, defaults to `"gelu-approximate"`): "gelu-approximate" (by tanh, as Google's JAX code has it) or
            "gelu" (exact, as its PyTorch ports have it).
        norm_eps (`float`, defaults to 1e-12): What is added to the variance in each norm.
        has_null_class (`bool`, defaults to `False`): Whether label `num_classes` means "no class", which classifier-free
            guidance needs. The published models have none.
        dropout (`float`, defaults to 0.0): Dropout on the embeddings, on attention probabilities and on the outputs of
            attention and feed-forward layers, in training. The published models were trained with 0.1.
        attention_out_dropout (`bool`, defaults to `True`): Whether dropout acts on the outputs of attention too. It does not
            where UnlockMGM trains.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskGitBertBlock"]
    _repeated_blocks = ["MaskGitBertBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        num_classes: int = 1000,
        sample_size: int | tuple[int, int] = 16,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        activation_fn: str = "gelu-approximate",
        norm_eps: float = 1e-12,
        has_null_class: bool = False,
        dropout: float = 0.0,
        attention_out_dropout: bool = True,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {hidden_size}, but must be a multiple of `num_attention_heads`, {num_attention_heads}."
            )
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"`activation_fn` is {activation_fn!r}, but must be one of {', '.join(ACTIVATIONS)}.")
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        vocabulary_size = codebook_size + num_classes + int(has_null_class) + 1

        self.token_embed = nn.Embedding(vocabulary_size, hidden_size)
        self.position_embed = nn.Embedding(1 + height * width, hidden_size)  # the first for the class token
        self.norm_in = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout_in = nn.Dropout(dropout)
        self.transformer_blocks = nn.ModuleList(
            [
                MaskGitBertBlock(
                    hidden_size,
                    num_attention_heads,
                    intermediate_size,
                    activation_fn,
                    norm_eps,
                    dropout,
                    attention_out_dropout,
                )
                for _ in range(num_layers)
            ]
        )
        self.dense_out = GELU(hidden_size, hidden_size, approximate=ACTIVATIONS[activation_fn])
        self.norm_out = nn.LayerNorm(hidden_size, eps=norm_eps)
        # The output layer's weight is the token embedding: tied in forward, since safetensors refuses shared tensors.
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: torch.LongTensor,
        class_labels: torch.LongTensor | None,
        positions: torch.LongTensor | None = None,
        top_down_features: Sequence[torch.Tensor] | None = None,
        output_hidden_states: bool = False,
        full_vocabulary: bool = False,
        return_dict: bool = True,
    ) -> MaskGitTransformerOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`):
                Tokens in `[0, codebook_size]`, row-major; `codebook_size` marks a masked one.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Classes in `[0, num_classes)`, or `num_classes` for no class where `has_null_class`. `None`: the class token
                is masked too.
            positions (`torch.LongTensor` of shape `(batch_size, M)`, *optional*):
                Flat positions whose logits are wanted: the result equals these rows of the full one, while the output
                layer and most of the last block run for them only.
            top_down_features (`Sequence[torch.Tensor]`, one `(batch_size, 1 + N, hidden_size)` a block, *optional*):
                Features of self-guidance, which each block's value projection takes in addition to its own input.
            output_hidden_states (`bool`, defaults to `False`):
                Whether to return the last block's output for the whole sequence too.
            full_vocabulary (`bool`, defaults to `False`):
                Whether to append the logits of the classes and of the mask, over which the published training loss
                normalises too.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitTransformerOutput`, else a tuple.

        Returns:
            `MaskGitTransformerOutput` with `logits` of shape `(batch_size, M or N, codebook_size)`, of all rows of the
            embedding table with `full_vocabulary`, and with `output_hidden_states` `last_hidden_state` of shape
            `(batch_size, 1 + N, hidden_size)`.
        """
        input_ids = input_ids.flatten(1)
        num_tokens = self.position_embed.num_embeddings - 1
        if input_ids.shape[1] != num_tokens:
            raise ValueError(
                f"`input_ids` has {input_ids.shape[1]} tokens an image, but this transformer has positions for "
                f"{num_tokens} (sample_size {self.config.sample_size}). Call `resize_position_embeddings` for another "
                "grid."
            )
        if class_labels is not None and class_labels.shape != (len(input_ids),):
            raise ValueError(
                f"`class_labels` has the shape {tuple(class_labels.shape)}, but must hold one label for each of the "
                f"{len(input_ids)} images."
            )
        if top_down_features is None:
            top_down_features = [None] * len(self.transformer_blocks)
        elif len(top_down_features) != len(self.transformer_blocks):
            raise ValueError(
                f"`top_down_features` has {len(top_down_features)} tensors, but this transformer has "
                f"{len(self.transformer_blocks)} blocks."
            )

        codebook_size, mask_row = self.config.codebook_size, self.token_embed.num_embeddings - 1
        # Whatever is above the mask lands above the table: a wrong token is never taken for a class, nor a wrong class for
        # the mask.
        rows = torch.where(input_ids < codebook_size, input_ids, input_ids + mask_row - codebook_size)
        token_embeds = self.token_embed(rows)
        if class_labels is None:
            class_embeds = self.token_embed(torch.full_like(input_ids[:, :1], mask_row))
        else:
            class_embeds = F.embedding(class_labels[:, None], self.token_embed.weight[codebook_size:mask_row])
        hidden_states = torch.cat([class_embeds, token_embeds], dim=1) + self.position_embed.weight  # (B, S, C)
        hidden_states = self.dropout_in(self.norm_in(hidden_states))

        # Who reads the hidden states wants those of all positions.
        last_positions = None if output_hidden_states else positions
        last = len(self.transformer_blocks) - 1
        for i, (block, features) in enumerate(zip(self.transformer_blocks, top_down_features)):
            block_positions = last_positions if i == last else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, features, block_positions)
            else:
                hidden_states = block(hidden_states, features, block_positions)
        last_hidden_state = hidden_states if output_hidden_states else None
        if positions is None:
            hidden_states = hidden_states[:, 1:]
        elif output_hidden_states:
            hidden_states = _select(hidden_states, positions)

        num_logits = len(self.output_bias) if full_vocabulary else codebook_size
        hidden_states = self.norm_out(self.dense_out(hidden_states))
        logits = F.linear(hidden_states, self.token_embed.weight[:num_logits], self.output_bias[:num_logits])

        if not return_dict:
            return (logits, last_hidden_state) if output_hidden_states else (logits,)
        return MaskGitTransformerOutput(logits=logits, last_hidden_state=last_hidden_state)

    def resize_class_embeddings(self, num_classes: int) -> None:
        """
        Replace the class embeddings by random ones for another set of classes, in place; that of "no class" stays.

        Args:
            num_classes (`int`): The new number of classes.
        """
        weight, bias = self.token_embed.weight, self.output_bias
        kept = self.config.codebook_size, self.config.codebook_size + self.config.num_classes
        classes = nn.init.trunc_normal_(weight.new_empty(num_classes, weight.shape[1]), std=0.02, a=-0.04, b=0.04)
        self.token_embed = nn.Embedding.from_pretrained(
            torch.cat([weight.data[: kept[0]], classes, weight.data[kept[1] :]]), freeze=not weight.requires_grad
        )
        self.output_bias = nn.Parameter(
            torch.cat([bias.data[: kept[0]], bias.new_zeros(num_classes), bias.data[kept[1] :]]),
            requires_grad=bias.requires_grad,
        )
        self.register_to_config(num_classes=num_classes)

    def resize_position_embeddings(self, sample_size: int | tuple[int, int]) -> None:
        """
        Interpolate the position embeddings to another token grid, in place; the class token keeps its own. Images of another
        size need some fine-tuning afterwards: learned positions do not extrapolate.

        Args:
            sample_size (`int` or `tuple[int, int]`): Tokens a side, or (height, width) of the new token grid.
        """
        (old_height, old_width), (height, width) = (
            (size, size) if isinstance(size, int) else size for size in (self.config.sample_size, sample_size)
        )
        weight = self.position_embed.weight.data
        grid = weight[1:].T.reshape(1, -1, old_height, old_width).float()
        grid = F.interpolate(grid, size=(height, width), mode="bilinear")
        self.position_embed = nn.Embedding.from_pretrained(
            torch.cat([weight[:1], grid.flatten(2)[0].T.to(weight.dtype)]),
            freeze=not self.position_embed.weight.requires_grad,
        )
        self.register_to_config(sample_size=sample_size)
