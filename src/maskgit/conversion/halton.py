# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Transformers of Halton-MaskGIT (Besnier et al., ICLR 2025, arXiv 2503.17076; github.com/valeoai/Halton-MaskGIT)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..schedulers import HaltonScheduler
from .cards import Card
from .checkpoints import ConversionError, Converted, Rename, common_size, count_indices, rename_tensors
from .pgm import CITATION as PGM_CITATION
from .pgm import LICENCE as PGM_LICENCE


# Heads cannot be read from tensors. The published sizes, hidden size -> heads:
PUBLISHED_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}


@dataclass(frozen=True)
class PublishedResult:
    """A row of the authors' table: ImageNet, 50,000 images, Halton scheduler, 32 steps, guidance weight w of the paper."""

    name: str
    image_size: int
    guidance_weight: float
    fid: float
    inception_score: float
    downsampling: int = 16
    tokenizer: str = "vq_ds16_c2i.pt"
    temperature_warmup_steps: int = 0
    num_inference_steps: int = 32


# (hidden size, layers, tokens a side) -> result
PUBLISHED_RESULTS = {
    (384, 6, 16): PublishedResult("tiny", 256, 1.5, 10.2, 185),
    (512, 12, 16): PublishedResult("small", 256, 1.0, 6.40, 255),
    (768, 12, 16): PublishedResult("base", 256, 0.7, 4.17, 263),
    (512, 12, 24): PublishedResult("small", 384, 1.0, 6.11, 241),
    (768, 12, 24): PublishedResult("base", 384, 0.7, 4.15, 257),
    (1024, 24, 24): PublishedResult("large", 384, 0.5, 2.59, 281),
}
# The MaskGIT that Partition Generative Modeling compares with (maskgit_100epochs.ckpt): the same architecture.
PGM_BASELINE_SIZES = (1024, 24, 32)
PGM_BASELINE = PublishedResult(
    "baseline of Partition Generative Modeling",
    256,
    1.0,
    5.35,
    267.5,
    downsampling=8,
    tokenizer="vq_ds8_c2i.pt",
    temperature_warmup_steps=1,
)


def published_result(config: Mapping) -> PublishedResult | None:
    """The published result of a transformer of this config; None for other sizes, codebooks or numbers of classes."""
    if (config["codebook_size"], config["num_classes"]) != (16384, 1000):
        return None
    sizes = (config["hidden_size"], config["num_layers"], config["sample_size"])
    return PGM_BASELINE if sizes == PGM_BASELINE_SIZES else PUBLISHED_RESULTS.get(sizes)


def _renames(weights: Mapping[str, torch.Tensor]) -> list[Rename]:
    num_layers = max(count_indices(weights, "transformer.layers."), 1)
    layers = [f"transformer.layers.{i}." for i in range(num_layers)]
    hidden = common_size(
        weights,
        [("tok_emb.weight", 1), ("pos_emb.weight", 1), ("cls_emb.weight", 1), ("head.weight", 1)]
        + [("last_norm.norm_final.weight", 0), ("last_norm.norm_final.bias", 0), ("last_norm.mlp.1.weight", 1)]
        + [(f"{layer}ln{n}.weight", 0) for layer in layers for n in (1, 2)],
    )
    vocabulary = common_size(weights, [("tok_emb.weight", 0), ("head.weight", 0), ("head.bias", 0)])
    inner = common_size(
        weights, [(f"{layer}attn.{w}.weight", w == "wo") for layer in layers for w in ("wq", "wk", "wv", "wo")]
    )
    intermediate = common_size(
        weights, [(f"{layer}ff.{w}.weight", w == "w2") for layer in layers for w in ("w1", "w2", "w3")]
    )

    renames = [
        Rename("tok_emb.weight", "token_embed.weight", (vocabulary, hidden)),
        Rename("pos_emb.weight", "position_embed.weight", (0, hidden)),
        Rename("cls_emb.weight", "class_embed.weight", (0, hidden)),
        Rename("last_norm.norm_final.weight", "norm_out.weight", (hidden,)),
        Rename("last_norm.norm_final.bias", "norm_out.bias", (hidden,)),
        Rename("last_norm.mlp.1.weight", "adaln_out.weight", (2 * hidden, hidden)),
        Rename("last_norm.mlp.1.bias", "adaln_out.bias", (2 * hidden,)),
        Rename("head.weight", "head.weight", (vocabulary, hidden)),
        Rename("head.bias", "output_bias", (vocabulary,)),
    ]
    if "reg_tokens.weight" in weights:
        renames.append(Rename("reg_tokens.weight", "register_embed.weight", (0, hidden)))
    for i, layer in enumerate(layers):
        block = f"transformer_blocks.{i}."
        renames += [
            Rename(layer + "mlp.1.weight", block + "adaln.weight", (6 * hidden, hidden)),
            Rename(layer + "mlp.1.bias", block + "adaln.bias", (6 * hidden,)),
            Rename(layer + "ln1.weight", block + "norm1.weight", (hidden,)),
            Rename(layer + "attn.wq.weight", block + "attn.to_q.weight", (inner, hidden)),
            Rename(layer + "attn.wk.weight", block + "attn.to_k.weight", (inner, hidden)),
            Rename(layer + "attn.wv.weight", block + "attn.to_v.weight", (inner, hidden)),
            Rename(layer + "attn.wo.weight", block + "attn.to_out.0.weight", (hidden, inner)),
            Rename(layer + "ln2.weight", block + "norm2.weight", (hidden,)),
            # w2(silu(w1 x) * w3 x): diffusers' SwiGLU stacks the value above the gate.
            Rename(layer + "ff.w3.weight", block + "ff.net.0.proj.weight", (intermediate, hidden)),
            Rename(layer + "ff.w1.weight", block + "ff.net.0.proj.weight", (intermediate, hidden)),
            Rename(layer + "ff.w2.weight", block + "ff.net.2.weight", (hidden, intermediate)),
        ]
    return renames


def _check_heads(num_attention_heads: int | None, hidden_size: int, inner_size: int) -> int:
    fitting = [n for n in range(1, hidden_size + 1) if n * (hidden_size // n) == inner_size]
    fits = f"attn.wq has {inner_size} rows for {hidden_size} channels, which fits {', '.join(map(str, fitting)) or 'no'} heads"
    if num_attention_heads is None:
        if hidden_size not in PUBLISHED_HEADS:
            raise ConversionError(
                f"no published model is {hidden_size} channels wide, so the number of attention heads is not known: give it "
                f"as --num_attention_heads N ({fits})."
            )
        num_attention_heads = PUBLISHED_HEADS[hidden_size]
        if num_attention_heads not in fitting:
            raise ConversionError(
                f"published models of {hidden_size} channels have {num_attention_heads} heads, this one has not ({fits}): "
                "give --num_attention_heads N."
            )
    if num_attention_heads not in fitting:
        raise ConversionError(f"{num_attention_heads} attention heads do not fit: {fits}.")
    return num_attention_heads


def convert_halton_transformer(
    weights: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    sample_size: tuple[int, int] | None = None,
) -> Converted:
    """
    The published transformer as a `MaskGitDiTTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `model_state_dict`.
        num_attention_heads (`int`, *optional*): Heads, which cannot be read from the tensors. Defaults to those of the
            published model of the same width.
        sample_size (`tuple[int, int]`, *optional*): Height and width of the token grid. Defaults to a square.
    """
    state_dict = rename_tensors(weights, _renames(weights), "Halton-MaskGIT transformer")
    if not torch.equal(state_dict.pop("head.weight"), state_dict["token_embed.weight"]):
        raise ConversionError(
            "head.weight differs from tok_emb.weight, but Halton-MaskGIT ties them: this is another model."
        )
    for name, source, rest in (("token", "tok_emb", "the mask"), ("class", "cls_emb", '"no class"')):
        if len(state_dict[f"{name}_embed.weight"]) < 2:
            raise ConversionError(f"{source}.weight has a single row, that of {rest}: this is no trained model.")
    hidden_size = state_dict["token_embed.weight"].shape[1]
    num_positions = len(state_dict["position_embed.weight"])
    side = math.isqrt(num_positions)
    if sample_size is not None:
        if min(sample_size) < 1 or math.prod(sample_size) != num_positions:
            raise ConversionError(
                f"--sample_size {' '.join(map(str, sample_size))} is no grid of the {num_positions} positions that "
                "pos_emb.weight has."
            )
    elif side * side != num_positions:
        raise ConversionError(
            f"pos_emb.weight has {num_positions} positions, which is no square grid: give its --sample_size H W."
        )
    if sample_size is None or sample_size[0] == sample_size[1]:
        sample_size = side

    config = {
        "codebook_size": len(state_dict["token_embed.weight"]) - 1,  # and the mask
        "num_classes": len(state_dict["class_embed.weight"]) - 1,  # and "no class"
        "sample_size": sample_size,
        "hidden_size": hidden_size,
        "num_layers": count_indices(weights, "transformer.layers."),
        "num_attention_heads": _check_heads(
            num_attention_heads, hidden_size, len(state_dict["transformer_blocks.0.attn.to_q.weight"])
        ),
        "intermediate_size": state_dict["transformer_blocks.0.ff.net.2.weight"].shape[1],
        "num_register_tokens": len(state_dict.get("register_embed.weight", ())),
        "has_null_class": True,
    }
    return Converted(config, state_dict, ["head.weight (the same as tok_emb.weight)"])


def check_fit(transformer: Mapping, tokenizer: Mapping) -> None:
    """Raises a `ConversionError` where a published transformer, by its config, is given another tokenizer than its own."""
    published = published_result(transformer)
    factor = 2 ** (len(tokenizer["block_out_channels"]) - 1)
    if published is not None and factor != published.downsampling:
        raise ConversionError(
            f"the transformer is the published {published.name} for {published.image_size} pixels, of a tokenizer that "
            f"makes one token of {published.downsampling} x {published.downsampling} pixels ({published.tokenizer}), but this "
            f"tokenizer makes one of {factor} x {factor}: they do not belong together."
        )


def make_scheduler(transformer: Mapping) -> HaltonScheduler:
    """The published sampler."""
    published = published_result(transformer)
    return HaltonScheduler(
        mask_token_id=transformer["codebook_size"],
        temperature_warmup_steps=0 if published is None else published.temperature_warmup_steps,
    )


def call_defaults(transformer: Mapping) -> dict | None:
    """The settings of the published result of this size, as arguments of a pipeline's call."""
    published = published_result(transformer)
    if published is None:
        return None
    return {
        "guidance_scale": round(1 + published.guidance_weight, 4),
        "num_inference_steps": published.num_inference_steps,
    }


CITATION = """\
@inproceedings{besnier2025halton,
  title     = {Halton Scheduler for Masked Generative Image Transformer},
  author    = {Besnier, Victor and Chen, Mickael and Hurych, David and Valle, Eduardo and Cord, Matthieu},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
"""


def describe_transformer(config: Mapping) -> Card:
    """The model card's part about a converted transformer."""
    title, base_model, results, training = "Halton-MaskGIT", None, "", ""
    licence, citation = "Halton-MaskGIT, code and weights: MIT.", CITATION
    published = published_result(config)
    if published is not None:
        title += f" {published.name}, {published.image_size} px"
        base_model, steps = "llvictorll/Halton-Maskgit", "1.5 million steps of batch 256"
        protocol = "ImageNet, 50,000 images, Halton scheduler"
        if published is PGM_BASELINE:
            base_model, steps = "jdeschena/pgm", "100 epochs of batch 256"
            protocol = (
                "ImageNet 256 px, 50,000 images of the labels of the validation set, FID against its images (centre crops), "
                "Halton scheduler; the published sampler drew all known tokens anew at every step, this one keeps them"
            )
            licence, citation = PGM_LICENCE, f"{PGM_CITATION}\n{CITATION}"
        results = (
            f"Published by the authors for their model of this size, not measured on this conversion: {protocol}.\n\n"
            "| steps | guidance_scale (1 + the paper's w) | FID | inception score |\n|---|---|---|---|\n"
            f"| {published.num_inference_steps} | {call_defaults(config)['guidance_scale']} | {published.fid} | "
            f"{published.inception_score} |"
        )
        training = (
            f"ImageNet-1k, training split, as tokens of the LlamaGen tokenizer; {steps}, by the authors. The model knows "
            "the 1000 classes of that data only, and shares its biases."
        )
    return Card(
        title=title,
        summary="A class-conditional masked generative image transformer in the format of "
        "[Halton-MaskGIT](https://github.com/valeoai/Halton-MaskGIT) ([paper](https://arxiv.org/abs/2503.17076)), "
        "converted for diffusers.",
        conversion="The two input matrices of each feed-forward layer were joined, and the output matrix, a copy of the token "
        "embedding, was left out; all other tensors were renamed only. On small random checkpoints the converted "
        "model's logits agree with those of the published code to 2e-4 (float32, CPU).",
        licence=licence,
        citation=citation,
        license="mit",
        base_model=base_model,
        results=results,
        training=training,
    )
