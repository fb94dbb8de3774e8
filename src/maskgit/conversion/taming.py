# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
VQGANs of taming transformers (Esser et al., CVPR 2021, arXiv 2012.09841; github.com/CompVis/taming-transformers), as
`diffusers.VQModel`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from .cards import Card
from .checkpoints import ConversionError, Converted, one_line
from .vqgan import Names, convert_vqgan


NAMES = Names(
    encoder_levels="encoder.down",
    decoder_levels="decoder.up",
    decoder_from_image=True,
    residual="block",
    middle=("block_1", "attn_1", "block_2"),
)

# What taming transformers can do and `diffusers.VQModel` cannot: in model.yaml, with the only value that fits, and tensors.
ONLY_VALUES = {"remap": None, "double_z": False, "resamp_with_conv": True, "give_pre_end": False}
FOREIGN_TENSORS = {
    "quantize.embed.weight": "its codes are chosen by a Gumbel softmax (quantize.embed)",
    "encoder.down.0.block.0.nin_shortcut.weight": "its first level has other channels than its first convolution (ch_mult that "
    "does not start with 1)",
}


def read_tokenizer_config(path: str | Path) -> dict:
    """The arguments of the VQGAN in a model.yaml: `model.params`, with its `ddconfig` on the same level."""
    try:
        contents = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid YAML: {one_line(error)}") from None
    for key in ("model", "params"):
        contents = contents.get(key) if isinstance(contents, dict) else None
    ddconfig = contents.get("ddconfig") if isinstance(contents, dict) else None
    if not isinstance(ddconfig, dict):
        raise ConversionError(f"{path} is no model.yaml of taming transformers: it has no model.params.ddconfig.")
    for name in ("resolution", "in_channels", "out_ch"):
        if not isinstance(ddconfig.get(name), int):
            raise ConversionError(
                f"{path}: ddconfig has {name} {ddconfig.get(name)!r}, but it must be a whole number."
            )
    return contents | ddconfig


def _check_config(path: str | Path, stated: Mapping, config: Mapping) -> None:
    """Raises a `ConversionError` where model.yaml says another thing than the tensors."""
    channels = config["block_out_channels"]
    sizes = [stated["resolution"] // 2**level for level in range(len(channels))]
    found = {
        "embed_dim": config["vq_embed_dim"],
        "n_embed": config["num_vq_embeddings"],
        "z_channels": config["latent_channels"],
        "ch": channels[0],
        "ch_mult": [size // channels[0] for size in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [size for size, kind in zip(sizes, config["down_block_types"]) if "Attn" in kind],
    }
    said = {name: stated.get(name) for name in found}
    if isinstance(said["attn_resolutions"], list):
        said["attn_resolutions"] = [size for size in sizes if size in said["attn_resolutions"]]
    for name, value in found.items():
        if said[name] != value:
            raise ConversionError(
                f"{path} says {name} {said[name]}, but by the tensors it is {value}: the two files do not belong together."
            )


def convert_taming_tokenizer(
    weights: Mapping[str, torch.Tensor], tokenizer_config: str | Path | None = None
) -> Converted:
    """
    A published VQGAN, of any number of levels, as a `diffusers.VQModel`: the same codes and images.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `state_dict`. What belongs to the training loss is dropped.
        tokenizer_config (`str` or `Path`, *optional*): The model.yaml beside it. It is compared with the tensors, and tells
            the size of the training images (256 without it) and images of other than 3 channels.
    """
    stated = None
    if tokenizer_config is not None:
        stated = read_tokenizer_config(tokenizer_config)
        for name, value in ONLY_VALUES.items():
            if stated.get(name, value) != value:
                raise ConversionError(
                    f"{tokenizer_config} has {name} {stated[name]}, which diffusers.VQModel cannot do: only {value}."
                )
    for name, reason in FOREIGN_TENSORS.items():
        if name in weights:
            raise ConversionError(f"{reason}, which diffusers.VQModel cannot do.")
    num_weights = len(weights)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
    dropped = [f"loss.* ({num_weights - len(weights)} tensors)"] if len(weights) < num_weights else []

    image_channels = (3, 3) if stated is None else (stated["in_channels"], stated["out_ch"])
    converted = convert_vqgan(weights, NAMES, "taming transformers VQGAN", image_channels)
    config = converted.config
    if stated is not None:
        _check_config(tokenizer_config, stated, config)
        config = config | {"sample_size": stated["resolution"]}
    return dataclasses.replace(converted, config=config, dropped=dropped)


def is_published(config: Mapping) -> bool:
    """Whether a converted tokenizer has the sizes of the one that MaskGIT-pytorch is published with."""
    return (
        config["num_vq_embeddings"] == 1024
        and config["vq_embed_dim"] == 256
        and config["block_out_channels"] == [128, 128, 256, 256, 512]
    )


CITATION = """\
@inproceedings{esser2021taming,
  title     = {Taming Transformers for High-Resolution Image Synthesis},
  author    = {Esser, Patrick and Rombach, Robin and Ommer, Bj{\\"o}rn},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2021}
}
"""


def describe_tokenizer(config: Mapping) -> Card:
    """The model card's part about a converted tokenizer."""
    title, base_model, results = "Taming transformers VQGAN", None, ""
    if is_published(config):
        title += " f16, 1024 codes"
        base_model = "llvictorll/Maskgit-pytorch"
        results = " Its authors report a reconstruction FID of 7.94 (50,000 validation images of ImageNet, 256 px)."
    return Card(
        title=title,
        summary="The tokenizer between images and codes is in the format of "
        "[taming transformers](https://github.com/CompVis/taming-transformers) "
        f"([paper](https://arxiv.org/abs/2012.09841)), converted to `diffusers.VQModel`.{results}",
        conversion="The tokenizer's tensors were renamed only; those of its training loss were left out. On small random "
        "checkpoints its codes equal those of the published code, and its images agree to 1e-4 (float32, CPU).",
        licence="Taming transformers, code: MIT. Its weights as published with MaskGIT-pytorch: MIT.",
        citation=CITATION,
        license="mit",
        base_model=base_model,
    )
