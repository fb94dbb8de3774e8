# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Transformers of Partition Generative Modeling (Deschenaux et al., ICLR 2026, arXiv 2505.18883; github.com/jdeschena/pgm)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..schedulers import HaltonScheduler
from .cards import Card
from .checkpoints import ConversionError, Converted, Rename, common_size, count_indices, rename_tensors


@dataclass(frozen=True)
class PublishedResult:
    """One of the authors' results: ImageNet 256 px, Halton scheduler, guidance weight growing from 0 to w of the paper."""

    num_inference_steps: int
    guidance_weight: float
    fid: float
    inception_score: float


# (encoder blocks, decoder blocks) -> the best results with 32 and 64 steps
PUBLISHED_RESULTS = {
    (12, 12): (PublishedResult(32, 3.0, 5.54, 263.5), PublishedResult(64, 2.0, 4.56, 219.0)),
    (14, 10): (PublishedResult(32, 3.0, 5.55, 253.8), PublishedResult(64, 2.0, 4.76, 212.4)),
}
PUBLISHED_GRID = 32  # tokens a side; positions are not among the tensors
DOWNSAMPLING = 8  # of the tokenizer

SELF_ATTENTION = ("norm1", "attn_qkv")
CROSS_ATTENTION = ("q_norm1", "kv_norm1", "attn_q", "attn_kv")


def published_results(config: Mapping) -> tuple[PublishedResult, ...]:
    """The published results of a transformer of this config; none for other sizes."""
    sizes = (config["codebook_size"], config["num_classes"], config["sample_size"], config["hidden_size"])
    if sizes != (16384, 1000, PUBLISHED_GRID, 1024) or config["self_attention_layers"]:
        return ()
    return PUBLISHED_RESULTS.get((config["num_layers"], config["num_decoder_layers"]), ())


def _part(index: int, count: int):
    """Function that takes one of `count` matrices which were stored as one."""
    return lambda tensor: tensor.chunk(count)[index]


def _pair(source: str, target: str, *shape: int) -> Iterator[Rename]:
    """Weight of `shape` and bias of a layer."""
    yield Rename(f"{source}.weight", f"{target}.weight", shape)
    yield Rename(f"{source}.bias", f"{target}.bias", shape[:1])


def _block(source: str, target: str, hidden: int, intermediate: int, is_cross: bool) -> Iterator[Rename]:
    if is_cross:
        yield Rename(f"{source}.q_norm1.weight", f"{target}.norm1.weight", (hidden,))
        yield Rename(f"{source}.kv_norm1.weight", f"{target}.norm_context.weight", (hidden,))
        yield Rename(f"{source}.attn_q.weight", f"{target}.attn.to_q.weight", (hidden, hidden))
        joined, names = "attn_kv", "kv"
    else:
        yield Rename(f"{source}.norm1.weight", f"{target}.norm1.weight", (hidden,))
        joined, names = "attn_qkv", "qkv"
    for i, name in enumerate(names):
        shape = (len(names) * hidden, hidden)
        yield Rename(f"{source}.{joined}.weight", f"{target}.attn.to_{name}.weight", shape, _part(i, len(names)))
    yield Rename(f"{source}.attn_out.weight", f"{target}.attn.to_out.0.weight", (hidden, hidden))
    yield Rename(f"{source}.norm2.weight", f"{target}.norm2.weight", (hidden,))
    yield from _pair(f"{source}.mlp.0", f"{target}.ff.net.0.proj", intermediate, hidden)
    yield from _pair(f"{source}.mlp.2", f"{target}.ff.net.2", hidden, intermediate)
    yield from _pair(f"{source}.adaLN_modulation", f"{target}.adaln", 6 * hidden, hidden)


def _renames(
    weights: Mapping[str, torch.Tensor], num_layers: int, num_decoder_layers: int, own: list[int]
) -> Iterator[Rename]:
    blocks = [f"encoder.blocks.{i}" for i in range(num_layers)]
    blocks += [f"decoder.layers.{i}" for i in range(num_decoder_layers)]
    swap = "decoder.group_swap"
    hidden = common_size(
        weights,
        [("vocab_embed.embedding", 1), ("cls_embed.embedding_table.weight", 1), ("output_layer.norm_final.weight", 0)]
        + [(f"{swap}.base_embedding", 1), (f"{swap}.pre_query_norm.weight", 0), (f"{swap}.output_linear.weight", 0)]
        + [(f"{block}.norm2.weight", 0) for block in blocks],
    )
    intermediate = common_size(
        weights,
        [(f"{block}.mlp.{name}", axis) for block in blocks for name, axis in (("0.weight", 0), ("2.weight", 1))],
    )
    vocabulary = common_size(
        weights, [("vocab_embed.embedding", 0), ("output_layer.linear.weight", 0), ("output_layer.linear.bias", 0)]
    )
    mask = max(vocabulary - 2, 0)  # behind the codes; BOS is behind it

    yield Rename("rotary_emb.inv_freq", "rotary_frequencies", (0,))
    yield Rename("vocab_embed.embedding", "token_embed.weight", (vocabulary, hidden), lambda tensor: tensor[:mask])
    if "reg_tokens.weight" in weights:
        yield Rename("reg_tokens.weight", "prefix_embed.weight", (0, hidden))
    yield Rename(
        "vocab_embed.embedding", "prefix_embed.weight", (vocabulary, hidden), lambda tensor: tensor[mask + 1 :]
    )
    yield Rename("cls_embed.embedding_table.weight", "class_embed.weight", (0, hidden))
    for i in range(num_layers):
        yield from _block(f"encoder.blocks.{i}", f"transformer_blocks.{i}", hidden, intermediate, is_cross=False)

    yield Rename(f"{swap}.base_embedding", "group_swap.query_embed", (1, hidden), torch.Tensor.flatten)
    yield from _pair(f"{swap}.pre_query_norm", "group_swap.norm", hidden)
    if count_indices(weights, f"{swap}.query_processor."):
        yield from _pair(f"{swap}.query_processor.0", "group_swap.attn.to_q.0", 4 * hidden, hidden)
        yield from _pair(f"{swap}.query_processor.2", "group_swap.attn.to_q.2", hidden, 4 * hidden)
    else:
        yield from _pair(f"{swap}.query_processor", "group_swap.attn.to_q", hidden, hidden)
    for kind, shape in (("weight", (2 * hidden, hidden)), ("bias", (2 * hidden,))):
        source = f"{swap}.hidden_to_key_value.{kind}"
        yield Rename(source, f"group_swap.attn.to_k.{kind}", shape, _part(0, 2))
        yield Rename(source, f"group_swap.attn.to_v.{kind}", shape, _part(1, 2))
    yield from _pair(f"{swap}.output_linear", "group_swap.attn.to_out.0", hidden, hidden)
    for i in range(num_decoder_layers):
        yield from _block(f"decoder.layers.{i}", f"decoder_blocks.{i}", hidden, intermediate, is_cross=i not in own)

    yield Rename("output_layer.norm_final.weight", "norm_out.weight", (hidden,))
    yield from _pair("output_layer.adaLN_modulation", "adaln_out", 2 * hidden, hidden)
    for kind, shape in (("weight", (vocabulary, hidden)), ("bias", (vocabulary,))):
        source = f"output_layer.linear.{kind}"
        yield Rename(source, f"proj_out.{kind}", shape, lambda tensor: tensor[:mask])
        yield Rename(source, f"proj_bos.{kind}", shape, lambda tensor: tensor[mask + 1 :])


def convert_pgm_transformer(
    weights: Mapping[str, torch.Tensor],
    query_mode: str | None = None,
    sample_size: tuple[int, int] | None = None,
) -> Converted:
    """
    The published transformer as a `PartitionTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `model_state_dict`.
        query_mode (`str`, *optional*): What queries are made of, `pre_query_mode` of the training: learn, learn+freqs,
            learn+freqs+mean or learn+freqs+logsumexp. It cannot be read from the tensors; defaults to the published
            models' learn+freqs.
        sample_size (`tuple[int, int]`, *optional*): Height and width of the token grid, which cannot be read from the tensors
            either. Defaults to the published models' 32 x 32.
    """
    num_layers = max(count_indices(weights, "encoder.blocks."), 1)
    num_decoder_layers = max(count_indices(weights, "decoder.layers."), 1)
    own = []  # decoder blocks that attend to the queries of their own group, as encoder blocks do
    for i in range(num_decoder_layers):
        votes = {
            names: sum(f"decoder.layers.{i}.{name}.weight" in weights for name in names)
            for names in (SELF_ATTENTION, CROSS_ATTENTION)
        }
        if votes[SELF_ATTENTION] > votes[CROSS_ATTENTION]:
            own.append(i)
    renames = list(_renames(weights, num_layers, num_decoder_layers, own))
    state_dict = rename_tensors(weights, renames, "Partition Generative Modeling transformer")

    frequencies = state_dict.pop("rotary_frequencies")
    codebook_size, hidden_size = state_dict["token_embed.weight"].shape
    if codebook_size < 1:
        raise ConversionError(
            f"vocab_embed.embedding has {len(weights['vocab_embed.embedding'])} rows, but besides the mask and the begin of the "
            "sequence there must be codes: this is no trained model."
        )
    if len(state_dict["class_embed.weight"]) < 2:
        raise ConversionError(
            'cls_embed.embedding_table.weight has a single row, that of "no class": this is no trained model.'
        )
    num_attention_heads, left = divmod(hidden_size, 2 * len(frequencies))
    if left or num_attention_heads == 0:
        raise ConversionError(
            f"rotary_emb.inv_freq has {len(frequencies)} frequencies, so a head has {2 * len(frequencies)} channels, but "
            f"{hidden_size} channels are no multiple of that."
        )
    num_register_tokens = len(state_dict["prefix_embed.weight"]) - 1
    if num_register_tokens % 2:
        raise ConversionError(f"reg_tokens.weight has {num_register_tokens} registers, but both groups need as many.")
    height, width = sample_size or (PUBLISHED_GRID, PUBLISHED_GRID)
    if min(height, width) < 1:
        raise ConversionError(f"--sample_size {height} {width} is no grid.")

    config = {
        "codebook_size": codebook_size,
        "num_classes": len(state_dict["class_embed.weight"]) - 1,  # and "no class"
        "sample_size": height if height == width else (height, width),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_decoder_layers": num_decoder_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": state_dict["transformer_blocks.0.ff.net.2.weight"].shape[1],
        "num_register_tokens": num_register_tokens,
        "self_attention_layers": own or None,
        "query_mode": query_mode or "learn+freqs",
        "query_processor": "mlp4" if "group_swap.attn.to_q.2.weight" in state_dict else "linear",
        "has_null_class": True,
        "rotary_frequencies": frequencies.tolist(),
    }
    never_used = f"row {codebook_size} of vocab_embed and output_layer.linear (the mask token, which is never read nor predicted)"
    return Converted(config, state_dict, [never_used])


def check_fit(transformer: Mapping, tokenizer: Mapping) -> None:
    """Raises a `ConversionError` where a published transformer, by its config, is given another tokenizer than its own."""
    factor = 2 ** (len(tokenizer["block_out_channels"]) - 1)
    if published_results(transformer) and factor != DOWNSAMPLING:
        raise ConversionError(
            f"the transformer is a published one, of a tokenizer that makes one token of {DOWNSAMPLING} x {DOWNSAMPLING} "
            f"pixels (vq_ds8_c2i.pt), but this tokenizer makes one of {factor} x {factor}: they do not belong together."
        )


def make_scheduler(transformer: Mapping) -> HaltonScheduler:
    """The published sampler, which draws the first step's tokens at twice the temperature."""
    return HaltonScheduler(mask_token_id=transformer["codebook_size"], temperature_warmup_steps=1)


def call_defaults(transformer: Mapping) -> dict | None:
    """The settings of the published result of this size with 32 steps, as arguments of a pipeline's call."""
    published = published_results(transformer)
    if not published:
        return None
    return {
        "guidance_scale": 1 + published[0].guidance_weight,
        "guidance_schedule": "linear",
        "num_inference_steps": published[0].num_inference_steps,
    }


LICENCE = "Partition Generative Modeling, code and weights: announced as MIT by its authors."
CITATION = """\
@inproceedings{deschenaux2026partition,
  title     = {Partition Generative Modeling: Masked Modeling Without Masks},
  author    = {Deschenaux, Justin and Tran, Lan and Gulcehre, Caglar},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}
"""


def describe_transformer(config: Mapping) -> Card:
    """The model card's part about a converted transformer."""
    title, base_model, results, training = "Partition Generative Modeling", None, "", ""
    published = published_results(config)
    if published:
        title += f" {config['num_layers']}-{config['num_decoder_layers']}, 256 px"
        base_model = "jdeschena/pgm"
        rows = [
            f"| {row.num_inference_steps} | {1 + row.guidance_weight:g}, linear | {row.fid} | {row.inception_score} |"
            for row in published
        ]
        results = (
            "Published by the authors for their model of this size, not measured on this conversion: ImageNet 256 px, 50,000 "
            "images, FID against the validation images, Halton scheduler.\n\n"
            "| steps | guidance_scale (1 + the paper's w) and its schedule | FID | inception score |\n|---|---|---|---|\n"
            + "\n".join(rows)
        )
        training = (
            "ImageNet-1k, training split, as tokens of the LlamaGen tokenizer; 500 thousand steps of batch 256, by the "
            "authors. The model knows the 1000 classes of that data only, and shares its biases."
        )
    return Card(
        title=title,
        summary="A class-conditional generative image transformer that encodes known tokens only, in the format of "
        "[Partition Generative Modeling](https://github.com/jdeschena/pgm) ([paper](https://arxiv.org/abs/2505.18883)), "
        "converted for diffusers.",
        conversion="The joined matrices of queries, keys and values were taken apart, the begin-of-sequence token's embedding was "
        "put to the registers, and the mask token's rows, which the model never uses, were left out; all other tensors "
        "were renamed only. On small random checkpoints the converted model's logits agree with those of the published code "
        "to 2e-4 (float32, CPU). The published samplers hide the last known token from the model by mistake, this one does not: "
        "`published_lengths` in the transformer's config brings that back, for tokens given in the order in which they were drawn.",
        licence=LICENCE,
        citation=CITATION,
        license="mit",
        base_model=base_model,
        results=results,
        training=training,
    )
