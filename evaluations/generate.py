# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Many images for evaluation: a folder of PNGs, and the .npz file that ADM's evaluator reads.

    accelerate launch evaluations/generate.py --model builtin --num_images 10000 --output_dir outputs/generated
    torchrun --standalone --nproc_per_node 2 evaluations/generate.py ...       two processes without a GPU

Image i is drawn with the seed S + i, and its label depends on S and i only: the images are the same whatever the number of
processes or the batch size (with another number of threads, another device or in half precision, up to rounding). A run
that was stopped goes on where it was when it is started again with the same options; with a larger --num_images it adds
the missing ones. The folder holds

    images/000000.png, ...    the images and nothing else, for other tools: torch-fidelity, clean-fid
    settings.json             what they were made with, which evaluations/evaluate.py copies into its result
    grid.png                  the first of them
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import time
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from PIL import Image
from tqdm.auto import tqdm

import maskgit
from maskgit import MaskGitPipeline
from maskgit.commands import load_for_sampling
from maskgit.images import make_grid
from maskgit.loading import DTYPES, SCHEDULERS
from maskgit.options import check_keys, user_errors
from maskgit.pipelines.pipeline_maskgit import CALL_DEFAULTS, GUIDANCE_SCHEDULES
from maskgit.tokenization import tokenizer_checksum


# What does not change the images.
NOT_COMPARED = ("model", "num_images", "num_processes", "batch_size", "device")
MAX_DECODED_PIXELS = 2**18
MAX_GRID_ROWS = 10


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="builtin", help="folder or Hub id of a pipeline, builtin (default), or builtin-NAME")
    add("--num_images", type=int, required=True, metavar="N", help="50000 for published FIDs")
    add("--output_dir", required=True, metavar="DIR", help="folder to write to, or to go on with")
    add(
        "--npz",
        metavar="FILE",
        help="also write arr_0 (uint8 N, H, W, 3) and arr_1 (int64 labels), for ADM's evaluator",
    )
    add("--overwrite", action="store_true", help="start anew: the images in --output_dir and the --npz are deleted")
    add(
        "--labels",
        choices=("balanced", "random"),
        default="balanced",
        help="balanced: class i modulo the number of classes (default); random: drawn for each image",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of image 0 (default: 0)")
    add("--preset", metavar="NAME|FILE.yaml", help="sampler of a published result; options below change parts of it")
    add("--scheduler", choices=SCHEDULERS, help="with its default settings, if the model comes with another one")
    add(
        "--scheduler_config",
        nargs="+",
        metavar="KEY=VALUE",
        help="fields of the scheduler, such as top_k=100 or softmax_temperature=[1.0,0.8]",
    )
    add("--num_inference_steps", type=int, metavar="T", help="default: the model's own")
    add("--guidance_scale", type=float, metavar="G", help="1 is off; the papers' w is G - 1; default: the model's own")
    add("--self_guidance_scale", type=float, metavar="S", help="0 is off; default: the model's own")
    add("--guidance_schedule", choices=GUIDANCE_SCHEDULES, help="default: the model's own")
    add("--batch_size", type=int, default=32, metavar="B", help="images of a process drawn at a time (default: 32)")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the models (default: float32)")
    return parser


# ---------------------------------------------------------------- what is made


def label_of(index: int, labels: str, num_classes: int, seed: int) -> int:
    """Class of an image: of its own index only, so that neither batches nor processes matter."""
    if labels == "balanced":
        return index % num_classes
    return int(np.random.default_rng((seed, index)).integers(num_classes))


def load(args: argparse.Namespace, device: torch.device) -> tuple[MaskGitPipeline, dict]:
    """The pipeline with the scheduler that the options ask for, and the arguments of its call."""
    device = "cpu" if device.type == "cpu" else str(device)  # accelerate numbers CPUs too
    given = {name: getattr(args, name) for name in CALL_DEFAULTS}
    pipe, call = load_for_sampling(args.model, args.preset, args.scheduler, args.dtype, device, **given)
    fields = {}
    for text in args.scheduler_config or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--scheduler_config {text!r} is not of the form key=value.")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"--scheduler_config {text!r}: its value is no YAML, such as 1.0, true or [1, 2]."
            ) from None
    if fields:
        config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        check_keys(fields, config.keys() - {"mask_token_id"}, f"field of {type(pipe.scheduler).__name__},")
        try:
            pipe.scheduler = type(pipe.scheduler)(**config | fields)
        except TypeError as error:
            raise ValueError(f"--scheduler_config {' '.join(args.scheduler_config)}: {error}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def describe(args: argparse.Namespace, pipe: MaskGitPipeline, call: dict, num_processes: int) -> dict:
    """What images are made with, as it is written to settings.json."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    settings = {
        "model": args.model,
        "transformer": type(pipe.transformer).__name__,
        "num_classes": pipe.transformer.config.num_classes,
        "weights_sha256": {name: tokenizer_checksum(model) for name, model in sorted(models.items())},
        "preset": args.preset,
        "call": call,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        "labels": args.labels,
        "seed": args.seed,
        "dtype": args.dtype,
        "versions": {
            "maskgit": maskgit.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
        "num_images": args.num_images,
        "num_processes": num_processes,
        "batch_size": args.batch_size,
        "device": str(pipe.device),
    }
    return json.loads(json.dumps(settings))  # as it will be read again: tuples are lists


@torch.no_grad()
def decode(pipe: MaskGitPipeline, tokens: torch.LongTensor) -> list[Image.Image]:
    """
    Images of token grids (N, height, width). How a batch is rounded depends on its size, so that the decoder gets batches of
    a size that depends on the size of an image only, filled up with copies.
    """
    pixels = tokens[0].numel() * pipe.vae_scale_factor**2
    size = min(16, max(1, MAX_DECODED_PIXELS // pixels))
    images = []
    for part in tokens.split(size):
        filled = torch.cat([part, part[:1].expand(size - len(part), -1, -1)])
        decoded = pipe.decode_latents(filled)[: len(part)]
        images += pipe.image_processor.postprocess(decoded, output_type="pil")
    return images


# ---------------------------------------------------------------- where it is written


def image_path(folder: Path, index: int) -> Path:
    return folder / "images" / f"{index:06d}.png"


def image_indices(folder: Path) -> list[int]:
    """Numbers of the images that are there."""
    if not (folder / "images").is_dir():
        return []
    names = (re.fullmatch(r"(\d{6,})\.png", name) for name in os.listdir(folder / "images"))
    return [int(name[1]) for name in names if name]


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested dicts as one, with dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def different_settings(old: dict, new: dict) -> list[str]:
    """What makes other images, in words."""
    old, new = ({k: v for k, v in flatten(s).items() if k.partition(".")[0] not in NOT_COMPARED} for s in (old, new))
    return [
        f"{k} {old.get(k)!r}, not {new.get(k)!r}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]


def is_npz_of(path: Path, settings: dict) -> bool:
    """Whether `write_npz` has written the file for these very settings."""
    try:
        with np.load(path) as file:
            old = json.loads(str(file["settings"]))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile):
        return False
    return old["num_images"] == settings["num_images"] and not different_settings(old, settings)


def prepare_output(folder: Path, npz: Path | None, settings: dict, overwrite: bool) -> None:
    """Make the folder ready, or raise an error if it holds something else."""
    advice = "give another --output_dir, or --overwrite to start anew"
    indices = image_indices(folder)
    if (folder / "settings.json").is_file():
        try:
            old = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        except ValueError:
            old = None
        models = {"tokenizer", "transformer"}
        if not isinstance(old, dict) or old.keys() & models != settings.keys() & models:
            raise ValueError(f"{folder} holds images of another program: give another --output_dir.")
        different = different_settings(old, settings)
        if different and not overwrite:
            raise ValueError(f"{folder} holds images made with {'; '.join(different[:3])}: {advice}.")
        if max(indices, default=-1) >= settings["num_images"] and not overwrite:
            raise ValueError(
                f"{folder} holds {len(indices)} images, more than --num_images {settings['num_images']}: {advice}."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} has files in it, but no settings.json of this script: give another --output_dir.")
    if npz is not None and npz.is_dir():
        raise ValueError(f"--npz {npz} is a folder: give a file.")
    if npz is not None and npz.exists() and not overwrite and not is_npz_of(npz, settings):
        raise ValueError(f"{npz} is there already, and not of these images: give another --npz, or --overwrite.")

    if npz is not None:
        npz.parent.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if overwrite:
        for index in indices:
            image_path(folder, index).unlink()
        for path in (folder / "grid.png", npz):
            if path is not None:
                path.unlink(missing_ok=True)
    for path in (folder / "images").glob(".*.tmp"):  # of a run that was killed
        path.unlink()
    with write_atomically(folder / "settings.json") as path:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def write_atomically(path: Path):
    """A temporary path to write to, renamed in the end: a killed run leaves no half-written file that looks whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def write_npz(path: Path, folder: Path, labels: list[int], settings: dict) -> None:
    """
    The images of a folder as arrays, one after the other: 50,000 of them may be larger than the memory. `settings` is a
    third array, of text, beside those that ADM's evaluator knows.
    """
    with write_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for i in tqdm(range(len(labels)), desc=f"writing {path.name}", unit="image"):
                with Image.open(image_path(folder, i)) as image:
                    pixels = np.asarray(image)
                if i == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *pixels.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.tobytes())
        for name, array in (("arr_1", np.array(labels, dtype=np.int64)), ("settings", np.array(json.dumps(settings)))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)


def write_grid(folder: Path, num_images: int, num_classes: int) -> None:
    columns = num_classes if num_classes <= 16 else 10
    images = [Image.open(image_path(folder, i)) for i in range(min(num_images, columns * MAX_GRID_ROWS))]
    make_grid(images, min(columns, len(images))).save(folder / "grid.png")


# ---------------------------------------------------------------- the run


def generate(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Make the images that are missing in `args.output_dir`; returns their settings. To be called in every process."""
    for name, minimum in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
        if not minimum <= getattr(args, name) < 2**63:
            raise ValueError(f"--{name} {getattr(args, name)}: must be a whole number of at least {minimum}.")
    folder, npz = Path(args.output_dir), None if args.npz is None else Path(args.npz)
    pipe, call = load(args, accelerator.device)
    settings = describe(args, pipe, call, accelerator.num_processes)
    labels = [label_of(i, args.labels, settings["num_classes"], args.seed) for i in range(args.num_images)]
    if accelerator.is_main_process:
        prepare_output(folder, npz, settings, args.overwrite)
    accelerator.wait_for_everyone()

    there = set(image_indices(folder))
    # An image belongs to one process, whatever the others have done by now.
    own = [i for i in range(accelerator.process_index, args.num_images, accelerator.num_processes) if i not in there]
    with tqdm(
        total=args.num_images, initial=len(there), unit="image", disable=not accelerator.is_main_process
    ) as progress_bar:

        def show_progress():
            if accelerator.is_main_process:
                progress_bar.update(len(image_indices(folder)) - progress_bar.n)

        for start in range(0, len(own), args.batch_size):
            batch = own[start : start + args.batch_size]
            try:
                tokens = pipe(
                    [labels[i] for i in batch],
                    **call,
                    generator=[torch.Generator().manual_seed(args.seed + i) for i in batch],
                    output_type="latent",
                ).images
                images = decode(pipe, tokens)
            except torch.OutOfMemoryError:
                raise ValueError(f"Out of memory with --batch_size {args.batch_size}: give a smaller one.") from None
            for i, image in zip(batch, images):
                with write_atomically(image_path(folder, i)) as path:
                    image.save(path, format="png")
            show_progress()
        while accelerator.is_main_process and progress_bar.n < args.num_images:
            time.sleep(0.2)
            show_progress()

    if accelerator.is_main_process:
        write_grid(folder, args.num_images, settings["num_classes"])
        if npz is not None and not npz.exists():
            write_npz(npz, folder, labels, settings)
    accelerator.wait_for_everyone()
    return settings


def make_accelerator() -> Accelerator:
    # Processes that are done wait for the slowest one, and for what the main process does alone.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    accelerator = make_accelerator()
    with user_errors():
        generate(args, accelerator)
    if accelerator.is_main_process:
        print(
            f"{args.num_images} images are in {Path(args.output_dir) / 'images'}, the first ones in grid.png beside it"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
