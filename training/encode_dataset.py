#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Turns the images of one split into tokens, once, for fast training: parquet files of uint16 tokens and labels that `maskgit.data.TokenDataset`
(and `datasets.load_dataset`) reads. A killed run goes on where it stopped when it is started again with the same options; further splits
go into the same folder.

    accelerate launch training/encode_dataset.py --tokenizer outputs/vqgan_fashion_mnist/vqvae --data data/fashion_mnist \\
        --image_size 32 --output_dir data/fashion_mnist_tokens
    torchrun --standalone --nproc_per_node 2 training/encode_dataset.py ...       two processes without a GPU
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from maskgit.data import TOKEN_DATASET_INFO, ImageDataset, UnreadableImageError, load_image_dataset
from maskgit.options import user_errors
from maskgit.tokenization import encode_images, load_tokenizer, tokenizer_checksum


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", required=True, help="folder or Hub id of a tokenizer, or of a pipeline with vqvae/"
    )
    parser.add_argument(
        "--data", required=True, help="folder of images (or parquet, webdataset, saved dataset), or Hub dataset"
    )
    parser.add_argument("--split", default="train", help="split of the data (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder of the token dataset")
    parser.add_argument("--image_size", type=int, required=True, help="side of the square images, in pixels")
    parser.add_argument(
        "--with_flips", action="store_true", help="add the mirror image of every image, as a second row"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--images_per_part",
        type=int,
        default=4096,
        help="images per file, what a killed run may lose (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that load images, per process (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="encode the split anew if it is there")
    args = parser.parse_args()
    for name in ("image_size", "batch_size", "images_per_part"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give a number above 0")
    return args


def read_info(output_dir: Path) -> dict | None:
    """What is written about a token dataset, or None if the folder has none."""
    path = output_dir / TOKEN_DATASET_INFO
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_output(output_dir: Path, info: dict, split: str, overwrite: bool):
    """Raises a ValueError if the folder holds something else, or this split encoded in another way."""
    old = read_info(output_dir)
    if old is None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise ValueError(f"{output_dir} holds something that is no token dataset: give another --output_dir.")
        return
    other_splits = set(old["splits"]) - {split}
    advice = "give another --output_dir" if other_splits else "give --overwrite to encode it anew"
    for name, value in info.items():
        if name in ("splits", "tokenizer") or old[name] == value or (overwrite and not other_splits):
            continue
        if name == "tokenizer_checksum":
            raise ValueError(
                f"the tokens in {output_dir} were made with other weights than those of {info['tokenizer']}: {advice}."
            )
        raise ValueError(f"{output_dir} was made with {name} {old[name]!r}, not {value!r}: {advice}.")
    if split in old["splits"] and old["splits"][split] != info["splits"][split] and not overwrite:
        raise ValueError(
            f"split {split!r} of {output_dir} was made with {old['splits'][split]}, not {info['splits'][split]}: "
            "give the same options to go on with it, or --overwrite to encode it anew."
        )


def write_atomically(path: Path, write):
    """Calls `write` with a temporary path and renames it, so that a killed run leaves no half-written file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


@torch.no_grad()
def encode_part(
    tokenizer, images: ImageDataset, rows: range, features: datasets.Features, args, device, progress
) -> pa.Table:
    """The rows of one part: all images, then (with flips) all mirror images."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, rows), batch_size=args.batch_size, num_workers=args.num_workers
    )
    tokens, mirrored, labels = [], [], []
    for batch in loader:
        pixels = batch["pixel_values"].to(device)
        tokens.append(encode_images(tokenizer, pixels).flatten(1).cpu())
        if args.with_flips:
            mirrored.append(encode_images(tokenizer, pixels.flip(-1)).flatten(1).cpu())
        labels.append(batch["label"])
        progress.update(len(pixels))
    matrix = torch.cat(tokens + mirrored).numpy().astype(np.uint16)
    columns = {
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1]),
        "label": pa.array(torch.cat(labels * 2 if args.with_flips else labels).numpy()),
    }
    return pa.table(columns).cast(features.arrow_schema)


def main():
    args = parse_args()
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with user_errors():
        tokenizer = load_tokenizer(args.tokenizer).to(accelerator.device)
        dataset = load_image_dataset(args.data, args.split)
        if "label" not in dataset.features:
            raise ValueError(f"{args.data!r} has no labels: put the images of each class into a folder of its own.")
        images = ImageDataset(dataset, args.image_size)
        blank = torch.zeros(1, 3, args.image_size, args.image_size, device=accelerator.device)
        grid_height, grid_width = encode_images(tokenizer, blank).shape[1:]
        codebook_size = tokenizer.config.num_vq_embeddings
        if codebook_size > 2**16:
            raise ValueError(f"the tokenizer has {codebook_size} codes, a token dataset holds at most {2**16}.")
        num_parts = -(-len(images) // args.images_per_part)
        num_rows = len(images) * (2 if args.with_flips else 1)
        info = {
            "tokenizer": args.tokenizer,
            "tokenizer_checksum": tokenizer_checksum(tokenizer),
            "codebook_size": codebook_size,
            "grid_height": grid_height,
            "grid_width": grid_width,
            "image_size": args.image_size,
            "splits": {
                args.split: {
                    "data": args.data,
                    "num_rows": num_rows,
                    "num_parts": num_parts,
                    "with_flips": args.with_flips,
                }
            },
        }
        check_output(output_dir, info, args.split, args.overwrite)

    parts = [output_dir / "data" / f"{args.split}-{part:05d}-of-{num_parts:05d}.parquet" for part in range(num_parts)]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (output_dir / "data").mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            for path in (output_dir / "data").glob(f"{args.split}-*.parquet"):
                path.unlink()
        for path in (output_dir / "data").glob(".*.tmp"):
            path.unlink()
        info["splits"] = (read_info(output_dir) or {"splits": {}})["splits"] | info["splits"]
        text = json.dumps(info, indent=2) + "\n"
        write_atomically(output_dir / TOKEN_DATASET_INFO, lambda path: path.write_text(text, encoding="utf-8"))
    accelerator.wait_for_everyone()

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("uint16"), length=grid_height * grid_width),
            "label": dataset.features["label"],
        }
    )
    missing = [part for part in range(num_parts) if not parts[part].exists()]
    accelerator.wait_for_everyone()  # every process lists the missing parts before one of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    ranges = {
        part: range(part * args.images_per_part, min((part + 1) * args.images_per_part, len(images))) for part in mine
    }
    with tqdm(
        total=sum(map(len, ranges.values())),
        unit="image",
        desc=args.split,
        disable=not accelerator.is_local_main_process,
    ) as progress:
        for part, rows in ranges.items():
            with user_errors((UnreadableImageError,)):
                table = encode_part(tokenizer, images, rows, features, args, accelerator.device, progress)
            write_atomically(parts[part], lambda path: pa.parquet.write_table(table, path))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(
            f"{num_rows} rows of {grid_height}x{grid_width} tokens in {num_parts} parts ({len(missing)} new): {output_dir}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
