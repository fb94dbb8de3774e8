# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


# Shapes: B images, S sequence of the transformer (image tokens, and its class or register tokens), C hidden_size,
# A anchor_factor, L num_layers.


class ToastClassAnchor(nn.Module):
    """What of a hidden state matters to an image of a class: a direction for each class, long (B,) -> (B, C)."""

    def __init__(self, hidden_size: int, num_classes: int, anchor_factor: int):
        super().__init__()
        self.anchor_factor = anchor_factor
        self.class_embed = nn.Embedding(num_classes, hidden_size * anchor_factor)
        self.shared_embed = nn.Parameter(torch.empty(hidden_size * anchor_factor))
        self.factor_weights = nn.Parameter(torch.empty(anchor_factor))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, class_labels: torch.LongTensor) -> torch.Tensor:
        embeds = self.class_embed(class_labels) + self.shared_embed  # (B, C * A)
        anchor = (embeds.unflatten(-1, (-1, self.anchor_factor)) * self.factor_weights).sum(-1)  # (B, C)
        return self.proj(self.norm(anchor))


class ToastDecoder(nn.Module):
    """One step from the last layer back to the first: what a layer sends to the one below it, and its own features."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.to_below = nn.Linear(hidden_size, hidden_size, bias=False)
        self.to_features = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = self.to_below(hidden_states)
        return hidden_states, self.to_features(hidden_states)


class ToastAdapter(ModelMixin, ConfigMixin):
    """
    Selects from a masked transformer's last hidden states what belongs to the image's class, and sends it back to every
    layer of a second pass of the same, frozen transformer over a blank canvas. That pass predicts a smoothed version of the
    image: the difference to the plain prediction guides sampling (`self_guidance_scale` of the pipeline).

    Sources: Hur et al., "Unlocking the Capabilities of Masked Generative Models for Image Synthesis via Self-Guidance"
    (NeurIPS 2024, arXiv 2410.13136); the module is that of Shi et al., "TOAST: Transfer Learning via Attention Steering"
    (arXiv 2305.15542).

    Args:
        hidden_size (`int`, defaults to 768): Width of the transformer's hidden states.
        num_layers (`int`, defaults to 24): Number of its blocks.
        num_classes (`int`, defaults to 1000): Number of its classes, without "no class".
        anchor_factor (`int`, defaults to 16): How many times wider than the hidden states the table of classes is.
        use_blank_second (`bool`, defaults to `True`): Whether the second pass sees a blank canvas without a class, as in the
            published models. Otherwise it sees what the first pass saw.
    """

    _no_split_modules = ["ToastClassAnchor"]
    _repeated_blocks = ["ToastDecoder"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_classes: int = 1000,
        anchor_factor: int = 16,
        use_blank_second: bool = True,
    ):
        super().__init__()
        self.class_anchor = ToastClassAnchor(hidden_size, num_classes, anchor_factor)
        self.top_down_transform = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.decoders = nn.ModuleList([ToastDecoder(hidden_size) for _ in range(num_layers)])
        self._initialize_weights()

    def _initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(self.class_anchor.proj.bias)
        nn.init.trunc_normal_(self.class_anchor.shared_embed, std=0.02)
        nn.init.trunc_normal_(self.class_anchor.factor_weights, std=0.02)
        nn.init.eye_(self.top_down_transform)

    def forward(self, hidden_states: torch.Tensor, class_labels: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, S, hidden_size)`):
                The transformer's `last_hidden_state`, of all tokens of its sequence.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`): Classes in `[0, num_classes)`.

        Returns:
            `tuple[torch.Tensor]`: The features for each block from the first to the last, `num_layers` times
            `(batch_size, S, hidden_size)`: the `top_down_features` of the transformer's second pass.
        """
        anchor = F.normalize(self.class_anchor(class_labels), dim=-1)[:, None]  # (B, 1, C)
        similarity = (F.normalize(hidden_states, dim=-1) * anchor).sum(-1, keepdim=True)  # (B, S, 1)
        hidden_states = (similarity.clamp(0, 1) * hidden_states) @ self.top_down_transform
        features = []
        for decoder in reversed(self.decoders):
            hidden_states, layer_features = decoder(hidden_states)
            features.insert(0, layer_features)
        return tuple(features)
