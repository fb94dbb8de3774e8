# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Google's MaskGIT (Chang et al., CVPR 2022, arXiv 2202.04200) from each of the three projects that publish its weights:
google-research/maskgit (Flax), hmorimitsu/maskgit-torch, and open-muse with its fork JiwanHur/UnlockMGM.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from .checkpoints import ConversionError, Converted, Rename, count_indices, rename_tensors


# Of the published transformers. The vocabulary holds the codes, the classes and the mask, in this order.
CODEBOOK_SIZE, NUM_CLASSES, HIDDEN_SIZE, NUM_HEADS = 1024, 1000, 768, 16
# Groups of the norms, which tensors do not tell; the same in all configurations of the three projects.
NUM_GROUPS = 32
# open-muse's own values of what a config.json leaves out.
MUSE_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_dropout": 0.0}
# Keys of open-muse's config.json that its tensors tell too.
MUSE_SIZES = {
    "vocab_size": "vocabulary",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "max_position_embeddings": "positions",
}
# What the names of a self-guidance adapter's tensors begin with.
TOAST_TENSORS = ("top_down_transform", "cls_anchor_gen.", "decoders.")


# Names and shapes


@dataclass(frozen=True)
class Tensor:
    """
    A tensor of a checkpoint whose sizes are not known yet.

    Args:
        source (`str`): Its name in the checkpoint.
        target (`str`): Its name in the model.
        sizes (`tuple`): Its shape in the checkpoint; names stand for sizes that several tensors share.
        change (`Callable`, *optional*): What is done to its values.
    """

    source: str
    target: str
    sizes: tuple[int | str, ...]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def _find_sizes(weights: Mapping[str, torch.Tensor], tensors: Iterable[Tensor]) -> dict[str, int]:
    """The sizes behind their names, as most tensors have them: one wrong tensor is then reported, instead of the others."""
    found: dict[str, dict[int, list[str]]] = {}
    for tensor in tensors:
        shape = tuple(weights[tensor.source].shape) if tensor.source in weights else ()
        for name, size in zip(tensor.sizes, shape if len(shape) == len(tensor.sizes) else ()):
            if isinstance(name, str):
                found.setdefault(name, {}).setdefault(size, []).append(tensor.source)
    sizes = {}
    for name, sources in found.items():
        first, *others = sorted(sources, key=lambda size: len(sources[size]), reverse=True)
        if others and len(sources[first]) == len(sources[others[0]]):
            one, other = (
                f"{source} ({' x '.join(map(str, weights[source].shape))})"
                for source in (sources[first][0], sources[others[0]][0])
            )
            raise ConversionError(f"{one} and {other} do not fit together: one of them is of another model.")
        sizes[name] = first
    return sizes


def _renames(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> list[Rename]:
    return [
        Rename(
            tensor.source,
            tensor.target,
            tuple(size if isinstance(size, int) else sizes.get(size, 0) for size in tensor.sizes),
            tensor.change,
        )
        for tensor in tensors
    ]


def _torch_layer(source: str, target: str, *sizes: int | str, bias: bool = True) -> Iterator[Tensor]:
    """A linear layer or convolution (the sizes of its weight) or a norm."""
    yield Tensor(source + ".weight", target + ".weight", sizes)
    if bias:
        yield Tensor(source + ".bias", target + ".bias", sizes[:1])


def _flax_layer(source: str, target: str, *sizes: int | str, bias: bool = True) -> Iterator[Tensor]:
    """The same, by the sizes that its weight has in PyTorch: Flax has outputs last and, in convolutions, inputs before them."""
    if len(sizes) == 1:
        yield Tensor(source + "/scale", target + ".weight", sizes)
    else:
        order = (1, 0) if len(sizes) == 2 else (3, 2, 0, 1)
        yield Tensor(
            source + "/kernel",
            target + ".weight",
            (*sizes[2:], sizes[1], sizes[0]),
            lambda kernel: kernel.permute(order),
        )
    if bias:
        yield Tensor(source + "/bias", target + ".bias", sizes[:1])


# Transformers


def split_toast(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a transformer, and those of the self-guidance adapter that UnlockMGM keeps in the same file."""
    toast = {name: tensor for name, tensor in weights.items() if name.startswith(TOAST_TENSORS)}
    return {name: tensor for name, tensor in weights.items() if name not in toast}, toast


def _flax_transformer(weights: Mapping[str, torch.Tensor]) -> Iterator[Tensor]:
    yield Tensor("Embed_0/word_embeddings/embedding", "token_embed.weight", ("vocabulary", "hidden"))
    yield Tensor("Embed_0/position_embeddings/embedding", "position_embed.weight", ("positions", "hidden"))
    yield from _flax_layer("Embed_0/embeddings_ln", "norm_in", "hidden")
    for i in range(max(count_indices(weights, "TransformerLayer_"), 1)):
        source, target = f"TransformerLayer_{i}/", f"transformer_blocks.{i}."
        attention = source + "Attention_0/self_attention/"
        for old, new in {"query": "attn.to_q", "key": "attn.to_k", "value": "attn.to_v"}.items():
            yield Tensor(
                f"{attention}{old}/kernel",
                f"{target}{new}.weight",
                ("hidden", "heads", "head"),
                lambda kernel: kernel.flatten(1).T,
            )
            yield Tensor(f"{attention}{old}/bias", f"{target}{new}.bias", ("heads", "head"), torch.flatten)
        yield Tensor(
            attention + "out/kernel",
            target + "attn.to_out.0.weight",
            ("heads", "head", "hidden"),
            lambda kernel: kernel.flatten(0, 1).T,
        )
        yield Tensor(attention + "out/bias", target + "attn.to_out.0.bias", ("hidden",))
        yield from _flax_layer(source + "Attention_0/attention_output_ln", target + "norm1", "hidden")
        yield from _flax_layer(
            source + "Mlp_0/intermediate_output", target + "ff.net.0.proj", "intermediate", "hidden"
        )
        yield from _flax_layer(source + "Mlp_0/layer_output", target + "ff.net.2", "hidden", "intermediate")
        yield from _flax_layer(source + "Mlp_0/layer_output_ln", target + "norm2", "hidden")
    yield from _flax_layer("MlmLayer_0/mlm_dense", "dense_out.proj", "hidden", "hidden")
    yield from _flax_layer("MlmLayer_0/mlm_ln", "norm_out", "hidden")
    yield Tensor("MlmLayer_0/mlm_bias/bias", "output_bias", ("vocabulary",))


def _torch_transformer(weights: Mapping[str, torch.Tensor]) -> Iterator[Tensor]:
    yield Tensor("tok_emb.weight", "token_embed.weight", ("vocabulary", "hidden"))
    yield Tensor("pos_emb", "position_embed.weight", ("positions", "hidden"))
    yield from _torch_layer("emb_ln", "norm_in", "hidden")
    for i in range(max(count_indices(weights, "blocks."), 1)):
        source, target = f"blocks.{i}.", f"transformer_blocks.{i}."
        yield Tensor(source + "MultiHeadAttention.in_proj_weight", target + "attn.to_qkv.weight", ("qkv", "hidden"))
        yield Tensor(source + "MultiHeadAttention.in_proj_bias", target + "attn.to_qkv.bias", ("qkv",))
        yield from _torch_layer(source + "MultiHeadAttention.out_proj", target + "attn.to_out.0", "hidden", "hidden")
        yield from _torch_layer(source + "AttentionLN", target + "norm1", "hidden")
        yield from _torch_layer(source + "MLP.0", target + "ff.net.0.proj", "intermediate", "hidden")
        yield from _torch_layer(source + "MLP.2", target + "ff.net.2", "hidden", "intermediate")
        yield from _torch_layer(source + "MlpLN", target + "norm2", "hidden")
    yield from _torch_layer("Token_Prediction.0", "dense_out.proj", "hidden", "hidden")
    yield from _torch_layer("Token_Prediction.2", "norm_out", "hidden")
    yield Tensor("bias", "output_bias", ("vocabulary",))


def _muse_transformer(weights: Mapping[str, torch.Tensor]) -> Iterator[Tensor]:
    yield Tensor("embed.word_embeddings.weight", "token_embed.weight", ("vocabulary", "hidden"))
    yield Tensor("embed.position_embeddings.weight", "position_embed.weight", ("positions", "hidden"))
    yield from _torch_layer("embed.embeddings_ln", "norm_in", "hidden")
    for i in range(max(count_indices(weights, "transformer_layers."), 1)):
        source, target = f"transformer_layers.{i}.", f"transformer_blocks.{i}."
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}.items():
            yield from _torch_layer(f"{source}attention.{old}", f"{target}attn.{new}", "hidden", "hidden")
        yield from _torch_layer(source + "attn_layer_norm", target + "norm1", "hidden")
        yield from _torch_layer(source + "ffn.intermediate_output", target + "ff.net.0.proj", "intermediate", "hidden")
        yield from _torch_layer(source + "ffn.layer_output", target + "ff.net.2", "hidden", "intermediate")
        yield from _torch_layer(source + "ffn.layer_norm", target + "norm2", "hidden")
    yield from _torch_layer("mlm_layer.mlm_dense", "dense_out.proj", "hidden", "hidden")
    yield from _torch_layer("mlm_layer.mlm_ln", "norm_out", "hidden")
    yield Tensor("mlm_layer.to_logits.weight", "head.weight", ("vocabulary", "hidden"))
    yield Tensor("mlm_layer.to_logits.bias", "output_bias", ("vocabulary",))


def _split_vocabulary(vocabulary: int, codebook_size: int | None, num_classes: int | None) -> tuple[int, int]:
    """Number of codes and of classes; the vocabulary holds the mask besides."""
    if codebook_size is None and num_classes is None:
        if vocabulary != CODEBOOK_SIZE + NUM_CLASSES + 1:
            raise ConversionError(
                f"the {vocabulary} rows of the embedding table are the codes, the classes and the mask, but not of the "
                f"published {CODEBOOK_SIZE} codes and {NUM_CLASSES} classes: give --codebook_size K or --num_classes N."
            )
        codebook_size = CODEBOOK_SIZE
    if codebook_size is None:
        codebook_size = vocabulary - 1 - num_classes
    elif num_classes is None:
        num_classes = vocabulary - 1 - codebook_size
    if min(codebook_size, num_classes) < 1 or codebook_size + num_classes + 1 != vocabulary:
        raise ConversionError(
            f"{codebook_size} codes, {num_classes} classes and the mask do not make the {vocabulary} rows of the "
            "embedding table."
        )
    return codebook_size, num_classes


def _find_grid(num_positions: int, sample_size: tuple[int, int] | None, name: str) -> int | tuple[int, int]:
    """The token grid behind `num_positions` rows of the table `name`, the first of which is the class's."""
    num_tokens = num_positions - 1
    side = math.isqrt(num_tokens)
    rows = f"the {num_tokens} image tokens that have a row in {name}, besides that of the class"
    if sample_size is not None:
        if min(sample_size) < 1 or math.prod(sample_size) != num_tokens:
            raise ConversionError(f"--sample_size {' '.join(map(str, sample_size))} is no grid of {rows}.")
    elif side * side != num_tokens or side == 0:
        raise ConversionError(f"{rows}, are no square grid: give its --sample_size H W.")
    return side if sample_size is None or sample_size[0] == sample_size[1] else sample_size


def _transformer_config(
    state_dict: Mapping[str, torch.Tensor],
    num_attention_heads: int,
    vocabulary: tuple[int, int],
    sample_size: tuple[int, int] | None,
    position_table: str,
    **other,
) -> dict:
    """The config of converted tensors; `vocabulary` is the number of codes and of classes."""
    hidden_size = state_dict["token_embed.weight"].shape[1]
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ConversionError(
            f"{num_attention_heads} attention heads do not divide the {hidden_size} channels of the hidden states."
        )
    return {
        "codebook_size": vocabulary[0],
        "num_classes": vocabulary[1],
        "sample_size": _find_grid(len(state_dict["position_embed.weight"]), sample_size, position_table),
        "hidden_size": hidden_size,
        "num_layers": count_indices(state_dict, "transformer_blocks."),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": len(state_dict["transformer_blocks.0.ff.net.0.proj.weight"]),
        "has_null_class": False,
        "dropout": 0.1,
        **other,
    }


def convert_flax_transformer(
    weights: Mapping[str, torch.Tensor],
    codebook_size: int | None = None,
    num_classes: int | None = None,
    sample_size: tuple[int, int] | None = None,
) -> Converted:
    """
    Google's transformer as a `MaskGitBertTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's "params", named as `read_flax` does.
        codebook_size (`int`, *optional*): Number of codes. Tensors tell that of codes and classes together only.
        num_classes (`int`, *optional*): Number of classes. One of both is enough; the defaults are the published ones.
        sample_size (`tuple[int, int]`, *optional*): Height and width of the token grid. Defaults to a square.
    """
    tensors = list(_flax_transformer(weights))
    sizes = _find_sizes(weights, tensors)
    state_dict = rename_tensors(weights, _renames(tensors, sizes), "Flax MaskGIT transformer")
    if sizes["heads"] * sizes["head"] != sizes["hidden"]:
        raise ConversionError(
            f"{sizes['heads']} heads of {sizes['head']} channels are not the {sizes['hidden']} channels of the hidden "
            "states: this is another model."
        )
    vocabulary = _split_vocabulary(sizes["vocabulary"], codebook_size, num_classes)
    config = _transformer_config(
        state_dict,
        sizes["heads"],
        vocabulary,
        sample_size,
        "Embed_0/position_embeddings/embedding",
        activation_fn="gelu-approximate",
        norm_eps=1e-12,
    )
    return Converted(config, state_dict, [])


def convert_torch_transformer(
    weights: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    sample_size: tuple[int, int] | None = None,
) -> Converted:
    """
    maskgit-torch's transformer as a `MaskGitBertTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The checkpoint's `state_dict`.
        num_attention_heads (`int`, *optional*): Heads, which cannot be read from the tensors. Defaults to the published 16
            where the width is the published one.
        codebook_size, num_classes, sample_size: As for `convert_flax_transformer`.
    """
    tensors = list(_torch_transformer(weights))
    sizes = _find_sizes(weights, tensors)
    sizes["qkv"] = 3 * sizes.get("hidden", 0)
    state_dict = rename_tensors(weights, _renames(tensors, sizes), "maskgit-torch transformer")
    for name in [name for name in state_dict if ".attn.to_qkv." in name]:
        for new, part in zip(("to_q", "to_k", "to_v"), state_dict.pop(name).chunk(3)):
            state_dict[name.replace("to_qkv", new)] = part
    vocabulary = _split_vocabulary(sizes["vocabulary"], codebook_size, num_classes)
    if num_attention_heads is None:
        if sizes["hidden"] != HIDDEN_SIZE:
            raise ConversionError(
                f"no published model is {sizes['hidden']} channels wide, so the number of attention heads is not known: give it "
                "as --num_attention_heads N."
            )
        num_attention_heads = NUM_HEADS
    config = _transformer_config(
        state_dict, num_attention_heads, vocabulary, sample_size, "pos_emb", activation_fn="gelu", norm_eps=1e-12
    )
    return Converted(config, state_dict, [])


def convert_muse_transformer(
    weights: Mapping[str, torch.Tensor], config: Mapping, sample_size: tuple[int, int] | None = None
) -> Converted:
    """
    The transformer that UnlockMGM starts from, an open-muse `MaskGitTransformer`, as a `MaskGitBertTransformer2DModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The model's tensors, without those of a self-guidance adapter
            (`split_toast`).
        config (`Mapping`): Its config.json, or an empty one for the published sizes.
        sample_size: As for `convert_flax_transformer`.
    """
    if split_toast(weights)[1]:
        raise ConversionError(
            "it holds a self-guidance adapter besides the transformer (top_down_transform, cls_anchor_gen, decoders): as a "
            "--transformer, give the base model that it was trained on."
        )
    tensors = list(_muse_transformer(weights))
    sizes = _find_sizes(weights, tensors)
    state_dict = rename_tensors(weights, _renames(tensors, sizes), "open-muse MaskGitTransformer")
    if not torch.equal(state_dict.pop("head.weight"), state_dict["token_embed.weight"]):
        raise ConversionError(
            "mlm_layer.to_logits.weight differs from embed.word_embeddings.weight, but MaskGIT ties them: this is another "
            "model."
        )
    published = {
        "codebook_size": CODEBOOK_SIZE,
        "num_classes": NUM_CLASSES,
        "num_attention_heads": NUM_HEADS,
        "layer_norm_eps": 1e-12,
        "hidden_dropout": 0.1,
    }
    values = MUSE_DEFAULTS | {name: config[name] for name in published if name in config} if config else published
    for name in published:
        kinds = (int, float) if name in ("layer_norm_eps", "hidden_dropout") else (int,)
        largest = 1 if name == "hidden_dropout" else sys.float_info.max
        # NaN is in no range, and a truth value is an int for Python.
        if type(values.get(name)) not in kinds or not 0 <= values[name] <= largest:
            raise ConversionError(f"{name} in the config.json is {values.get(name)!r}, not a number as expected.")
    num_layers = count_indices(state_dict, "transformer_blocks.")
    for name, size in {
        "num_hidden_layers": num_layers,
        **{key: sizes[kind] for key, kind in MUSE_SIZES.items()},
    }.items():
        if config.get(name, size) != size:
            raise ConversionError(
                f"{name} in the config.json is {config[name]!r}, but {size} by the tensors: they do not belong together."
            )
    vocabulary = _split_vocabulary(sizes["vocabulary"], values["codebook_size"], values["num_classes"])
    if config.get("mask_token_id", sizes["vocabulary"] - 1) != sizes["vocabulary"] - 1:
        raise ConversionError(
            f"mask_token_id in the config.json is {config['mask_token_id']}, but MaskGIT's mask is the last of the "
            f"{sizes['vocabulary']} rows of the embedding table: this is another model."
        )
    converted_config = _transformer_config(
        state_dict,
        values["num_attention_heads"],
        vocabulary,
        sample_size,
        "embed.position_embeddings.weight",
        activation_fn="gelu",
        norm_eps=values["layer_norm_eps"],
        dropout=values["hidden_dropout"],
        attention_out_dropout=False,
    )
    return Converted(
        converted_config, state_dict, ["mlm_layer.to_logits.weight (the same as embed.word_embeddings.weight)"]
    )


# Tokenizers


@dataclass(frozen=True)
class TokenizerNames:
    """
    What a project calls the parts of a tokenizer.

    Args:
        what (`str`): The checkpoint, for messages.
        levels (`int`): Number of levels.
        layers (`int`): Number of residual blocks of each.
        encoder_block (`Callable`): A residual block by its level, counted inwards, the middle last, and by its index there.
        decoder_block (`Callable`): The same, the middle first and then the levels outwards.
        upsampler (`Callable`): The convolution after the decoder's level that is counted so.
        encoder_ends, decoder_ends (`tuple[str, str, str]`): The first convolution, the last norm and the last convolution.
        residual (`tuple[str, ...]`): Inside a residual block: first norm and convolution, second ones, 1 x 1 convolution.
        codebook (`str`): The tensor of the codes.
        layer (`Callable`): `_torch_layer` or `_flax_layer`.
    """

    what: str
    levels: int
    layers: int
    encoder_block: Callable[[int, int], str]
    decoder_block: Callable[[int, int], str]
    upsampler: Callable[[int], str]
    encoder_ends: tuple[str, str, str]
    decoder_ends: tuple[str, str, str]
    residual: tuple[str, str, str, str, str]
    codebook: str
    layer: Callable[..., Iterator[Tensor]]


def _flax_tokenizer(weights: Mapping[str, torch.Tensor]) -> TokenizerNames:
    levels = max(count_indices(weights, "decoder/Conv_") - 1, 1)
    layers = max(count_indices(weights, "encoder/ResBlock_") // (levels + 1), 1)
    return TokenizerNames(
        what="Flax MaskGIT tokenizer",
        levels=levels,
        layers=layers,
        encoder_block=lambda level, i: f"encoder/ResBlock_{level * layers + i}",
        decoder_block=lambda level, i: f"decoder/ResBlock_{level * layers + i}",
        upsampler=lambda level: f"decoder/Conv_{level}",
        encoder_ends=("encoder/Conv_0", "encoder/GroupNorm_0", "encoder/Conv_1"),
        decoder_ends=("decoder/Conv_0", "decoder/GroupNorm_0", f"decoder/Conv_{levels}"),
        residual=("/GroupNorm_0", "/Conv_0", "/GroupNorm_1", "/Conv_1", "/Conv_2"),
        codebook="quantizer/codebook",
        layer=_flax_layer,
    )


TORCH_ENDS = {
    f"{part}_ends": (f"{part}.conv_in", f"{part}.norm_out", f"{part}.conv_out") for part in ("encoder", "decoder")
}


def _torch_tokenizer(weights: Mapping[str, torch.Tensor]) -> TokenizerNames:
    groups = max(count_indices(weights, f"{part}.res_blocks.") for part in ("encoder", "decoder"))
    layers = max([count_indices(weights, f"encoder.res_blocks.{i}.") for i in range(groups)], default=1)
    return TokenizerNames(
        what="maskgit-torch tokenizer",
        levels=max(groups - 1, 1),
        layers=max(layers, 1),
        encoder_block=lambda level, i: f"encoder.res_blocks.{level}.{i}",
        decoder_block=lambda level, i: f"decoder.res_blocks.{level}.{i}",
        upsampler=lambda level: f"decoder.res_blocks.{level}.{layers + 1}",
        **TORCH_ENDS,
        residual=(".norm0", ".conv0", ".norm1", ".conv1", ".conv_res"),
        codebook="quantizer.codebook.weight",
        layer=_torch_layer,
    )


def _muse_tokenizer(weights: Mapping[str, torch.Tensor]) -> TokenizerNames:
    levels = max(count_indices(weights, "encoder.down."), count_indices(weights, "decoder.up."), 1)
    layers = max(count_indices(weights, f"encoder.down.{i}.block.") for i in range(levels))
    return TokenizerNames(
        what="open-muse MaskGitVQGAN",
        levels=levels,
        layers=max(layers, 1),
        encoder_block=lambda level, i: f"encoder.down.{level}.block.{i}" if level < levels else f"encoder.mid.{i}",
        decoder_block=lambda level, i: f"decoder.up.{levels - level}.block.{i}" if level > 0 else f"decoder.mid.{i}",
        upsampler=lambda level: f"decoder.up.{levels - level}.upsample_conv",
        **TORCH_ENDS,
        residual=(".norm1", ".conv1", ".norm2", ".conv2", ".nin_shortcut"),
        codebook="quantize.embedding.weight",
        layer=_torch_layer,
    )


def _tokenizer_tensors(names: TokenizerNames, sizes: Mapping[str, int] | None = None) -> Iterator[Tensor]:
    """All tensors; without `sizes`, those that every tokenizer of so many levels and layers has."""
    layer = names.layer

    def residual_blocks(sources: Callable[[int], str], target: str, before: str, width: str) -> Iterator[Tensor]:
        for i in range(names.layers):
            norm1, conv1, norm2, conv2, conv_shortcut = (sources(i) + name for name in names.residual)
            block = f"{target}.resnets.{i}"
            yield from layer(norm1, block + ".norm1", before)
            yield from layer(conv1, block + ".conv1", width, before, 3, 3, bias=False)
            yield from layer(norm2, block + ".norm2", width)
            yield from layer(conv2, block + ".conv2", width, width, 3, 3, bias=False)
            if sizes is not None and sizes.get(before) != sizes.get(width):
                yield from layer(conv_shortcut, block + ".conv_shortcut", width, width, 1, 1, bias=False)
            before = width

    widths = [f"level {i}" for i in range(names.levels)]
    first, norm, last = names.encoder_ends
    yield from layer(first, "encoder.conv_in", widths[0], 3, 3, 3, bias=False)
    yield from layer(norm, "encoder.conv_norm_out", widths[-1])
    yield from layer(last, "encoder.conv_out", "latent", widths[-1], 1, 1)
    for i, width in enumerate([*widths, widths[-1]]):
        target = f"encoder.down_blocks.{i}" if i < names.levels else "encoder.mid_block"
        yield from residual_blocks(partial(names.encoder_block, i), target, widths[max(i - 1, 0)], width)
    yield Tensor(names.codebook, "quantize.embedding.weight", ("codes", "latent"))
    first, norm, last = names.decoder_ends
    yield from layer(first, "decoder.conv_in", widths[-1], "latent", 3, 3)
    yield from layer(norm, "decoder.conv_norm_out", widths[0])
    yield from layer(last, "decoder.conv_out", 3, widths[0], 3, 3)
    before = widths[-1]
    for i, width in enumerate([widths[-1], *reversed(widths)]):
        target = f"decoder.up_blocks.{i - 1}" if i > 0 else "decoder.mid_block"
        yield from residual_blocks(partial(names.decoder_block, i), target, before, width)
        if 0 < i < names.levels:
            yield from layer(names.upsampler(i), target + ".upsamplers.0.conv", width, width, 3, 3)
        before = width


def _convert_tokenizer(weights: Mapping[str, torch.Tensor], names: TokenizerNames, norm_eps: float) -> Converted:
    sizes = _find_sizes(weights, _tokenizer_tensors(names))
    state_dict = rename_tensors(weights, _renames(_tokenizer_tensors(names, sizes), sizes), names.what)
    widths = [sizes[f"level {i}"] for i in range(names.levels)]
    if any(width % NUM_GROUPS for width in widths):
        raise ConversionError(
            f"its levels have {', '.join(map(str, widths))} channels, but the norms of MaskGIT's tokenizers take multiples "
            f"of {NUM_GROUPS}: this is another model."
        )
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": names.layers,
        "latent_channels": sizes["latent"],
        "num_vq_embeddings": sizes["codes"],
        "norm_num_groups": NUM_GROUPS,
        "norm_eps": norm_eps,
    }
    return Converted(config, state_dict, [])


def convert_flax_tokenizer(weights: Mapping[str, torch.Tensor]) -> Converted:
    """Google's tokenizer, its "params" named as `read_flax` does, as a `MaskGitVQModel`."""
    return _convert_tokenizer(weights, _flax_tokenizer(weights), norm_eps=1e-6)


def convert_torch_tokenizer(weights: Mapping[str, torch.Tensor]) -> Converted:
    """maskgit-torch's tokenizer, the `state_dict` of its checkpoint, as a `MaskGitVQModel`."""
    return _convert_tokenizer(weights, _torch_tokenizer(weights), norm_eps=1e-5)  # PyTorch's default


def convert_muse_tokenizer(weights: Mapping[str, torch.Tensor], config: Mapping) -> Converted:
    """
    open-muse's tokenizer, a `MaskGitVQGAN`, as a `MaskGitVQModel`. Tensors tell all that `config`, its config.json, says.
    """
    return _convert_tokenizer(weights, _muse_tokenizer(weights), norm_eps=1e-6)
