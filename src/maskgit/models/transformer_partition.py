# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import GELU
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


# Shapes: B images, N = H * W image tokens, R register tokens, S encoded tokens (registers, BOS, image tokens), M queried
# positions, C hidden_size, D channels of a head, K codebook_size.

QUERY_MODES = ("learn", "learn+freqs", "learn+freqs+mean", "learn+freqs+logsumexp")


@dataclass
class MaskGitTransformerOutput(BaseOutput):
    """
    Output of a MaskGIT transformer.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_positions, codebook_size)`):
            Unnormalised log-probabilities of the codes, at all positions in row-major order or at the `positions` asked
            for.
    """

    logits: torch.Tensor


def _rotate(hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotary positions on heads (B, S, heads, D): the first half of the channels is paired with the second."""
    cos, sin = rotary[..., None, :].chunk(2, dim=-1)  # (1 or B, S, 1, D), the sine's first half negative
    first, second = hidden_states.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(hidden_states * cos, swapped, sin).type_as(hidden_states)


class PartitionAttnProcessor:
    """Attention with rotary positions, of the hidden states to themselves or to others, through diffusers' backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "PartitionAttention",
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        rotary: torch.Tensor,
        context_rotary: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        hidden_states = dispatch_attention_fn(
            _rotate(query, rotary),
            _rotate(key, context_rotary),
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        return attn.to_out[1](hidden_states)


class PartitionAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = PartitionAttnProcessor
    _available_processors = [PartitionAttnProcessor]
    # Queries mostly come from elsewhere than keys and values, so the three projections stay apart.
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=bias), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        rotary: torch.Tensor,
        context_rotary: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, context, rotary, context_rotary, attention_mask)


class PartitionGELU(GELU):
    """
    Linear layer and GELU by its formula with tanh. Sampling on a CPU writes it with the sigmoid instead, which takes half of the
    time there: 0.5 x (1 + tanh(y)) = x sigmoid(2 y).
    """

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or gate.dtype != torch.float32 or gate.device.type != "cpu":
            return super().gelu(gate)
        scale = 2 * math.sqrt(2 / math.pi)
        return gate.square().mul_(0.044715 * scale).add_(scale).mul_(gate).sigmoid_().mul_(gate)


class PartitionBlock(nn.Module):
    """
    Transformer block whose norms are shifted, scaled and gated by the class embedding (adaLN). Its attention is to the hidden
    states themselves, or to the encoder's output in a cross-attention block.
    """

    def __init__(
        self, hidden_size: int, num_attention_heads: int, intermediate_size: int, dropout: float, is_cross: bool
    ):
        super().__init__()
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5, bias=False)
        self.norm_context = nn.LayerNorm(hidden_size, eps=1e-5, bias=False) if is_cross else None
        self.attn = PartitionAttention(hidden_size, num_attention_heads, dropout)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5, bias=False)
        self.ff = FeedForward(hidden_size, inner_dim=intermediate_size, activation_fn="gelu-approximate")
        self.ff.net[0] = PartitionGELU(hidden_size, intermediate_size, approximate="tanh")
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rotary: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_rotary: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, S or M, C), conditioning (B, C), context (B, S, C) for cross-attention -> as hidden_states."""
        modulation = self.adaln(conditioning)[:, None].chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        queries = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
        if self.norm_context is None:
            context, context_rotary = queries, rotary
        else:
            context = self.norm_context(context)
        attention = self.attn(queries, context, rotary, context_rotary, attention_mask)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attention)
        feed_forward = self.ff(torch.addcmul(shift_ff, self.norm2(hidden_states), 1 + scale_ff))
        return torch.addcmul(hidden_states, gate_ff, self.dropout(feed_forward))


class PartitionGroupSwap(nn.Module):
    """From what is encoded to what is asked for: queries that know their position only, and attend to the encoder's output."""

    def __init__(self, hidden_size: int, num_attention_heads: int, query_processor: str):
        super().__init__()
        self.query_embed = nn.Parameter(torch.randn(hidden_size))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.attn = PartitionAttention(hidden_size, num_attention_heads, bias=True)
        if query_processor == "mlp4":
            self.attn.to_q = nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size)
            )

    def forward(
        self,
        query_offsets: torch.Tensor,
        rotary: torch.Tensor,
        attention_mask: torch.Tensor | None,
        context: torch.Tensor,
        context_rotary: torch.Tensor,
    ) -> torch.Tensor:
        """query_offsets (1 or B, M, C), context (B, S, C) -> (B, M, C)."""
        queries = (self.query_embed + query_offsets).to(self.query_embed.dtype)  # the sinusoids may be float32
        queries = self.norm(queries).expand(len(context), -1, -1)
        return self.attn(queries, context, rotary, context_rotary, attention_mask)


class PartitionInputs(NamedTuple):
    """Tokens to encode, positions to predict, and who sees whom: masks are bool, true where attended to, None for everyone."""

    hidden_states: torch.Tensor  # (B, S, C)
    rotary: torch.Tensor  # (1 or B, S, 2 D)
    query_offsets: torch.Tensor  # (1 or B, M, C)
    query_rotary: torch.Tensor  # (1 or B, M, 2 D)
    encoder_mask: torch.Tensor | None  # (B, 1, 1 or S, S)
    cross_mask: torch.Tensor | None  # (B, 1, 1 or M, S)
    decoder_mask: torch.Tensor  # (B, 1, 1 or M, M), for self-attention
    visible: torch.Tensor | None  # (B, S): what queries see, or with two groups those of group 0
    query_groups: torch.Tensor | None = None  # (B, M, 1): with two groups, true for queries of group 1


class PartitionTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """
    The class-conditional transformer of Partition Generative Modeling. It has no mask token: an encoder reads known tokens
    only, and a decoder predicts any others from them, each on its own. Training splits each image into two groups and predicts
    every token from the other group, in one pass; sampling encodes the known tokens alone, which is what makes it fast.

    Source: Deschenaux et al., "Partition Generative Modeling: Masked Modeling Without Masks" (arXiv 2505.18883).

    Args:
        codebook_size (`int`, defaults to 16384): Number K of image codes. Token K marks a masked one, and is never encoded.
        num_classes (`int`, defaults to 1000): Number of classes.
        sample_size (`int` or `tuple[int, int]`, defaults to 32): Tokens a side, or (height, width) of the token grid.
        hidden_size (`int`, defaults to 1024): Width of the hidden states.
        num_layers (`int`, defaults to 12): Number of encoder blocks.
        num_decoder_layers (`int`, defaults to 12): Number of decoder blocks.
        num_attention_heads (`int`, defaults to 16): Heads of each attention.
        intermediate_size (`int`, *optional*): Width inside the feed-forward layers. Defaults to `4 * hidden_size`.
        num_register_tokens (`int`, defaults to 2): Learned tokens before the others, half of them for each group: even.
        self_attention_layers (`list[int]`, *optional*): Decoder blocks, counted from 0, that attend to the queries of their
            own group instead of the encoder's output. None in the published models ("cross-only"); the paper's code can
            mix them: "interleave" is every second one, the other modes are other lists. When sampling, such a block sees the
            masked ones among the `positions` of a call and not their group's registers, as published: its result depends on
            what else is asked for, and differs from training.
        query_mode (`str`, defaults to `"learn+freqs"`): What the decoder's first queries are made of: a learned vector, the
            sinusoids of the position, and the mean or logsumexp of the encoder's output. One of learn, learn+freqs,
            learn+freqs+mean and learn+freqs+logsumexp.
        query_processor (`str`, defaults to `"linear"`): Their projection: "linear", or "mlp4" with a hidden layer of four
            times the width.
        has_null_class (`bool`, defaults to `True`): Whether label `num_classes` means "no class", which classifier-free
            guidance needs.
        dropout (`float`, defaults to 0.0): Dropout on attention outputs and feed-forward outputs, in training. The published
            models were trained with 0.1.
        rotary_frequencies (`list[float]`, *optional*): Radians a position by which each pair of channels is rotated. Defaults
            to powers of 10000; converted checkpoints have the numbers of their file, since rounding shows in long sequences.
        trained_sample_size (`int` or `tuple[int, int]`, *optional*): Token grid of the training, when `sample_size` is
            another one: positions are interpolated.
        published_lengths (`bool`, defaults to `False`): Whether sampling hides the last half-of-the-registers known tokens
            from every attention, as the published samplers do by mistake: their lengths do not count the registers. The
            last are those of the highest positions, unless `known_positions` gives another order: to repeat a published
            trajectory, give them in the order in which they were drawn.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PartitionBlock", "PartitionGroupSwap"]
    _repeated_blocks = ["PartitionBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "adaln"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        sample_size: int | tuple[int, int] = 32,
        hidden_size: int = 1024,
        num_layers: int = 12,
        num_decoder_layers: int = 12,
        num_attention_heads: int = 16,
        intermediate_size: int | None = None,
        num_register_tokens: int = 2,
        self_attention_layers: list[int] | None = None,
        query_mode: str = "learn+freqs",
        query_processor: str = "linear",
        has_null_class: bool = True,
        dropout: float = 0.0,
        rotary_frequencies: list[float] | None = None,
        trained_sample_size: int | tuple[int, int] | None = None,
        published_lengths: bool = False,
    ):
        super().__init__()
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"`hidden_size` is {hidden_size}, but must be a multiple of twice the {num_attention_heads} "
                "`num_attention_heads`: rotary positions turn pairs of channels."
            )
        if num_register_tokens % 2:
            raise ValueError(
                f"`num_register_tokens` is {num_register_tokens}, but must be even: half of them belong to each group."
            )
        if query_mode not in QUERY_MODES:
            raise ValueError(f"`query_mode` is {query_mode!r}, but must be one of {', '.join(QUERY_MODES)}.")
        if query_processor not in ("linear", "mlp4"):
            raise ValueError(f"`query_processor` is {query_processor!r}, but must be 'linear' or 'mlp4'.")
        own = set(self_attention_layers or ())
        if not own <= set(range(num_decoder_layers)):
            raise ValueError(
                f"`self_attention_layers` is {self_attention_layers}, but the decoder has blocks 0 to {num_decoder_layers - 1}."
            )
        head_dim = hidden_size // num_attention_heads
        if rotary_frequencies is not None and len(rotary_frequencies) != head_dim // 2:
            raise ValueError(
                f"`rotary_frequencies` has {len(rotary_frequencies)} numbers, but a head has {head_dim // 2} pairs of channels."
            )
        if intermediate_size is None:
            intermediate_size = 4 * hidden_size

        self.token_embed = nn.Embedding(codebook_size, hidden_size)
        # Registers of group 1, registers of group 0, and BOS, which is in group 0.
        self.prefix_embed = nn.Embedding(num_register_tokens + 1, hidden_size)
        self.class_embed = nn.Embedding(num_classes + int(has_null_class), hidden_size)
        block = (hidden_size, num_attention_heads, intermediate_size, dropout)
        self.transformer_blocks = nn.ModuleList([PartitionBlock(*block, is_cross=False) for _ in range(num_layers)])
        self.group_swap = PartitionGroupSwap(hidden_size, num_attention_heads, query_processor)
        self.decoder_blocks = nn.ModuleList(
            [PartitionBlock(*block, is_cross=i not in own) for i in range(num_decoder_layers)]
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-5, bias=False)
        self.adaln_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, codebook_size)
        # Apart, since sampling needs the codes alone: they are faster in a matrix of even size, and contiguous.
        self.proj_bos = nn.Linear(hidden_size, 1)
        self.gradient_checkpointing = False
        self._set_positions()
        self._initialize_weights()

    def _initialize_weights(self):
        nn.init.kaiming_uniform_(self.token_embed.weight, a=math.sqrt(5))
        nn.init.normal_(self.prefix_embed.weight, std=0.02)
        nn.init.kaiming_uniform_(self.prefix_embed.weight[-1:], a=math.sqrt(5))
        nn.init.normal_(self.class_embed.weight)
        # Every block starts as the identity, and all codes as equally likely.
        zeros = [block.adaln for block in (*self.transformer_blocks, *self.decoder_blocks)]
        for layer in (*zeros, self.adaln_out, self.proj_out, self.proj_bos):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _set_positions(self):
        """Tables of what tells the places in the sequence apart: registers, BOS, then image tokens in row-major order."""
        config = self.config
        height, width, trained_height, trained_width = (
            side
            for size in (config.sample_size, config.trained_sample_size or config.sample_size)
            for side in ((size, size) if isinstance(size, int) else size)
        )
        # Loading in half precision makes that the default here, which has not as many numbers as there are places.
        rows, columns = (
            torch.arange(side, dtype=torch.float32) * ((trained - 1) / max(side - 1, 1))
            for side, trained in ((height, trained_height), (width, trained_width))
        )
        num_prefix = config.num_register_tokens + 1
        image = num_prefix + (rows[:, None] * trained_width + columns).flatten()
        places = torch.cat([torch.arange(num_prefix, dtype=image.dtype), image])

        head_dim = config.hidden_size // config.num_attention_heads
        if config.rotary_frequencies is None:
            frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        else:
            frequencies = torch.tensor(config.rotary_frequencies, dtype=torch.float32)
        angles = places[:, None] * frequencies
        # Not in the state dict, since they follow from the config: loaded in half precision, they stay float32.
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("rotary", torch.cat([cos, cos, -sin, sin], dim=-1), persistent=False)
        sinusoids = get_timestep_embedding(places, config.hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        if config.query_mode == "learn":
            sinusoids = torch.zeros_like(sinusoids)
        self.register_buffer("query_sinusoids", sinusoids, persistent=False)

    def _pool(self, context: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Mean or logsumexp of the `visible` (B, S) ones of `context` (B, S, C), (B, 1, C); 0 where none is."""
        if visible is None:
            visible = context.new_ones(context.shape[:2], dtype=torch.bool)
        visible = visible[..., None]
        if self.config.query_mode.endswith("mean"):
            return (context * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
        pooled = context.masked_fill(~visible, -torch.inf).logsumexp(1, keepdim=True)
        return torch.where(visible.any(1, keepdim=True), pooled, 0.0)

    def _two_groups(self, input_ids: torch.Tensor, group_ids: torch.Tensor) -> PartitionInputs:
        """All tokens `input_ids` (B, N), each of which is predicted from those of the other group."""
        num_registers = self.config.num_register_tokens
        prefix = self.prefix_embed.weight.expand(len(input_ids), -1, -1)
        prefix_groups = torch.arange(num_registers + 1, device=input_ids.device) < num_registers // 2
        groups = torch.cat([prefix_groups.expand(len(input_ids), -1), group_ids.flatten(1).bool()], dim=1)  # (B, S)
        same_group = groups[:, None, :, None] == groups[:, None, None, :]  # (B, 1, S, S)
        # What registers and BOS would predict is not wanted, so only blocks in which others attend to them need it.
        first = 0 if self.config.self_attention_layers else num_registers + 1
        return PartitionInputs(
            hidden_states=torch.cat([prefix, self.token_embed(input_ids)], dim=1),
            rotary=self.rotary[None],
            query_offsets=self.query_sinusoids[None, first:],
            query_rotary=self.rotary[None, first:],
            encoder_mask=same_group,
            cross_mask=~same_group[:, :, first:],
            decoder_mask=same_group,
            visible=groups,
            query_groups=groups[:, first:, None],
        )

    def _known_positions(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Positions of the known tokens of `input_ids` (B, N), ascending, as many for each image as the one with most has: (B, L);
        and their numbers (B,), None when these are all L.
        """
        known = input_ids != self.config.codebook_size
        lengths = known.sum(-1)
        shortest, longest = 0, input_ids.shape[1]
        if not torch.compiler.is_compiling():  # a graph's sizes cannot depend on values: it has room for all tokens
            shortest, longest = torch.stack(lengths.aminmax()).tolist()
        positions = known.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
        return positions, None if shortest == longest else lengths

    def _known_tokens(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None, known_positions: torch.Tensor | None
    ) -> PartitionInputs:
        """The known tokens of `input_ids` (B, N) alone, from which those at `positions` (B, M) are predicted."""
        config = self.config
        lengths = None
        if known_positions is None:
            known_positions, lengths = self._known_positions(input_ids)
        tokens = input_ids.gather(1, known_positions)  # (B, L)
        # Known tokens are group 0, behind the registers of this group and BOS.
        num_prefix = config.num_register_tokens + 1
        num_before = config.num_register_tokens // 2 + 1
        visible = None  # (B, S)
        if lengths is not None or config.published_lengths:
            lengths = tokens.new_full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
            lengths = lengths + (1 if config.published_lengths else num_before)
            visible = torch.arange(num_before + tokens.shape[1], device=tokens.device) < lengths[:, None]
            tokens = tokens.clamp(max=config.codebook_size - 1)  # any token may stand where none is seen
        prefix = self.prefix_embed.weight[-num_before:].expand(len(tokens), -1, -1)
        prefix_rotary = self.rotary[num_prefix - num_before : num_prefix].expand(len(tokens), -1, -1)
        image_rotary, image_sinusoids = self.rotary[num_prefix:], self.query_sinusoids[num_prefix:]
        asked = input_ids if positions is None else input_ids.gather(1, positions)
        return PartitionInputs(
            hidden_states=torch.cat([prefix, self.token_embed(tokens)], dim=1),
            rotary=torch.cat([prefix_rotary, F.embedding(known_positions, image_rotary)], dim=1),
            query_offsets=image_sinusoids[None] if positions is None else F.embedding(positions, image_sinusoids),
            query_rotary=image_rotary[None] if positions is None else F.embedding(positions, image_rotary),
            encoder_mask=None if visible is None else visible[:, None, None],
            cross_mask=None if visible is None else visible[:, None, None],
            decoder_mask=(asked == config.codebook_size)[:, None, None],
            visible=visible,
        )

    def forward(
        self,
        input_ids: torch.LongTensor,
        class_labels: torch.LongTensor | None,
        positions: torch.LongTensor | None = None,
        group_ids: torch.Tensor | None = None,
        known_positions: torch.LongTensor | None = None,
        full_vocabulary: bool = False,
        return_dict: bool = True,
    ) -> MaskGitTransformerOutput | tuple[torch.Tensor]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`):
                Tokens in `[0, codebook_size]`, row-major; `codebook_size` marks a masked one, of which `group_ids` allows
                none.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Classes in `[0, num_classes)`, or `num_classes` for no class; None for no class at all.
            positions (`torch.LongTensor` of shape `(batch_size, M)`, *optional*):
                Flat positions whose logits are wanted: the decoder runs for them only. Known ones may be among them.
            group_ids (`torch.Tensor` of shape `(batch_size, N)` or `(batch_size, height, width)`, *optional*):
                Bool or 0 and 1: the group of each token. Given in training: the logits of all positions follow, each from the
                tokens of the other group.
            known_positions (`torch.LongTensor` of shape `(batch_size, L)`, *optional*):
                Flat positions of the known tokens, where all images have L of them. They need not be looked for then, which
                makes the shapes independent of the values: `torch.compile` can take in all of the forward pass, without
                encoding masked positions.
            full_vocabulary (`bool`, defaults to `False`):
                Whether to append BOS's logit, over which the published training loss normalises too.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitTransformerOutput`, else a tuple.

        Returns:
            `MaskGitTransformerOutput` with `logits` of shape `(batch_size, M or N, codebook_size)`, one more column with
            `full_vocabulary`.
        """
        config = self.config
        input_ids = input_ids.flatten(1)
        num_tokens = len(self.rotary) - config.num_register_tokens - 1
        if input_ids.shape[1] != num_tokens:
            raise ValueError(
                f"`input_ids` has {input_ids.shape[1]} tokens an image, but this transformer has positions for {num_tokens} "
                f"(sample_size {config.sample_size}). Call `resize_position_embeddings` for another grid."
            )
        if class_labels is not None and class_labels.shape != (len(input_ids),):
            raise ValueError(
                f"`class_labels` has the shape {tuple(class_labels.shape)}, but must hold one label for each of the "
                f"{len(input_ids)} images."
            )
        if group_ids is not None and (positions is not None or known_positions is not None):
            raise ValueError(
                "With `group_ids` all tokens are known and predicted: leave out `positions` and `known_positions`."
            )
        if group_ids is not None and group_ids.flatten(1).shape != input_ids.shape:
            raise ValueError(
                f"`group_ids` has the shape {tuple(group_ids.shape)}, but must hold one group for each token, "
                f"{tuple(input_ids.shape)}."
            )
        if class_labels is None:
            if not config.has_null_class:
                raise ValueError("This transformer was trained without a 'no class' label: give `class_labels`.")
            class_labels = input_ids.new_full((len(input_ids),), config.num_classes)

        if group_ids is None:
            inputs = self._known_tokens(input_ids, positions, known_positions)
        else:
            inputs = self._two_groups(input_ids, group_ids)
        conditioning = self.class_embed(class_labels)  # (B, C)
        context = inputs.hidden_states  # (B, S, C)
        for block in self.transformer_blocks:
            context = self._run(block, context, conditioning, inputs.rotary, inputs.encoder_mask)

        offsets = inputs.query_offsets
        if config.query_mode.endswith(("mean", "logsumexp")):
            pooled = self._pool(context, inputs.visible)
            if inputs.query_groups is not None:
                pooled = torch.where(inputs.query_groups, self._pool(context, ~inputs.visible), pooled)
            offsets = offsets + pooled
        across = (inputs.cross_mask, context, inputs.rotary)
        hidden_states = self._run(self.group_swap, offsets, inputs.query_rotary, *across)  # (B, M, C)
        for block in self.decoder_blocks:
            seen = (inputs.decoder_mask,) if block.norm_context is None else across
            hidden_states = self._run(block, hidden_states, conditioning, inputs.query_rotary, *seen)
        if group_ids is not None:
            hidden_states = hidden_states[:, -num_tokens:]

        shift, scale = self.adaln_out(conditioning)[:, None].chunk(2, dim=-1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift
        logits = self.proj_out(hidden_states)
        if full_vocabulary:
            logits = torch.cat([logits, self.proj_bos(hidden_states)], dim=-1)

        if not return_dict:
            return (logits,)
        return MaskGitTransformerOutput(logits=logits)

    def _run(self, block: nn.Module, *arguments) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def resize_class_embeddings(self, num_classes: int) -> None:
        """
        Replace the class embeddings by random ones for another set of classes, in place; that of "no class" stays.

        Args:
            num_classes (`int`): The new number of classes.
        """
        old = self.class_embed.weight
        self.class_embed = nn.Embedding(num_classes + int(self.config.has_null_class), old.shape[1]).to(old)
        nn.init.normal_(self.class_embed.weight)
        if self.config.has_null_class:
            self.class_embed.weight.data[-1] = old.data[-1]
        self.class_embed.requires_grad_(old.requires_grad)
        self.register_to_config(num_classes=num_classes)

    def resize_position_embeddings(self, sample_size: int | tuple[int, int]) -> None:
        """
        Interpolate the positions to another token grid, in place: its corners get the places of the trained grid's corners.
        Images of another size need some fine-tuning afterwards.

        Args:
            sample_size (`int` or `tuple[int, int]`): Tokens a side, or (height, width) of the new token grid.
        """
        old = self.rotary
        trained = self.config.trained_sample_size or self.config.sample_size
        self.register_to_config(sample_size=sample_size, trained_sample_size=trained)
        self._set_positions()
        self.rotary, self.query_sinusoids = self.rotary.to(old), self.query_sinusoids.to(old)
