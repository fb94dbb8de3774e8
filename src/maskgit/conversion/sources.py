# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""The published projects whose checkpoints can be converted: one entry of `SOURCES` each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin, SchedulerMixin, VQModel

from ..models import (
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitViTTransformer2DModel,
    MaskGitVQModel,
    PartitionTransformer2DModel,
    ToastAdapter,
)
from . import halton, llamagen, maskgit_google, maskgit_google_cards, maskgit_v1, pgm, taming, unlockmgm
from .cards import Card
from .checkpoints import ConversionError, Converted, read_weights
from .maskgit_google_files import read_flax, read_muse_folder


@dataclass(frozen=True)
class Part:
    """
    One part of a published pipeline.

    Args:
        files (`str`): Names of the published files, for the command's help.
        model_class (`type`): What it becomes.
        convert (`Callable`): Tensors by name (and whatever else `read` found), and `options`, to a `Converted`.
        describe (`Callable`): The converted config to what the model card says.
        read (`Callable`): `read(path, trust_pickle=)` gives the tensors by name, the names of the file's other entries, and
            perhaps the config that lay beside them.
        options (`tuple[str, ...]`): What `convert` must be told because tensors do not tell it: names of command line options
            and keyword arguments.
        assumed (`tuple[str, ...]`): Those of `options` for which `convert` takes the published value where it is not told.
        flax (`Part`, *optional*): What converts Google's own files, which have no suffix, where these are taken too.
    """

    files: str
    model_class: type[ModelMixin]
    convert: Callable[..., Converted]
    describe: Callable[[Mapping], Card]
    read: Callable = read_weights
    options: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    flax: "Part | None" = None

    def for_file(self, file: str | Path) -> "Part":
        """What converts this file."""
        return self.flax if self.flax is not None and Path(file).is_file() and not Path(file).suffix else self


@dataclass(frozen=True)
class SelfGuidance:
    """
    The self-guidance adapters of a project, whose files hold the transformer too.

    Args:
        adapter (`Part`): Its adapters.
        read_transformer (`Callable`): As `read` of the source's transformer, from a file of `adapter`.
        make_scheduler, call_defaults (`Callable`): As those of the source, for a transformer with its adapter.
    """

    adapter: Part
    read_transformer: Callable
    make_scheduler: Callable[[Mapping], SchedulerMixin]
    call_defaults: Callable[[Mapping], dict | None]


@dataclass(frozen=True)
class Source:
    """
    A published project.

    Args:
        summary (`str`): One line of help.
        transformer (`Part`): Its transformers.
        tokenizer (`Part`): Its tokenizers.
        make_scheduler (`Callable`): The transformer's converted config to a scheduler with the published settings.
        call_defaults (`Callable`): The transformer's converted config to the pipeline's `call_defaults`, or None.
        check_fit (`Callable`, *optional*): Raises a `ConversionError` where both configs do not belong together, though the
            transformer predicts as many codes as the tokenizer has.
        self_guidance (`SelfGuidance`, *optional*): Its self-guidance adapters.
    """

    summary: str
    transformer: Part
    tokenizer: Part
    make_scheduler: Callable[[Mapping], SchedulerMixin]
    call_defaults: Callable[[Mapping], dict | None]
    check_fit: Callable[[Mapping, Mapping], None] | None = None
    self_guidance: SelfGuidance | None = None


LLAMAGEN_TOKENIZER = Part(
    files="vq_ds16_c2i.pt, vq_ds8_c2i.pt",
    model_class=VQModel,
    convert=llamagen.convert_llamagen_tokenizer,
    describe=llamagen.describe_tokenizer,
)

FLAX_TOKENIZER = Part(
    files="tokenizer_imagenet{256,512}_checkpoint",
    model_class=MaskGitVQModel,
    convert=maskgit_google.convert_flax_tokenizer,
    describe=partial(maskgit_google_cards.describe_tokenizer, "maskgit-jax"),
    read=read_flax,
)

SOURCES = {
    "halton": Source(
        summary="Halton-MaskGIT transformer, LlamaGen tokenizer",
        transformer=Part(
            files="ImageNet_{256,384}_{tiny,small,base,large}.pth",
            model_class=MaskGitDiTTransformer2DModel,
            convert=halton.convert_halton_transformer,
            describe=halton.describe_transformer,
            options=("num_attention_heads", "sample_size"),
            assumed=("num_attention_heads",),
        ),
        tokenizer=LLAMAGEN_TOKENIZER,
        make_scheduler=halton.make_scheduler,
        call_defaults=halton.call_defaults,
        check_fit=halton.check_fit,
    ),
    "maskgit-v1": Source(
        summary="MaskGIT-pytorch v1 transformer, taming transformers VQGAN",
        transformer=Part(
            files="MaskGIT_ImageNet_{256,512}.pth",
            model_class=MaskGitViTTransformer2DModel,
            convert=maskgit_v1.convert_v1_transformer,
            describe=maskgit_v1.describe_transformer,
            options=("num_attention_heads", "codebook_size", "num_classes"),
            assumed=("num_attention_heads",),
        ),
        tokenizer=Part(
            files="last.ckpt",
            model_class=VQModel,
            convert=taming.convert_taming_tokenizer,
            describe=taming.describe_tokenizer,
            options=("tokenizer_config",),
        ),
        make_scheduler=maskgit_v1.make_scheduler,
        call_defaults=maskgit_v1.call_defaults,
        check_fit=maskgit_v1.check_fit,
    ),
    "maskgit-jax": Source(
        summary="Google's MaskGIT and its tokenizer, in Flax",
        transformer=Part(
            files="maskgit_imagenet{256,512}_checkpoint",
            model_class=MaskGitBertTransformer2DModel,
            convert=maskgit_google.convert_flax_transformer,
            describe=partial(maskgit_google_cards.describe_transformer, "maskgit-jax"),
            read=read_flax,
            options=("codebook_size", "num_classes", "sample_size"),
        ),
        tokenizer=FLAX_TOKENIZER,
        make_scheduler=maskgit_google_cards.make_scheduler,
        call_defaults=maskgit_google_cards.call_defaults,
    ),
    "maskgit-torch": Source(
        summary="Google's MaskGIT and its tokenizer, as maskgit-torch converted them",
        transformer=Part(
            files="maskgit_imagenet{256,512}.ckpt",
            model_class=MaskGitBertTransformer2DModel,
            convert=maskgit_google.convert_torch_transformer,
            describe=partial(maskgit_google_cards.describe_transformer, "maskgit-torch"),
            options=("num_attention_heads", "codebook_size", "num_classes", "sample_size"),
            assumed=("num_attention_heads",),
        ),
        tokenizer=Part(
            files="tokenizer_imagenet{256,512}.ckpt",
            model_class=MaskGitVQModel,
            convert=maskgit_google.convert_torch_tokenizer,
            describe=partial(maskgit_google_cards.describe_tokenizer, "maskgit-torch"),
        ),
        make_scheduler=maskgit_google_cards.make_scheduler,
        call_defaults=maskgit_google_cards.call_defaults,
    ),
    "unlockmgm": Source(
        summary="Google's MaskGIT and its tokenizer, as open-muse and UnlockMGM converted them",
        transformer=Part(
            files="folder with config.json and pytorch_model.bin",
            model_class=MaskGitBertTransformer2DModel,
            convert=maskgit_google.convert_muse_transformer,
            describe=partial(maskgit_google_cards.describe_transformer, "unlockmgm"),
            read=read_muse_folder,
            options=("sample_size",),
        ),
        tokenizer=Part(
            files="folder of openMUSE/maskgit-vqgan-imagenet-f16-256, maskgit-vqgan-imagenet-f16-256.bin, or Google's "
            "tokenizer_imagenet512_checkpoint",
            model_class=MaskGitVQModel,
            convert=maskgit_google.convert_muse_tokenizer,
            describe=partial(maskgit_google_cards.describe_tokenizer, "unlockmgm"),
            read=read_muse_folder,
            flax=FLAX_TOKENIZER,  # open-muse publishes none for 512 px
        ),
        make_scheduler=maskgit_google_cards.make_muse_scheduler,
        call_defaults=maskgit_google_cards.muse_call_defaults,
        self_guidance=SelfGuidance(
            adapter=Part(
                files="folder of UnlockMGM_imagenet_{256,512}.zip, or its ema_model",
                model_class=ToastAdapter,
                convert=unlockmgm.convert_toast,
                describe=unlockmgm.describe_toast,
                read=unlockmgm.read_toast,
            ),
            read_transformer=unlockmgm.read_transformer,
            make_scheduler=unlockmgm.make_scheduler,
            call_defaults=unlockmgm.call_defaults,
        ),
    ),
    "pgm": Source(
        summary="Partition Generative Modeling transformer, LlamaGen tokenizer",
        transformer=Part(
            files="images_pgm_{12_12,14_10}_100epochs.ckpt",
            model_class=PartitionTransformer2DModel,
            convert=pgm.convert_pgm_transformer,
            describe=pgm.describe_transformer,
            options=("query_mode", "sample_size"),
            assumed=("query_mode", "sample_size"),
        ),
        tokenizer=LLAMAGEN_TOKENIZER,
        make_scheduler=pgm.make_scheduler,
        call_defaults=pgm.call_defaults,
        check_fit=pgm.check_fit,
    ),
}


def check_same_transformer(given: Converted, adapted: Converted) -> None:
    """Raises a `ConversionError` unless an adapter's own transformer, `adapted`, is the `given` one, tensor by tensor."""
    different = [name for name, value in given.config.items() if name != "dropout" and adapted.config[name] != value]
    for name, tensor in given.state_dict.items():
        if not different and not torch.equal(tensor, adapted.state_dict[name]):
            different.append(name)
    if different:
        raise ConversionError(
            f"the adapter of --toast was trained on another transformer than this --transformer, with another {different[0]}. "
            "Leave out --transformer: the folder of --toast holds the right one."
        )


def check_adapter(adapter: Mapping, transformer: Mapping) -> None:
    """Raises a `ConversionError` unless an adapter, by its config, has the sizes of the transformer."""
    for name in ("hidden_size", "num_layers", "num_classes"):
        if adapter[name] != transformer[name]:
            raise ConversionError(
                f"the adapter is of another transformer: its {name} is {adapter[name]}, the transformer's {transformer[name]}."
            )


def check_fit(source: Source, transformer: Mapping, tokenizer: Mapping) -> None:
    """Raises a `ConversionError` unless the transformer, by its config, predicts this tokenizer's codes."""
    if transformer["codebook_size"] != tokenizer["num_vq_embeddings"]:
        raise ConversionError(
            f"the transformer predicts {transformer['codebook_size']} codes, but the tokenizer has "
            f"{tokenizer['num_vq_embeddings']}: they do not belong together."
        )
    if source.check_fit is not None:
        source.check_fit(transformer, tokenizer)
