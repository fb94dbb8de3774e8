#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Convert published checkpoints to a folder that `MaskGitPipeline.from_pretrained` loads.

    python scripts/convert_to_diffusers.py halton --transformer ImageNet_384_large.pth --tokenizer vq_ds16_c2i.pt \\
        --output_dir halton-large-384

With only a transformer, or only a tokenizer, the folder holds it alone, in transformer/ or vqvae/. Sizes are read from the
tensors. Nothing is written unless every tensor is accounted for and the written folder loads as the same model.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from diffusers import VQModel
from huggingface_hub.utils import validate_repo_id

from maskgit import HaltonScheduler, MaskGitDiTTransformer2DModel
from maskgit.conversion import (
    ConversionError,
    Converted,
    convert_halton_transformer,
    convert_llamagen_tokenizer,
    halton,
    read_weights,
)
from maskgit.conversion.folders import imagenet_labels, new_folder, write_models
from maskgit.model_card import MODEL_ID
from maskgit.options import user_errors
from maskgit.publishing import push_folder_to_hub


def convert(args: argparse.Namespace, file: str, function: Callable[..., Converted], **given) -> Converted:
    """Converts one file and says what was found in it."""
    print(f"reading {file}")
    weights, others = read_weights(file, trust_pickle=args.trust_pickle)
    try:
        converted = function(weights, **given)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from None
    parameters = sum(tensor.numel() for tensor in converted.state_dict.values())
    sizes = {name: value for name, value in converted.config.items() if not isinstance(value, list)}
    print(f"  {parameters / 1e6:.1f}M parameters: {', '.join(f'{name} {value}' for name, value in sizes.items())}")
    print(f"  dropped: {', '.join(converted.dropped + others) or 'nothing'}")
    return converted


def convert_halton(args: argparse.Namespace, folder: Path) -> None:
    models = {}
    if args.transformer:
        heads, grid = args.num_attention_heads, args.sample_size
        models["transformer"] = (
            MaskGitDiTTransformer2DModel,
            convert(args, args.transformer, convert_halton_transformer, num_attention_heads=heads, sample_size=grid),
        )
        if heads is None:
            print("  num_attention_heads is that of the published model of this width: tensors do not tell it")
    if args.tokenizer:
        models["vqvae"] = (VQModel, convert(args, args.tokenizer, convert_llamagen_tokenizer))

    configs = {name: model[1].config for name, model in models.items()}
    pipeline_arguments = {}
    if len(models) == 2:
        halton.check_fit(configs["transformer"], configs["vqvae"])
        pipeline_arguments = {
            "scheduler": HaltonScheduler(mask_token_id=configs["transformer"]["codebook_size"]),
            "id2label": imagenet_labels() if configs["transformer"]["num_classes"] == 1000 else None,
            "call_defaults": halton.call_defaults(configs["transformer"]),
        }
    print("writing and verifying")
    write_models(folder, models, **pipeline_arguments)
    halton.write_card(folder, configs.get("transformer"), configs.get("vqvae"), args.push_to_hub or MODEL_ID)


def how_to_use(output_dir: str, parts: list[str]) -> str:
    if len(parts) == 2:
        return (
            "    from maskgit import MaskGitPipeline\n\n"
            f'    pipe = MaskGitPipeline.from_pretrained("{output_dir}")\n'
            '    pipe(class_labels=1).images[0].save("sample.png")\n\n'
            f"or: maskgit sample --model {output_dir} --classes 1"
        )
    module, name = {"transformer": ("maskgit", "MaskGitDiTTransformer2DModel"), "vqvae": ("diffusers", "VQModel")}[
        parts[0]
    ]
    return (
        f"    from {module} import {name}\n\n"
        f'    model = {name}.from_pretrained("{output_dir}", subfolder="{parts[0]}")'
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True, help="which project's checkpoints")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write")
    common.add_argument("--overwrite", action="store_true", help="replace the folder if it is not empty")
    common.add_argument(
        "--trust_pickle",
        action="store_true",
        help="open pickles that hold more than tensors, which lets them run any program: for files you trust",
    )
    common.add_argument("--push_to_hub", metavar="ID", help="also upload the folder to this Hub repository, user/name")

    source = sources.add_parser(
        "halton",
        parents=[common],
        help="Halton-MaskGIT transformer, LlamaGen tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source.add_argument("--transformer", metavar="FILE", help="ImageNet_{256,384}_{tiny,small,base,large}.pth")
    source.add_argument("--tokenizer", metavar="FILE", help="vq_ds16_c2i.pt; with the transformer: a whole pipeline")
    source.add_argument(
        "--num_attention_heads",
        type=int,
        metavar="N",
        help="heads (default: those of the published model of this width)",
    )
    source.add_argument(
        "--sample_size", type=int, nargs=2, metavar=("H", "W"), help="token grid, where it is not square"
    )
    source.set_defaults(convert=convert_halton)

    args = parser.parse_args(argv)
    with user_errors():
        inputs = [file for file in (args.transformer, args.tokenizer) if file]
        if not inputs:
            raise ConversionError("nothing to convert: give --transformer FILE, --tokenizer FILE or both.")
        if args.push_to_hub:
            validate_repo_id(args.push_to_hub)
        with new_folder(args.output_dir, args.overwrite, inputs) as folder:
            args.convert(args, folder)
            parts = [name for name in ("transformer", "vqvae") if (folder / name).is_dir()]
        print(f"wrote {args.output_dir}\n\nUse it:\n\n{how_to_use(args.output_dir, parts)}")
        if args.push_to_hub:
            print(f"\nuploaded: {push_folder_to_hub(args.output_dir, args.push_to_hub)}")


if __name__ == "__main__":
    main()
