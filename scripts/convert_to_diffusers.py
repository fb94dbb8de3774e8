#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Convert published checkpoints to a folder that `MaskGitPipeline.from_pretrained` loads.

    python scripts/convert_to_diffusers.py halton --transformer ImageNet_384_large.pth --tokenizer vq_ds16_c2i.pt \\
        --output_dir halton-large-384

With only a transformer, or only a tokenizer, the folder holds it alone, in transformer/ or vqvae/; a self-guidance adapter, in
toast/, comes with its transformer. Sizes are read from the tensors. Nothing is written unless every tensor is accounted for and the written folder loads as the same model.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from maskgit.conversion import ConversionError, Converted
from maskgit.conversion.cards import write_card
from maskgit.conversion.folders import imagenet_labels, new_folder, write_models
from maskgit.conversion.sources import SOURCES, Part, check_adapter, check_fit, check_same_transformer
from maskgit.models.transformer_partition import QUERY_MODES
from maskgit.options import user_errors
from maskgit.publishing import push_folder_to_hub


# What tensors do not tell, for the sources that list it among their options.
OPTIONS = {
    "num_attention_heads": {
        "type": int,
        "metavar": "N",
        "help": "attention heads (default: those of the published model of this width)",
    },
    "sample_size": {
        "type": int,
        "nargs": 2,
        "metavar": ("H", "W"),
        "help": "token grid, where it is not square, or not the published one and not told by tensors",
    },
    "codebook_size": {
        "type": int,
        "metavar": "K",
        "help": "number of codes (default: the tokenizer's if given, else the published model's)",
    },
    "num_classes": {
        "type": int,
        "metavar": "N",
        "help": "number of classes (default: what the vocabulary leaves beside the codes)",
    },
    "tokenizer_config": {
        "metavar": "FILE",
        "help": "model.yaml that lies beside the tokenizer, to be checked against its tensors",
    },
    "query_mode": {
        "choices": QUERY_MODES,
        "help": "what the decoder's queries are made of, pre_query_mode of the training (default: learn+freqs)",
    },
}


def convert(args: argparse.Namespace, part: Part, file: str, **options) -> Converted:
    """Converts one file or folder and says what was found in it."""
    print(f"reading {file}")
    weights, others, *config = part.read(file, trust_pickle=args.trust_pickle)
    try:
        converted = part.convert(weights, *config, **options)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from None
    parameters = sum(tensor.numel() for tensor in converted.state_dict.values())
    sizes = {name: value for name, value in converted.config.items() if not isinstance(value, list)}
    print(f"  {parameters / 1e6:.1f}M parameters: {', '.join(f'{name} {value}' for name, value in sizes.items())}")
    print(f"  dropped: {', '.join(converted.dropped + others) or 'nothing'}")
    return converted


def convert_source(args: argparse.Namespace, folder: Path) -> None:
    """Converts what is given and writes it into `folder`."""
    source = SOURCES[args.source]
    for name in ("tokenizer", "transformer"):
        for option in getattr(source, name).options:
            given = getattr(args, name) or (name == "transformer" and getattr(args, "toast", None))
            if not given and getattr(args, option) is not None:
                raise ConversionError(f"--{option} is about a {name}, but none is given: add --{name} PATH.")
    tokenizer = source.tokenizer.for_file(args.tokenizer) if args.tokenizer else source.tokenizer
    parts = {"vqvae": tokenizer, "transformer": source.transformer}
    files = {"vqvae": args.tokenizer, "transformer": args.transformer}
    toast = getattr(args, "toast", None)
    if toast:
        # The file holds the transformer too.
        adapted = dataclasses.replace(source.transformer, read=source.self_guidance.read_transformer)
        if not args.transformer:
            parts["transformer"], files["transformer"] = adapted, toast
        parts["toast"], files["toast"] = source.self_guidance.adapter, toast
    converted = {}
    for name, part in parts.items():
        file = files[name]
        if not file:
            continue
        options = {option: getattr(args, option) for option in part.options}
        if "vqvae" in converted and "codebook_size" in options and options["codebook_size"] is None:
            options["codebook_size"] = converted["vqvae"].config["num_vq_embeddings"]
        converted[name] = convert(args, part, file, **options)
        for option in part.assumed:
            if options[option] is None:
                print(f"  {option} is that of the published model: tensors do not tell it, --{option} does")

    if toast:
        check_adapter(converted["toast"].config, converted["transformer"].config)
    if toast and args.transformer:
        print("comparing the transformer with that of the adapter")
        options = {option: getattr(args, option) for option in adapted.options}
        check_same_transformer(converted["transformer"], convert(args, adapted, toast, **options))
    configs = {name: converted[name].config for name in ("transformer", "toast", "vqvae") if name in converted}
    pipeline_arguments = {}
    if {"transformer", "vqvae"} <= set(configs):
        check_fit(source, configs["transformer"], configs["vqvae"])
        settings = source.self_guidance if toast else source
        pipeline_arguments = {
            "scheduler": settings.make_scheduler(configs["transformer"]),
            "id2label": imagenet_labels() if configs["transformer"]["num_classes"] == 1000 else None,
            "call_defaults": settings.call_defaults(configs["transformer"]),
        }
    print("writing and verifying")
    models = {name: (parts[name].model_class, converted.pop(name)) for name in configs}
    write_models(folder, models, **pipeline_arguments)
    write_card(folder, [parts[name].describe(config) for name, config in configs.items()], args.push_to_hub)


def how_to_use(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return (
            "    from maskgit import MaskGitPipeline\n\n"
            f'    pipe = MaskGitPipeline.from_pretrained("{folder}")\n'
            '    pipe(class_labels=1).images[0].save("sample.png")\n\n'
            f"or: maskgit sample --model {folder} --classes 1"
        )
    lines = []
    for config in sorted(folder.glob("*/config.json")):
        part, name = config.parent.name, json.loads(config.read_text(encoding="utf-8"))["_class_name"]
        module = "diffusers" if name == "VQModel" else "maskgit"
        lines += [
            f"    from {module} import {name}\n",
            f'    {part} = {name}.from_pretrained("{folder}", subfolder="{part}")\n',
        ]
    return "\n".join(lines).rstrip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{Path(sys.argv[0]).name}: error: {message} (options: {self.prog} --help)\n")


def main(argv: list[str] | None = None):
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name, source in SOURCES.items():
        command = sources.add_parser(
            name,
            parents=[common],
            help=source.summary,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--transformer", metavar="PATH", help=source.transformer.files)
        command.add_argument(
            "--tokenizer", metavar="PATH", help=f"{source.tokenizer.files}; with the transformer: a whole pipeline"
        )
        if source.self_guidance is not None:
            command.add_argument(
                "--toast",
                metavar="PATH",
                help=f"{source.self_guidance.adapter.files}; it holds the transformer too, so that --transformer is not needed",
            )
        for option in dict.fromkeys(source.transformer.options + source.tokenizer.options):
            command.add_argument(f"--{option}", **OPTIONS[option])

    args = parser.parse_args(argv)
    with user_errors():
        inputs = [file for file in (args.transformer, args.tokenizer, getattr(args, "toast", None)) if file]
        if not inputs:
            toast = ", --toast PATH" if hasattr(args, "toast") else ""
            raise ConversionError(f"nothing to convert: give --transformer PATH{toast}, --tokenizer PATH or both.")
        if args.push_to_hub:
            validate_repo_id(args.push_to_hub)
        if getattr(args, "tokenizer_config", None):
            inputs.append(args.tokenizer_config)
        try:
            with new_folder(args.output_dir, args.overwrite, inputs) as folder:
                convert_source(args, folder)
        except (KeyboardInterrupt, SystemExit) as error:
            print(f"{Path(sys.argv[0]).name}: stopped; nothing was written to {args.output_dir}", file=sys.stderr)
            raise SystemExit(error.code if isinstance(error, SystemExit) else 130) from None
        print(f"wrote {args.output_dir}\n\nUse it:\n\n{how_to_use(Path(args.output_dir))}")
        if args.push_to_hub:
            print(f"\nuploaded: {push_folder_to_hub(args.output_dir, args.push_to_hub)}")


if __name__ == "__main__":
    main()
