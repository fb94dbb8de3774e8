# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
The command `maskgit`.

It stands outside the package, whose import takes seconds: help and mistakes in the options need an answer at once.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (options: {self.prog} --help)")


def _number(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value <= maximum and value < math.inf):
            what = "a whole number" if kind is int else "a number"
            limits = f"of at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {what} {limits}, but is {text!r}")
        return value

    return parse


def _classes(text: str) -> list[int | str] | None:
    if text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"must be class ids or names with commas between, or all, but is {text!r}")
    if "all" in parts:
        raise argparse.ArgumentTypeError(f"must be all, or classes without it, but is {text!r}")
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts]


def _class(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _mask(text: str) -> str | tuple[int, ...]:
    if not re.fullmatch(r"[-\d.,\s]*,[-\d.,\s]*", text):
        return text
    box = tuple(int(number) for number in text.split(",")) if re.fullmatch(r"\d+(,\d+){3}", text) else ()
    if not box or 0 in box[2:]:
        raise argparse.ArgumentTypeError(
            f"must be a file, or X,Y,W,H in pixels with a width and height of at least 1, but is {text!r}"
        )
    return box


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="builtin",
        metavar="DIR|HUB_ID",
        help="folder of a saved pipeline, id of one on the Hub, builtin (default: a small model that comes with the "
        "package) or builtin-NAME",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the models (default: float32)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: the GPU if there is one, else cpu)")


def _add_sampling_options(parser: argparse.ArgumentParser, output_dir: str) -> None:
    add = parser.add_argument
    add(
        "--output_dir",
        default=output_dir,
        metavar="DIR",
        help=f"folder to write to, made if it does not exist (default: {output_dir})",
    )
    add("--overwrite", action="store_true", help="write to a folder that has files, over those of the same names")
    add(
        "--seed",
        type=_number(int, 0, 2**63 - 1),
        default=0,
        metavar="S",
        help="number that all randomness depends on (default: 0)",
    )
    add(
        "--num_inference_steps",
        type=_number(int, 1),
        metavar="T",
        help="steps from masked to finished (default: the model's own)",
    )
    add(
        "--scheduler",
        choices=("halton", "confidence", "self-guided"),
        help="which tokens each step decides: a Halton sequence's, those that the model is most sure of, or these with more "
        "noise and second thoughts; with default settings if the model comes with another (default: the model's own)",
    )
    add(
        "--guidance_scale",
        type=_number(float, 0),
        metavar="G",
        help="how strongly images are pulled to their class; 1 is off (default: the model's own)",
    )
    add(
        "--self_guidance_scale",
        type=_number(float, 0),
        metavar="S",
        help="how far to go beyond what the model makes of a smoothed image, for models with a toast adapter; 0 is off "
        "(default: the model's own)",
    )
    add(
        "--preset",
        metavar="NAME|FILE",
        help="sample with the settings of a published result: a name such as halton-base-256 (all of them: configs/presets), "
        "or a YAML file of that form; the options above win over it",
    )
    add("--batch_size", type=_number(int, 1), default=16, metavar="B", help="images drawn at a time (default: 16)")


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sample",
        help="generate images of classes",
        description="Generate images of classes with a masked generative transformer.",
        epilog="Image i, counted from 0 in the order of --classes, is drawn with the seed S + i: it is the same whatever "
        "the batch size. It is written to NUMBER_CLASS.png; grid.png shows all of them (the first 1000), a row for each "
        "class where there are few, and settings.json holds what they were made with.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    _add_model_options(parser)
    add(
        "--classes",
        type=_classes,
        metavar="C,C,...",
        help='ids or names with commas between, such as 90,180,goldfish or "ankle boot,bag", or all (default)',
    )
    add("--images_per_class", type=_number(int, 1), default=4, metavar="N", help="images of each class (default: 4)")
    _add_sampling_options(parser, "outputs/samples")
    add(
        "--save_steps",
        action="store_true",
        help="also write how each image came about, masked cells covered: steps/NUMBER_CLASS.gif and, all steps side by "
        "side, .png",
    )


def _add_inpaint(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inpaint",
        help="paint a part of an image anew",
        description="Paint a part of an image anew, as a class, with a masked generative transformer: inpainting, "
        "outpainting and class-conditional editing.",
        epilog="The image is resized to the model's size, whatever its proportions. Result i, counted from 0, is drawn with "
        "the seed S + i and written to NUMBER_CLASS.png; grid.png shows the original, what was masked, and the results (the "
        "first 1000), and settings.json holds what they were made with.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", required=True, metavar="FILE", help="the image to paint on")
    add(
        "--mask",
        required=True,
        type=_mask,
        metavar="FILE|X,Y,W,H",
        help="what to paint: the white part of an image of the same size, or a box in pixels: left, top, width, height",
    )
    add(
        "--class",
        dest="label",
        required=True,
        type=_class,
        metavar="C",
        help="id or name of the class to paint",
    )
    _add_model_options(parser)
    add("--num_images", type=_number(int, 1), default=4, metavar="N", help="number of results (default: 4)")
    add(
        "--mask_dilation",
        type=_number(int, 0),
        default=0,
        metavar="CELLS",
        help="grow the masked part by so many cells of the token grid to all sides (default: 0)",
    )
    add(
        "--no_composite",
        action="store_true",
        help="leave everything as the tokenizer decodes it, instead of putting the original back where nothing was painted",
    )
    _add_sampling_options(parser, "outputs/inpainting")


def _add_reconstruct(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="see what the tokenizer makes of your images",
        description="Turn images into tokens and back, and tell what is lost, as PSNR in dB: of each image and on average.",
        epilog="The reconstructions are written to NUMBER_NAME.png; grid.png shows the images (the first 100) above them, and "
        "psnr.json holds the numbers.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        "--tokenizer",
        default="builtin",
        metavar="DIR|HUB_ID",
        help="folder or Hub id of a pipeline or of a tokenizer, builtin (default) or builtin-NAME",
    )
    add("--images_dir", required=True, metavar="DIR", help="folder of images, also in subfolders")
    add(
        "--output_dir",
        default="outputs/reconstructions",
        metavar="DIR",
        help="folder to write to, made if it does not exist (default: outputs/reconstructions)",
    )
    add("--overwrite", action="store_true", help="write to a folder that has files, over those of the same names")
    add(
        "--image_size",
        type=_number(int, 1),
        metavar="N",
        help="resize the shorter side to N pixels and cut out a square (default: keep the size, cut to whole tokens)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: the GPU if there is one, else cpu)")


def _add_app(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "app",
        help="sample and inpaint on a web page",
        description="Serve a web page on which to sample classes, watch the steps, and paint on images. It needs gradio "
        "(pip install gradio), and runs until it is stopped with Ctrl-C.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    _add_model_options(parser)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: 127.0.0.1)",
    )
    add("--port", type=_number(int, 1, 65535), help="port to listen on (default: the first free one from 7860 on)")


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code is 2, after one line of explanation, for what the user can mend."""
    parser = _Parser(prog="maskgit", description="Images from masked generative transformers.", allow_abbrev=False)
    commands_parser = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in (_add_sample, _add_inpaint, _add_reconstruct, _add_app):
        add_command(commands_parser)
    try:
        options = vars(parser.parse_args(argv))
        from maskgit import commands

        getattr(commands, options.pop("command"))(**options)
    except (ValueError, OSError) as error:
        print(f"maskgit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
