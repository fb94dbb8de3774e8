# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
The self-guidance adapter of UnlockMGM (Hur et al., NeurIPS 2024, arXiv 2410.13136). Its repository keeps the adapter and the
transformer that it was trained on in one file.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..schedulers import SelfGuidedScheduler
from .cards import Card
from .checkpoints import ConversionError, Converted, Rename, common_size, count_indices, rename_tensors
from .maskgit_google import split_toast
from .maskgit_google_files import read_muse_folder


# What open-muse's code takes where its config.json says nothing.
USE_BLANK_SECOND = False
# Scale of the noise on the confidences, for the published token grids of 16 x 16 (256 px) and 32 x 32 (512 px).
CHOICE_TEMPERATURES = {16: 25.0, 32: 45.0}


def read_transformer(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], list[str], dict]:
    """Reads the transformer from a folder that holds its adapter too, as `read_muse_folder` does."""
    weights, others, config = read_muse_folder(path, trust_pickle)
    return split_toast(weights)[0], others, config


def read_toast(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], list[str], dict]:
    """Reads the adapter from a folder that holds its transformer too, as `read_muse_folder` does."""
    weights, others, config = read_muse_folder(path, trust_pickle)
    return split_toast(weights)[1], others, config


def convert_toast(weights: Mapping[str, torch.Tensor], config: Mapping) -> Converted:
    """
    UnlockMGM's adapter as a `ToastAdapter`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The adapter's tensors, without those of its transformer.
        config (`Mapping`): The folder's config.json, or an empty one for the published settings.
    """
    if not weights:
        raise ConversionError(
            "it holds no self-guidance adapter (top_down_transform, cls_anchor_gen, decoders): as a --toast, give a folder that "
            "the fine-tuning wrote, ema_model."
        )
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


def make_scheduler(transformer: Mapping) -> SelfGuidedScheduler:
    """The published sampler."""
    return SelfGuidedScheduler(
        mask_token_id=transformer["codebook_size"],
        choice_temperature=CHOICE_TEMPERATURES.get(transformer["sample_size"], CHOICE_TEMPERATURES[16]),
    )


def call_defaults(transformer: Mapping) -> dict:
    """The published settings, alike for both image sizes."""
    return {"num_inference_steps": 18, "self_guidance_scale": 1.0}


CITATION = """\
@article{shi2023toast,
  title   = {TOAST: Transfer Learning via Attention Steering},
  author  = {Shi, Baifeng and Gai, Siyu and Darrell, Trevor and Wang, Xin},
  journal = {arXiv preprint arXiv:2305.15542},
  year    = {2023}
}
"""


def describe_toast(config: Mapping) -> Card:
    """The model card's part about a converted adapter."""
    training = ""
    if (config["hidden_size"], config["num_layers"], config["num_classes"]) == (768, 24, 1000):
        training = (
            "Adapter: ImageNet-1k, training split, 50,000 steps of batch 256 with the transformer frozen, by the configs of "
            "[UnlockMGM](https://github.com/JiwanHur/UnlockMGM), whose authors publish it as "
            "[HURJIWAN/UnlockMGM](https://huggingface.co/HURJIWAN/UnlockMGM)."
        )
    return Card(
        title="UnlockMGM self-guidance adapter",
        summary="The adapter guides the transformer by itself: the difference between its plain prediction and that of a second, "
        "smoothed pass sharpens each step of sampling. It is a [TOAST](https://arxiv.org/abs/2305.15542) adapter in the format of "
        "[UnlockMGM](https://github.com/JiwanHur/UnlockMGM) ([paper](https://arxiv.org/abs/2410.13136)), converted for "
        "diffusers.",
        conversion="Adapter: its tensors were renamed, and two of them flattened; nothing else was changed. On small random "
        "checkpoints its features, the guided logits and the sampled tokens agree with those of the published code.",
        licence="JiwanHur/UnlockMGM, which publishes the adapter, has no licence file: ask its authors before you pass it on.",
        citation=CITATION,
        training=training,
    )
