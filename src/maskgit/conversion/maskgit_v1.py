# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Transformers of MaskGIT-pytorch v1.0 (Besnier and Chen, 2023, arXiv 2310.14400; github.com/valeoai/Halton-MaskGIT, branch
v1.0).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..schedulers import ConfidenceScheduler
from .cards import Card
from .checkpoints import ConversionError, Converted, Rename, common_size, count_indices, rename_tensors


# Tensors tell neither the heads nor how the vocabulary is divided. In the published models, hidden size -> heads:
PUBLISHED_HEADS = {768: 16, 1024: 16}
PUBLISHED_CODES, PUBLISHED_CLASSES = 1024, 1000
NUM_EXTRA_TOKENS = 2  # the mask and "no class"


@dataclass(frozen=True)
class PublishedResult:
    """
    A row of the authors' table, with the settings of their README: confidence sampler, arccos schedule, guidance weight that
    grows linearly to w, noise that falls linearly to 0.
    """

    image_size: int
    num_inference_steps: int
    guidance_weight: float
    choice_temperature: float
    fid: float
    inception_score: float
    precision: float
    recall: float
    density: float
    coverage: float
    training: str
    downsampling: int = 16


# (hidden size, layers, tokens a side) -> result
PUBLISHED_RESULTS = {
    (768, 24, 16): PublishedResult(
        256, 8, 3.0, 4.5, 6.80, 214.0, 0.82, 0.51, 1.25, 0.84, "755,200 steps of batch 512 (300 epochs)"
    ),
    (768, 24, 32): PublishedResult(
        512,
        15,
        2.8,
        7.0,
        7.26,
        223.1,
        0.85,
        0.49,
        1.33,
        0.86,
        "about 750,000 steps of batch 128 from the 256 px model",
    ),
}


def published_result(config: Mapping) -> PublishedResult | None:
    """The published result of a transformer of this config; None for other sizes, codebooks or numbers of classes."""
    if (config["codebook_size"], config["num_classes"]) != (PUBLISHED_CODES, PUBLISHED_CLASSES):
        return None
    return PUBLISHED_RESULTS.get((config["hidden_size"], config["num_layers"], config["sample_size"]))


def _pair(source: str, target: str, *shape: int) -> Iterator[Rename]:
    yield Rename(source + ".weight", target + ".weight", shape)
    yield Rename(source + ".bias", target + ".bias", shape[:1])


def _renames(weights: Mapping[str, torch.Tensor]) -> Iterator[Rename]:
    num_layers = max(count_indices(weights, "transformer.layers."), 1)
    layers = [f"transformer.layers.{i}." for i in range(num_layers)]
    hidden = common_size(
        weights,
        [("tok_emb.weight", 1), ("pos_emb", 2)]
        + [
            (f"{head}_layer.{i}.{kind}", 0)
            for head in ("first", "last")
            for i in (0, 2, 4)
            for kind in ("weight", "bias")
        ]
        + [(f"{layer}{i}.norm.weight", 0) for layer in layers for i in (0, 1)],
    )
    intermediate = common_size(
        weights,
        [
            (f"{layer}1.fn.net.{name}", name == "3.weight")
            for layer in layers
            for name in ("0.weight", "0.bias", "3.weight")
        ],
    )

    yield Rename("tok_emb.weight", "token_embed.weight", (0, hidden))
    yield Rename("pos_emb", "position_embed.weight", (1, 0, hidden), lambda positions: positions[0])
    yield Rename("bias", "output_bias", (0, 0))
    yield from _pair("first_layer.0", "input_head.norm1", hidden)
    yield from _pair("first_layer.2", "input_head.linear1", hidden, hidden)
    yield from _pair("first_layer.4", "input_head.norm2", hidden)
    yield from _pair("first_layer.6", "input_head.linear2", hidden, hidden)
    for i, layer in enumerate(layers):
        block = f"transformer_blocks.{i}."
        yield from _pair(layer + "0.norm", block + "norm1", hidden)
        # The three projections of one matrix, which are told apart afterwards.
        yield Rename(layer + "0.fn.mha.in_proj_weight", block + "attn.qkv.weight", (3 * hidden, hidden))
        yield Rename(layer + "0.fn.mha.in_proj_bias", block + "attn.qkv.bias", (3 * hidden,))
        yield from _pair(layer + "0.fn.mha.out_proj", block + "attn.to_out.0", hidden, hidden)
        yield from _pair(layer + "1.norm", block + "norm2", hidden)
        yield from _pair(layer + "1.fn.net.0", block + "ff.net.0.proj", intermediate, hidden)
        yield from _pair(layer + "1.fn.net.3", block + "ff.net.2", hidden, intermediate)
    yield from _pair("last_layer.0", "output_head.norm1", hidden)
    yield from _pair("last_layer.2", "output_head.linear", hidden, hidden)
    yield from _pair("last_layer.4", "output_head.norm2", hidden)


def _find_heads(num_attention_heads: int | None, hidden_size: int) -> int:
    if num_attention_heads is None:
        if hidden_size not in PUBLISHED_HEADS:
            raise ConversionError(
                f"no published model is {hidden_size} channels wide, so the number of attention heads is not known: give it "
                "as --num_attention_heads N."
            )
        return PUBLISHED_HEADS[hidden_size]
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ConversionError(
            f"{num_attention_heads} attention heads do not fit: {hidden_size} channels are not divisible."
        )
    return num_attention_heads


def _divide_vocabulary(vocabulary_size: int, codebook_size: int | None, num_classes: int | None) -> tuple[int, int]:
    """Numbers of codes and of classes."""
    left = vocabulary_size - NUM_EXTRA_TOKENS
    if codebook_size is None and num_classes is None:
        if left != PUBLISHED_CODES + PUBLISHED_CLASSES:
            raise ConversionError(
                f"tok_emb.weight has {vocabulary_size} rows, not the {PUBLISHED_CODES + PUBLISHED_CLASSES + NUM_EXTRA_TOKENS} of "
                "the published models, so how many are codes and how many classes is not known: give --codebook_size K, "
                "--num_classes N or the --tokenizer."
            )
        return PUBLISHED_CODES, PUBLISHED_CLASSES
    given = {"codes": codebook_size, "classes": num_classes}
    codebook_size = left - num_classes if codebook_size is None else codebook_size
    num_classes = left - codebook_size if num_classes is None else num_classes
    if min(codebook_size, num_classes) < 1 or codebook_size + num_classes != left:
        stated = " and ".join(f"{number} {what}" for what, number in given.items() if number is not None)
        raise ConversionError(
            f"{stated} do not fit: codes, mask, classes and dropped class must make the {vocabulary_size} rows of "
            "tok_emb.weight. Check --codebook_size, --num_classes and whether the --tokenizer is this transformer's."
        )
    return codebook_size, num_classes


def convert_v1_transformer(
    weights: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    codebook_size: int | None = None,
    num_classes: int | None = None,
) -> Converted:
    """
    The published transformer as a `MaskGitViTTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `model_state_dict`.
        num_attention_heads (`int`, *optional*): Heads, which cannot be read from the tensors. Defaults to those of the
            published model of the same width.
        codebook_size (`int`, *optional*): Number of codes, which the tokenizer tells. Defaults to that of the published
            models where the vocabulary is of their size.
        num_classes (`int`, *optional*): Number of classes. Defaults to what the vocabulary leaves beside the codes.
    """
    state_dict = rename_tensors(weights, list(_renames(weights)), "MaskGIT-pytorch v1 transformer")
    num_layers = count_indices(weights, "transformer.layers.")
    for i in range(num_layers):
        for kind in ("weight", "bias"):
            attn = f"transformer_blocks.{i}.attn."
            projections = state_dict.pop(f"{attn}qkv.{kind}").chunk(3)
            state_dict |= {
                f"{attn}{name}.{kind}": tensor for name, tensor in zip(("to_q", "to_k", "to_v"), projections)
            }

    vocabulary_size, hidden_size = state_dict["token_embed.weight"].shape
    num_positions = len(state_dict["position_embed.weight"])
    bias = state_dict["output_bias"]
    if bias.shape != (num_positions, vocabulary_size):
        raise ConversionError(
            f"bias is {len(bias)} x {bias.shape[1]}, but pos_emb has {num_positions} positions and tok_emb.weight "
            f"{vocabulary_size} rows: one of them is not this model's."
        )
    side = math.isqrt(num_positions - 1)
    if side * side != num_positions - 1 or side == 0:
        raise ConversionError(
            f"pos_emb has {num_positions} positions, which are not those of a square grid and the class."
        )
    codebook_size, num_classes = _divide_vocabulary(vocabulary_size, codebook_size, num_classes)

    config = {
        "codebook_size": codebook_size,
        "num_classes": num_classes,
        "sample_size": side,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": _find_heads(num_attention_heads, hidden_size),
        "intermediate_size": len(state_dict["transformer_blocks.0.ff.net.0.proj.bias"]),
        "has_null_class": True,
    }
    return Converted(config, state_dict, [])


def check_fit(transformer: Mapping, tokenizer: Mapping) -> None:
    """Raises a `ConversionError` where a published transformer, by its config, is given another tokenizer than its own."""
    published = published_result(transformer)
    factor = 2 ** (len(tokenizer["block_out_channels"]) - 1)
    if published is not None and factor != published.downsampling:
        raise ConversionError(
            f"the transformer is the published one for {published.image_size} pixels, of a tokenizer that makes one token of "
            f"{published.downsampling} x {published.downsampling} pixels, but this tokenizer makes one of {factor} x "
            f"{factor}: they do not belong together."
        )


def make_scheduler(transformer: Mapping) -> ConfidenceScheduler:
    """The published sampler, whose schedule goes on as if nothing were known for partly known images too."""
    published = published_result(transformer)
    return ConfidenceScheduler(
        mask_token_id=transformer["codebook_size"],
        masking_schedule="arccos",
        choice_temperature=4.5 if published is None else published.choice_temperature,
        progress="elapsed_increments",
        schedule_all_tokens=True,
        mask_logit_counts=True,
    )


def call_defaults(transformer: Mapping) -> dict | None:
    """The settings of the published result of this size, as arguments of a pipeline's call."""
    published = published_result(transformer)
    if published is None:
        return None
    return {
        "guidance_scale": round(1 + published.guidance_weight, 4),
        "guidance_schedule": "linear",
        "num_inference_steps": published.num_inference_steps,
    }


CITATION = """\
@article{besnier2023pytorch,
  title   = {A Pytorch Reproduction of Masked Generative Image Transformer},
  author  = {Besnier, Victor and Chen, Mickael},
  journal = {arXiv preprint arXiv:2310.14400},
  year    = {2023}
}
"""


def describe_transformer(config: Mapping) -> Card:
    """The model card's part about a converted transformer."""
    title, base_model, results, training = "MaskGIT-pytorch v1", None, "", ""
    published = published_result(config)
    if published is not None:
        title += f", {published.image_size} px"
        base_model = "llvictorll/Maskgit-pytorch"
        results = (
            "Published by the authors for their model of this size, not measured on this conversion: 50,000 images of the "
            "labels of ImageNet's validation set, against that set; each image, real or generated, stretched to its own "
            "minimum and maximum before the Inception network of torch-fidelity, so that these numbers compare with each "
            "other only.\n\n"
            "| steps | guidance_scale (1 + the paper's w), linear | choice_temperature | FID | inception score | "
            "precision / recall | density / coverage |\n|---|---|---|---|---|---|---|\n"
            f"| {published.num_inference_steps} | {call_defaults(config)['guidance_scale']} | "
            f"{published.choice_temperature} | {published.fid:.2f} | {published.inception_score} | "
            f"{published.precision} / {published.recall} | {published.density} / {published.coverage} |"
        )
        training = (
            f"ImageNet-1k, training split, as tokens of the tokenizer; {published.training}, by the authors. The model knows "
            "the 1000 classes of that data only, and shares its biases."
        )
    return Card(
        title=title,
        summary="A class-conditional masked generative image transformer in the format of MaskGIT-pytorch "
        "([code](https://github.com/valeoai/Halton-MaskGIT/tree/v1.0), [paper](https://arxiv.org/abs/2310.14400)), "
        "converted for diffusers.",
        conversion="The joint query, key and value matrix of each attention was divided; all other tensors were renamed only. "
        "On small random checkpoints the converted model's logits agree with those of the published code to 2e-5 (float32, "
        "CPU).",
        licence="MaskGIT-pytorch, code and weights: MIT.",
        citation=CITATION,
        license="mit",
        base_model=base_model,
        results=results,
        training=training,
    )
