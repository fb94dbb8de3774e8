# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
The self-guidance adapter of UnlockMGM (Hur et al., NeurIPS 2024, arXiv 2410.13136). Its repository keeps the adapter and the
transformer that it was trained on in one file.
"""

from collections.abc import Mapping

import torch

from .checkpoints import ConversionError, Converted, Rename, common_size, count_indices, rename_tensors


# What open-muse's code takes where its config.json says nothing.
USE_BLANK_SECOND = False


def convert_toast(weights: Mapping[str, torch.Tensor], config: Mapping) -> Converted:
    """
    UnlockMGM's adapter as a `ToastAdapter`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The adapter's tensors, without those of its transformer
            (`maskgit_google.split_toast`).
        config (`Mapping`): The folder's config.json, or an empty one for the published settings.
    """
    num_layers = max(count_indices(weights, "decoders."), 1)
    hidden_size = common_size(
        weights,
        [("top_down_transform", 0), ("top_down_transform", 1)]
        + [(f"decoders.{i}.{name}.weight", 0) for i in range(num_layers) for name in ("linear", "linear2")],
    )
    anchor_factor = common_size(weights, [("cls_anchor_gen.mlp_f.weight", 1)])
    width = hidden_size * anchor_factor
    square = (hidden_size, hidden_size)
    anchor = "cls_anchor_gen."
    renames = [
        Rename("top_down_transform", "top_down_transform", square),
        Rename(anchor + "mlp_p.weight", "class_anchor.shared_embed", (1, width), torch.flatten),
        Rename(anchor + "mlp_c.weight", "class_anchor.class_embed.weight", (0, width)),
        Rename(anchor + "mlp_f.weight", "class_anchor.factor_weights", (1, anchor_factor), torch.flatten),
        Rename(anchor + "mlp_t.weight", "class_anchor.proj.weight", square),
        Rename(anchor + "mlp_t.bias", "class_anchor.proj.bias", (hidden_size,)),
        Rename(anchor + "layer_norm.weight", "class_anchor.norm.weight", (hidden_size,)),
        Rename(anchor + "layer_norm.bias", "class_anchor.norm.bias", (hidden_size,)),
    ]
    for i in range(num_layers):
        renames += [
            Rename(f"decoders.{i}.linear.weight", f"decoders.{i}.to_below.weight", square),
            Rename(f"decoders.{i}.linear2.weight", f"decoders.{i}.to_features.weight", square),
        ]
    state_dict = rename_tensors(weights, renames, "UnlockMGM self-guidance adapter")
    use_blank_second = config.get("use_blank_second", USE_BLANK_SECOND) if config else True
    if not isinstance(use_blank_second, bool):
        raise ConversionError(f"use_blank_second in the config.json is {use_blank_second!r}, not true or false.")
    converted_config = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_classes": len(state_dict["class_anchor.class_embed.weight"]),
        "anchor_factor": anchor_factor,
        "use_blank_second": use_blank_second,
    }
    return Converted(converted_config, state_dict, [])
