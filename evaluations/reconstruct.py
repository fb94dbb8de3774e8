# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
How much a tokenizer loses: real images to tokens and back, with PSNR, SSIM, the use of the codebook and the FID between the
images and their reconstructions (rFID).

    python evaluations/reconstruct.py --tokenizer builtin --images data/fashion_mnist --split test \\
        --output_dir outputs/reconstructions

The same command goes on where it was stopped. The folder holds

    images/000000.png, ...    the reconstructions, in the order of the images, their tokens inside as text
    result.json               the metrics, and how they were measured
    settings.json             what the reconstructions were made with
    grid.png                  the first images, each row above its reconstructions
"""

import argparse
import json
import shutil
from pathlib import Path

import diffusers
import evaluate
import generate
import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

import maskgit
from maskgit.image_sets import DatasetImages, FolderImages, ImageTensors, scan_headers
from maskgit.images import make_pair_grid
from maskgit.loading import find_device
from maskgit.metrics import ssim
from maskgit.options import user_errors
from maskgit.tokenization import decode_tokens, encode_images, load_tokenizer, psnr, tokenizer_checksum


PAIRS_IN_GRID = 40


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--tokenizer",
        "--model",
        default="builtin",
        help="folder or Hub id of a tokenizer or of a pipeline; default: builtin",
    )
    add("--images", "--images_dir", required=True, metavar="DIR", help="folder of real images, also in subfolders")
    add("--split", metavar="NAME", help="read --images as the training scripts do, and use this split")
    add(
        "--image_size",
        type=int,
        metavar="SIDE",
        help="resize the shorter side to this (bicubic) and cut out the centre",
    )
    add("--output_dir", required=True, metavar="DIR", help="folder to write to, or to go on with")
    add("--overwrite", action="store_true", help="start anew: the reconstructions in --output_dir are deleted")
    add("--metrics", default="fid", help="between the two sets, as evaluate.py, or none; default: fid")
    add("--kid_subset_size", type=int, default=1000, metavar="N", help="images of each subset of KID (default: 1000)")
    add(
        "--resizing",
        choices=evaluate.RESIZINGS,
        default="tensorflow",
        help="to the network's input; default: tensorflow",
    )
    add("--feature_extractor", default=evaluate.INCEPTION, metavar="NAME", help=f"default: {evaluate.INCEPTION}")
    add("--feature_extractor_weights", metavar="FILE", help="as evaluate.py")
    add("--batch_size", type=int, default=16, metavar="B", help="images at a time (default: 16)")
    add("--device", help="device of torch; default: the GPU if there is one, else cpu")
    return parser


def open_images(args: argparse.Namespace, tokenizer: ModelMixin) -> ImageTensors:
    """The real images; raises an error for sizes that the tokenizer cannot take."""
    folder = Path(args.images)
    if args.split is None and not folder.is_dir():
        raise ValueError(f"There is no folder {args.images}: a dataset needs --split.")
    images = FolderImages(folder) if args.split is None else DatasetImages(args.images, args.split)
    sizes, _ = scan_headers(images, len(images), "looking at the images")
    factor = 2 ** (len(tokenizer.config.block_out_channels) - 1)
    if args.image_size is None and len(sizes) > 1:
        (first, i), (second, j) = list(sizes.items())[:2]
        raise ValueError(
            f"The images differ in size: {images.name(i)} is {first[0]}x{first[1]}, {images.name(j)} {second[0]}x{second[1]}. "
            "Give --image_size to resize and crop them."
        )
    size = next(iter(sizes)) if args.image_size is None else (args.image_size, args.image_size)
    if size[0] % factor or size[1] % factor or min(size) < 11:
        raise ValueError(
            f"The images are {size[0]}x{size[1]}, but this tokenizer takes multiples of {factor} (and SSIM 11 pixels): give "
            "--image_size."
        )
    return ImageTensors(images, len(images), args.image_size)


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def reconstruct(tokenizer: ModelMixin, images: torch.Tensor, paths: list[Path]) -> None:
    """Write the reconstructions of images, uint8 (B, 3, H, W); each PNG keeps its tokens, a row of the grid a line."""
    tokens = encode_images(tokenizer, to_floats(images).to(tokenizer.device))
    decoded = decode_tokens(tokenizer, tokens).add(1).mul(127.5).round().to(torch.uint8)
    for path, grid, pixels in zip(paths, tokens.tolist(), decoded.permute(0, 2, 3, 1).cpu().numpy()):
        text = PngInfo()
        text.add_text("tokens", "\n".join(" ".join(map(str, row)) for row in grid), zip=True)
        with generate.write_atomically(path) as temporary:
            Image.fromarray(pixels).save(temporary, format="png", pnginfo=text)


def read(paths: list[Path]) -> tuple[torch.Tensor, np.ndarray]:
    """Reconstructions, uint8 (B, 3, H, W), and all their tokens, (number,)."""
    pixels, tokens = [], []
    for path in paths:
        with Image.open(path) as image:
            tokens += image.text["tokens"].split()
            pixels.append(np.array(image))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), np.array(tokens, dtype=np.int64)


def measure(args: argparse.Namespace, tokenizer: ModelMixin, images: ImageTensors) -> dict:
    """Reconstruct what is missing; returns the metrics of single images and of the codebook."""
    folder = Path(args.output_dir)
    codebook_size = tokenizer.config.num_vq_embeddings
    psnrs, ssims, counts, pairs = [], [], np.zeros(codebook_size, dtype=np.int64), []
    loader = torch.utils.data.DataLoader(images, args.batch_size)
    with tqdm(total=len(images), unit="image") as progress_bar:
        for batch in loader:
            paths = [generate.image_path(folder, len(psnrs) + i) for i in range(len(batch))]
            if not all(path.exists() for path in paths):
                try:
                    reconstruct(tokenizer, batch, paths)
                except torch.OutOfMemoryError:
                    raise ValueError(
                        f"Out of memory with --batch_size {args.batch_size}: give a smaller one."
                    ) from None
            decoded, tokens = read(paths)
            psnrs += psnr(to_floats(batch), to_floats(decoded)).tolist()
            ssims += ssim(batch, decoded).tolist()
            counts += np.bincount(tokens, minlength=codebook_size)
            for pair in zip(batch, decoded):
                if len(pairs) < PAIRS_IN_GRID:
                    pairs.append(tuple(Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pair))
            progress_bar.update(len(batch))

    make_pair_grid(pairs).save(folder / "grid.png")
    shares = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(np.mean(psnrs)),
        "psnr_worst": float(np.min(psnrs)),
        "ssim": float(np.mean(ssims)),
        "codebook_usage": float((counts > 0).mean()),
        "codebook_perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }


def evaluation_options(args: argparse.Namespace) -> argparse.Namespace:
    command = ["--generated", args.output_dir, "--reference", args.images, "--metrics", args.metrics]
    command += ["--kid_subset_size", str(args.kid_subset_size), "--resizing", args.resizing]
    command += ["--feature_extractor", args.feature_extractor]
    for option, value in (
        ("features_cache", Path(args.output_dir) / "features"),
        ("reference_split", args.split),
        ("image_size", args.image_size),
        ("feature_extractor_weights", args.feature_extractor_weights),
        ("device", args.device),
    ):
        command += [] if value is None else [f"--{option}", str(value)]
    return evaluate.make_parser().parse_args(command)


def run(args: argparse.Namespace) -> dict:
    """The result, ready for JSON. What is wrong with the options or the files is a ValueError or an OSError that says so."""
    folder = Path(args.output_dir)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: must be at least 1.")
    if args.split is None and Path(args.images).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--images {args.images} lies in --output_dir {folder}: give another folder to write to.")
    evaluation = evaluation_options(args)
    metrics = evaluate.check_options(evaluation) if args.metrics != "none" else []
    device = str(find_device(args.device))
    tokenizer = load_tokenizer(args.tokenizer).to(device)
    images = open_images(args, tokenizer)
    originals = evaluate.ImageSet("real", args.images, images=images, num_images=len(images))
    evaluate.check_sets(evaluation, metrics, {"real": originals})
    settings = {
        "tokenizer": args.tokenizer,
        "weights_sha256": tokenizer_checksum(tokenizer),
        "images": args.images,
        "split": args.split,
        "image_size": args.image_size,
        "num_images": len(images),
        "versions": {
            "maskgit": maskgit.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
        "device": device,
    }
    generate.prepare_output(folder, None, settings, args.overwrite)
    result = {"metrics": measure(args, tokenizer, images), "num_images": len(images), "settings": settings}
    if args.metrics != "none":
        between = evaluate.evaluate(evaluation)
        result["metrics"] |= {"rfid" if name == "fid" else name: value for name, value in between["metrics"].items()}
        result |= {name: between[name] for name in ("statement", "protocol", "warnings")}
    with generate.write_atomically(folder / "result.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "features", ignore_errors=True)  # there for going on only; none without metrics
    return result


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with user_errors():
        result = run(args)
    for name, value in result["metrics"].items():
        print(f"{name:20} {value:.6g}")
    print(
        f"{result['num_images']:,} images; wrote {Path(args.output_dir) / 'result.json'}, images/ and grid.png beside it"
    )


if __name__ == "__main__":
    main()
