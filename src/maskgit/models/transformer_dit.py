# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.utils import BaseOutput
from torch import nn


# Shapes: B images, N = H * W image tokens, R register tokens, S = N + R sequence, M queried positions, C hidden_size,
# K codebook_size.


@dataclass
class MaskGitTransformerOutput(BaseOutput):
    """
    Output of a MaskGIT transformer.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_positions, codebook_size)`):
            Unnormalised log-probabilities of the codes, at all positions in row-major order or at the `positions` asked
            for.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            Output of the last block for the whole sequence, the registers at its end.
    """

    logits: torch.Tensor
    last_hidden_state: torch.Tensor | None = None


class MaskGitDiTAttnProcessor:
    """
    Self-attention with queries and keys normalised over all heads together, through diffusers' attention backends, and with
    features added to the values where there are any.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MaskGitDiTAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        value = attn.to_v(encoder_hidden_states)  # (B, S, heads * head_dim)
        # Autocast may normalise in float32, but attention backends want a single dtype.
        query = attn.norm_q(attn.to_q(hidden_states)).to(value.dtype)  # (B, M or S, heads * head_dim)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).to(value.dtype)
        if top_down_features is not None:
            value = value + attn.to_v(top_down_features)
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


class MaskGitDiTAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = MaskGitDiTAttnProcessor
    _available_processors = [MaskGitDiTAttnProcessor]
    # Queries may come from fewer positions than keys and values, so the three projections stay apart.
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # The published "small" model has 6 heads of 85 channels: the inner width may be below the hidden size.
        inner_dim = heads * (hidden_size // heads)
        self.to_q = nn.Linear(hidden_size, inner_dim, bias=False)
        self.to_k = nn.Linear(hidden_size, inner_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, inner_dim, bias=False)
        self.norm_q = nn.RMSNorm(inner_dim, eps=1e-5, elementwise_affine=False)
        self.norm_k = nn.RMSNorm(inner_dim, eps=1e-5, elementwise_affine=False)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, hidden_size, bias=False), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, top_down_features)


def _select(hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows `positions` (B, M) of `hidden_states` (B, S, C), as (B, M, C)."""
    return hidden_states.gather(1, positions[..., None].expand(-1, -1, hidden_states.shape[-1]))


class MaskGitDiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the class embedding (adaLN)."""

    def __init__(self, hidden_size: int, num_attention_heads: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-5)
        self.attn = MaskGitDiTAttention(hidden_size, num_attention_heads, dropout)
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-5)
        self.ff = FeedForward(
            hidden_size, inner_dim=intermediate_size, activation_fn="swiglu", dropout=dropout, bias=False
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        hidden_states, top_down_features (B, S, C), conditioning (B, C) -> (B, S, C), or (B, M, C) for `positions` (B, M)
        alone.
        """
        modulation = self.adaln(conditioning)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        context = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn
        queries = context
        if positions is not None:
            hidden_states, queries = _select(hidden_states, positions), _select(context, positions)
        hidden_states = hidden_states + gate_attn * self.attn(queries, context, top_down_features)
        return hidden_states + gate_ff * self.ff(self.norm2(hidden_states) * (1 + scale_ff) + shift_ff)


class MaskGitDiTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """
    The class-conditional masked transformer of Halton-MaskGIT: DiT-like blocks (adaLN on the class, no timestep), SwiGLU,
    normalised queries and keys, register tokens, and an output layer tied to the token embedding.

    Source: Besnier et al., "Halton Scheduler for Masked Generative Image Transformer" (ICLR 2025, arXiv 2503.17076).

    Args:
        codebook_size (`int`, defaults to 16384): Number K of image codes. Token K is the mask.
        num_classes (`int`, defaults to 1000): Number of classes.
        sample_size (`int` or `tuple[int, int]`, defaults to 16): Tokens a side, or (height, width) of the token grid.
        hidden_size (`int`, defaults to 768): Width of the hidden states.
        num_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 12): Heads of each attention, of `hidden_size // num_attention_heads`
            channels.
        intermediate_size (`int`, *optional*): Width inside the feed-forward layers. Defaults to 2/3 of
            `4 * hidden_size`, rounded up to a multiple of 256.
        num_register_tokens (`int`, defaults to 1): Learned tokens appended to the sequence and dropped at the end.
        has_null_class (`bool`, defaults to `True`): Whether label `num_classes` means "no class", which classifier-free
            guidance needs.
        dropout (`float`, defaults to 0.0): Dropout on attention probabilities, attention outputs and inside the
            feed-forward layers, in training. The published models were trained with 0.1.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskGitDiTBlock"]
    _repeated_blocks = ["MaskGitDiTBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "adaln"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        sample_size: int | tuple[int, int] = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        num_register_tokens: int = 1,
        has_null_class: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if intermediate_size is None:
            intermediate_size = -(-int(2 * 4 * hidden_size / 3) // 256) * 256
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size

        self.token_embed = nn.Embedding(codebook_size + 1, hidden_size)
        self.position_embed = nn.Embedding(height * width, hidden_size)
        self.class_embed = nn.Embedding(num_classes + int(has_null_class), hidden_size)
        if num_register_tokens > 0:
            self.register_embed = nn.Embedding(num_register_tokens, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            [MaskGitDiTBlock(hidden_size, num_attention_heads, intermediate_size, dropout) for _ in range(num_layers)]
        )
        self.norm_out = RMSNorm(hidden_size, eps=1e-5, bias=True)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        # The output layer's weight is the token embedding: tied in forward, since safetensors refuses shared tensors.
        self.output_bias = nn.Parameter(torch.zeros(codebook_size + 1))
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.transformer_blocks:
            # Every block starts as the identity.
            nn.init.zeros_(block.adaln.weight)

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
                Classes in `[0, num_classes)`, or `num_classes` for no class. `None`: no class for all images.
            positions (`torch.LongTensor` of shape `(batch_size, M)`, *optional*):
                Flat positions whose logits are wanted: the result equals these rows of the full one, while the output
                layer and most of the last block run for them only.
            top_down_features (`Sequence[torch.Tensor]`, one `(batch_size, S, hidden_size)` a block, *optional*):
                Features of self-guidance for the S = N + `num_register_tokens` positions of the sequence, which each block's
                value projection takes in addition to its own input.
            output_hidden_states (`bool`, defaults to `False`):
                Whether to return the last block's output for the whole sequence too.
            full_vocabulary (`bool`, defaults to `False`):
                Whether to append the mask token's logit, over which the published training loss normalises too.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitTransformerOutput`, else a tuple.

        Returns:
            `MaskGitTransformerOutput` with `logits` of shape `(batch_size, M or N, codebook_size)`, one more column with
            `full_vocabulary`, and with `output_hidden_states` `last_hidden_state` of shape `(batch_size, S, hidden_size)`.
        """
        input_ids = input_ids.flatten(1)
        num_tokens = self.position_embed.num_embeddings
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
        if class_labels is None:
            if not self.config.has_null_class:
                raise ValueError("`class_labels` is needed: this transformer has no label for no class.")
            class_labels = input_ids.new_full((len(input_ids),), self.config.num_classes)
        if top_down_features is None:
            top_down_features = [None] * len(self.transformer_blocks)
        elif len(top_down_features) != len(self.transformer_blocks):
            raise ValueError(
                f"`top_down_features` has {len(top_down_features)} tensors, but this transformer has "
                f"{len(self.transformer_blocks)} blocks."
            )

        hidden_states = self.token_embed(input_ids) + self.position_embed.weight  # (B, N, C)
        if self.config.num_register_tokens > 0:
            registers = self.register_embed.weight.expand(len(hidden_states), -1, -1)
            hidden_states = torch.cat([hidden_states, registers], dim=1)  # (B, S, C)
        conditioning = F.silu(self.class_embed(class_labels))  # (B, C)

        # Who reads the hidden states wants those of all positions.
        last_positions = None if output_hidden_states else positions
        last = len(self.transformer_blocks) - 1
        for i, (block, features) in enumerate(zip(self.transformer_blocks, top_down_features)):
            arguments = (hidden_states, conditioning, features, last_positions if i == last else None)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)
        last_hidden_state = hidden_states if output_hidden_states else None
        if positions is None:
            hidden_states = hidden_states[:, :num_tokens]
        elif output_hidden_states:
            hidden_states = _select(hidden_states, positions)

        shift, scale = self.adaln_out(conditioning)[:, None].chunk(2, dim=-1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift
        num_logits = self.config.codebook_size + int(full_vocabulary)
        weight = self.token_embed.weight[:num_logits]
        logits = F.linear(hidden_states, weight, self.output_bias[:num_logits])

        if not return_dict:
            return (logits, last_hidden_state) if output_hidden_states else (logits,)
        return MaskGitTransformerOutput(logits=logits, last_hidden_state=last_hidden_state)

    def resize_class_embeddings(self, num_classes: int) -> None:
        """
        Replace the class embeddings by random ones for another set of classes, in place; that of "no class" stays.

        Args:
            num_classes (`int`): The new number of classes.
        """
        old = self.class_embed.weight
        self.class_embed = nn.Embedding(num_classes + int(self.config.has_null_class), old.shape[1]).to(old)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        if self.config.has_null_class:
            self.class_embed.weight.data[-1] = old.data[-1]
        self.class_embed.requires_grad_(old.requires_grad)
        self.register_to_config(num_classes=num_classes)

    def resize_position_embeddings(self, sample_size: int | tuple[int, int]) -> None:
        """
        Interpolate the position embeddings to another token grid, in place. Images of another size need some fine-tuning
        afterwards: learned positions do not extrapolate.

        Args:
            sample_size (`int` or `tuple[int, int]`): Tokens a side, or (height, width) of the new token grid.
        """
        (old_height, old_width), (height, width) = (
            (size, size) if isinstance(size, int) else size for size in (self.config.sample_size, sample_size)
        )
        weight = self.position_embed.weight.data
        grid = weight.T.reshape(1, -1, old_height, old_width).float()
        grid = F.interpolate(grid, size=(height, width), mode="bilinear")
        self.position_embed = nn.Embedding.from_pretrained(
            grid.flatten(2)[0].T.to(weight.dtype).contiguous(), freeze=not self.position_embed.weight.requires_grad
        )
        self.register_to_config(sample_size=sample_size)
