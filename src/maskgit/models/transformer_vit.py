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
from diffusers.utils import BaseOutput
from torch import nn


# Shapes: B images, N = H * W image tokens, S = N + 1 sequence (the class token is the last), M queried positions,
# C hidden_size, K codebook_size, V = K + 1 + num_classes + 1 rows of the one embedding table.


@dataclass
class MaskGitTransformerOutput(BaseOutput):
    """
    Output of a MaskGIT transformer.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_positions, codebook_size)`):
            Unnormalised log-probabilities of the codes, at all positions in row-major order or at the `positions` asked
            for.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            Output of the last block for the whole sequence, the class token at its end.
    """

    logits: torch.Tensor
    last_hidden_state: torch.Tensor | None = None


class MaskGitViTAttnProcessor:
    """Self-attention through diffusers' attention backends, with features added to the values where there are any."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MaskGitViTAttention",
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
        return attn.to_out[0](hidden_states.flatten(2))


class MaskGitViTAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = MaskGitViTAttnProcessor
    _available_processors = [MaskGitViTAttnProcessor]
    # Queries may come from fewer positions than keys and values, so the three projections stay apart.
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
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


class MaskGitViTBlock(nn.Module):
    """Transformer block that normalises before its attention and before its feed-forward layers."""

    def __init__(self, hidden_size: int, num_attention_heads: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.attn = MaskGitViTAttention(hidden_size, num_attention_heads, dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.ff = FeedForward(
            hidden_size, inner_dim=intermediate_size, activation_fn="gelu", dropout=dropout, final_dropout=True
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_down_features: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states, top_down_features (B, S, C) -> (B, S, C), or (B, M, C) for `positions` (B, M) alone."""
        context = self.norm1(hidden_states)
        queries = context
        if positions is not None:
            hidden_states, queries = _select(hidden_states, positions), _select(context, positions)
        hidden_states = hidden_states + self.attn(queries, context, top_down_features)
        return hidden_states + self.ff(self.norm2(hidden_states))


class MaskGitViTInputHead(nn.Module):
    """What the embeddings pass before the first block."""

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.linear1 = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.linear2 = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.linear1(self.dropout(self.norm1(hidden_states))))
        return self.linear2(self.dropout(self.norm2(hidden_states)))


class MaskGitViTOutputHead(nn.Module):
    """What the last block's output passes before it is compared with the embeddings of the codes."""

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm2(F.gelu(self.linear(self.dropout(self.norm1(hidden_states)))))


class MaskGitViTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """
    The class-conditional masked transformer of MaskGIT-pytorch (v1.0): a plain pre-norm transformer over the image tokens
    and, at the end of the sequence, a token for the class. Codes, mask and classes share one embedding table, which is the
    output layer's weight too; the output layer has a bias of its own at each position.

    Source: Besnier and Chen, "A Pytorch Reproduction of Masked Generative Image Transformer" (2023, arXiv 2310.14400).

    Args:
        codebook_size (`int`, defaults to 1024): Number K of image codes. Token K is the mask.
        num_classes (`int`, defaults to 1000): Number of classes.
        sample_size (`int` or `tuple[int, int]`, defaults to 16): Tokens a side, or (height, width) of the token grid.
        hidden_size (`int`, defaults to 768): Width of the hidden states.
        num_layers (`int`, defaults to 24): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Heads of each attention; they divide `hidden_size`.
        intermediate_size (`int`, defaults to 3072): Width inside the feed-forward layers.
        has_null_class (`bool`, defaults to `True`): Whether label `num_classes` means "no class", which classifier-free
            guidance needs.
        dropout (`float`, defaults to 0.0): Dropout in the input and output heads, on attention probabilities and in the
            feed-forward layers, in training. The published models were trained with 0.1.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaskGitViTBlock"]
    _repeated_blocks = ["MaskGitViTBlock"]
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
        has_null_class: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {hidden_size}, but must be a multiple of `num_attention_heads`, {num_attention_heads}."
            )
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        # Rows: codes 0..K-1, the mask K, the classes, "no class".
        vocabulary_size = codebook_size + 1 + num_classes + int(has_null_class)

        self.token_embed = nn.Embedding(vocabulary_size, hidden_size)
        self.position_embed = nn.Embedding(height * width + 1, hidden_size)  # the last for the class token
        self.input_head = MaskGitViTInputHead(hidden_size, dropout)
        self.transformer_blocks = nn.ModuleList(
            [MaskGitViTBlock(hidden_size, num_attention_heads, intermediate_size, dropout) for _ in range(num_layers)]
        )
        self.output_head = MaskGitViTOutputHead(hidden_size, dropout)
        # The output layer's weight is the token embedding: tied in forward, since safetensors refuses shared tensors.
        self.output_bias = nn.Parameter(torch.zeros(height * width + 1, vocabulary_size))
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self):
        # As PyTorch's defaults have it, which in its attention take the three input projections for one matrix.
        for block in self.transformer_blocks:
            for linear in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
                nn.init.zeros_(linear.bias)
            nn.init.zeros_(block.attn.to_out[0].bias)
        nn.init.trunc_normal_(self.position_embed.weight, std=0.02)

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
            top_down_features (`Sequence[torch.Tensor]`, one `(batch_size, N + 1, hidden_size)` a block, *optional*):
                Features of self-guidance, which each block's value projection takes in addition to its own input.
            output_hidden_states (`bool`, defaults to `False`):
                Whether to return the last block's output for the whole sequence too.
            full_vocabulary (`bool`, defaults to `False`):
                Whether to append the mask token's logit, over which the published training loss normalises too.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitTransformerOutput`, else a tuple.

        Returns:
            `MaskGitTransformerOutput` with `logits` of shape `(batch_size, M or N, codebook_size)`, one more column with
            `full_vocabulary`, and with `output_hidden_states` `last_hidden_state` of shape
            `(batch_size, N + 1, hidden_size)`.
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

        # Two tables, so that a wrong token is never taken for a class.
        token_weight, class_weight = self.token_embed.weight.tensor_split([self.config.codebook_size + 1])
        hidden_states = torch.cat(
            [F.embedding(input_ids, token_weight), F.embedding(class_labels, class_weight)[:, None]], dim=1
        )
        hidden_states = self.input_head(hidden_states + self.position_embed.weight)  # (B, S, C)

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
            hidden_states = hidden_states[:, :num_tokens]
        elif output_hidden_states:
            hidden_states = _select(hidden_states, positions)

        num_logits = self.config.codebook_size + int(full_vocabulary)
        bias = self.output_bias[:num_tokens, :num_logits]
        if positions is not None:
            bias = F.embedding(positions, bias)  # (B, M, K)
        logits = F.linear(self.output_head(hidden_states), self.token_embed.weight[:num_logits]) + bias

        if not return_dict:
            return (logits, last_hidden_state) if output_hidden_states else (logits,)
        return MaskGitTransformerOutput(logits=logits, last_hidden_state=last_hidden_state)

    def resize_class_embeddings(self, num_classes: int) -> None:
        """
        Replace the class embeddings by random ones for another set of classes, in place; "no class", codes and mask stay.

        Args:
            num_classes (`int`): The new number of classes.
        """
        old_embed, old_bias = self.token_embed.weight, self.output_bias
        first = self.config.codebook_size + 1
        last = first + self.config.num_classes
        self.token_embed = nn.Embedding(len(old_embed) - self.config.num_classes + num_classes, old_embed.shape[1])
        self.token_embed.to(old_embed)
        self.token_embed.weight.data[:first] = old_embed.data[:first]
        self.token_embed.weight.data[first + num_classes :] = old_embed.data[last:]
        new_bias = old_bias.new_zeros(len(old_bias), num_classes)  # never read: classes are not drawn
        self.output_bias = nn.Parameter(
            torch.cat([old_bias.data[:, :first], new_bias, old_bias.data[:, last:]], dim=1),
            requires_grad=old_bias.requires_grad,
        )
        self.token_embed.requires_grad_(old_embed.requires_grad)
        self.register_to_config(num_classes=num_classes)

    def resize_position_embeddings(self, sample_size: int | tuple[int, int]) -> None:
        """
        Interpolate the position embeddings and the output biases to another token grid, in place; the class token keeps its
        own. Images of another size need some fine-tuning afterwards: learned positions do not extrapolate.

        Args:
            sample_size (`int` or `tuple[int, int]`): Tokens a side, or (height, width) of the new token grid.
        """
        (old_height, old_width), (height, width) = (
            (size, size) if isinstance(size, int) else size for size in (self.config.sample_size, sample_size)
        )

        def resize(rows: torch.Tensor) -> torch.Tensor:
            grid = rows[:-1].T.reshape(1, -1, old_height, old_width).float()
            grid = F.interpolate(grid, size=(height, width), mode="bilinear")
            return torch.cat([grid.flatten(2)[0].T.to(rows.dtype), rows[-1:]])

        self.position_embed = nn.Embedding.from_pretrained(
            resize(self.position_embed.weight.data), freeze=not self.position_embed.weight.requires_grad
        )
        self.output_bias = nn.Parameter(resize(self.output_bias.data), requires_grad=self.output_bias.requires_grad)
        self.register_to_config(sample_size=sample_size)
