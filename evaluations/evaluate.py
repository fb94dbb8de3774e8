# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
How near generated images are to real ones: FID, Inception score, KID, precision, recall, density and coverage, as JSON that
says how they were measured.

    python evaluations/evaluate.py --generated outputs/generated --reference data/fashion_mnist --reference_split test \\
        --output outputs/generated/result.json
    python evaluations/evaluate.py --reference imagenet/val --image_size 256 --save_statistics imagenet_val_256.npz

--generated and --reference are each one of

    a folder of images      also in subfolders; or what evaluations/generate.py or `maskgit sample` wrote
    images as .npz          arr_0 (uint8 N, H, W, 3), as ADM's and generate.py's
    statistics              what --save_statistics wrote; an .npz with mu and sigma, as clean-fid's and pytorch-fid's;
                            Halton-MaskGIT's .pt with mu and cov. An .npz with statistics and images, as ADM's references,
                            gives FID by the first and the other metrics by the second.

and the reference may also be whatever the training scripts read (a saved dataset, parquet files, a dataset on the Hub), of
which --reference_split names the split.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
import torch_fidelity
from tqdm.auto import tqdm

import maskgit
from maskgit.image_sets import ArrayImages, DatasetImages, FolderImages, ImageSource, ImageTensors, scan_headers
from maskgit.loading import find_device
from maskgit.metrics import (
    INCEPTION,
    LOGITS,
    FeatureExtractor,
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from maskgit.options import check_keys, check_writable, user_errors


METRICS = ("fid", "isc", "kid", "prc", "dc")
DEFAULT_METRICS = "fid,kid,prc,dc"
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
TRANSPARENT_MODES = ("RGBA", "LA", "PA")
RESIZINGS = {
    "tensorflow": "bilinear without antialiasing, inside the network, as in the original FID, ADM and torch-fidelity",
    "clean": "bicubic with antialiasing by PIL, as clean-fid, then cut to bytes, as Halton-MaskGIT and PGM",
}
WEIGHTS_VARIABLE = "MASKGIT_INCEPTION_WEIGHTS"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--generated", metavar="X", help="what is evaluated")
    add("--reference", metavar="Y", help="what it is compared with: real images")
    add("--reference_split", metavar="NAME", help="read the reference as the training scripts do, and use this split")
    add("--output", metavar="FILE.json", help="file for the result")
    add("--overwrite", action="store_true", help="replace --output and --save_statistics if they are there")
    add(
        "--metrics",
        default=DEFAULT_METRICS,
        help=f"of {','.join(METRICS)}: FID, Inception score, KID, precision and recall, density and coverage; "
        f"default: {DEFAULT_METRICS}",
    )
    add("--num_images", type=int, metavar="N", help="use the first N generated images; fewer are an error")
    add(
        "--image_size",
        type=int,
        metavar="SIDE",
        help="resize the shorter side of all images to this (bicubic) and cut out the centre; without it, images of "
        "different sizes are an error",
    )
    add("--resizing", choices=RESIZINGS, default="tensorflow", help="to the network's input; default: tensorflow")
    add(
        "--feature_extractor",
        default=INCEPTION,
        metavar="NAME",
        help=f"network of torch-fidelity: {INCEPTION} (default), dinov2-vit-l-14, clip-vit-b-32, ...",
    )
    add(
        "--feature_extractor_weights",
        metavar="FILE",
        help="its weights, where torch-fidelity cannot download them (scripts/prepare_inception_weights.py makes a file); "
        f"{INCEPTION} looks at the environment variable {WEIGHTS_VARIABLE} too",
    )
    add("--save_statistics", metavar="FILE.npz", help="write the reference's features, to be a --reference later")
    add("--isc_splits", type=int, default=10, metavar="N", help="parts of the Inception score (default: 10)")
    add("--kid_subset_size", type=int, default=1000, metavar="N", help="images of each subset of KID (default: 1000)")
    add("--prc_neighbors", type=int, default=3, metavar="K", help="k of precision and recall (default: 3)")
    add("--dc_neighbors", type=int, default=5, metavar="K", help="k of density and coverage (default: 5)")
    add(
        "--features_cache",
        metavar="DIR",
        help="keep the features of all images here, 8 KB each, and use those that are here; default: beside --output or "
        "--save_statistics until it is written, so that a stopped command goes on where it was",
    )
    add(
        "--batch_size",
        type=int,
        metavar="B",
        help="images in the network at a time; default: 64, and 16 on a CPU, whose caches hold no more",
    )
    add("--num_workers", type=int, metavar="N", help="processes that read images; default: 4 with a GPU, else none")
    add("--device", help="device of torch; default: the GPU if there is one, else cpu")
    return parser


# ---------------------------------------------------------------- what is compared


@dataclasses.dataclass
class ImageSet:
    """
    One side of the comparison.

    Args:
        name (`str`): "generated" or "reference".
        source (`str`): Folder, file or dataset, as given.
        images (`ImageSource`, *optional*): None for statistics alone.
        num_images (`int`, *optional*): How many of them count; of statistics, how many they are of, if that is known.
        size (`tuple[int, int]`, *optional*): Width and height as they are compared, if known.
        statistics (`Statistics`, *optional*): For FID.
        features (`torch.Tensor`, *optional*): float32 (N, D).
        facts (`dict`): What the result says about the set.
    """

    name: str
    source: str
    images: ImageSource | None = None
    num_images: int | None = None
    size: tuple[int, int] | None = None
    statistics: Statistics | None = None
    features: torch.Tensor | None = None
    facts: dict = dataclasses.field(default_factory=dict)


def read_settings(folder: Path) -> dict | None:
    """What this project wrote beside images that it made; None if it made none there."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "maskgit" in settings.get("versions", {}) else None


def open_set(name: str, source: str, split: str | None, num_images: int | None, image_size: int | None) -> ImageSet:
    """The set that an option names; raises an error for what cannot be measured, by the headers of the images."""
    path, result = Path(source), ImageSet(name, source)
    result.facts = {"source": source} | ({} if split is None else {"split": split})
    if split is not None:
        result.images = DatasetImages(source, split)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        raise ValueError(f"{source} is a saved dataset: give it as --reference, with --reference_split.")
    elif path.is_dir():
        settings = read_settings(path.parent if path.name == "images" else path)
        folder = path / "images" if settings is not None and (path / "images").is_dir() else path
        result.images = FolderImages(folder)
        if settings is not None:
            result.facts["settings"] = settings
            # `maskgit sample` writes its grid, and pictures of the steps, beside the images.
            single = [file for file in result.images.paths if file.parent == folder and file.name != "grid.png"]
            result.images.paths = single
    elif path.suffix == ".npz" and path.is_file():
        read_npz(path, result)
    elif path.suffix in (".pt", ".pth") and path.is_file():
        result.statistics = read_tensors(path)
    else:
        kinds = "a folder of images, or a file .npz or .pt"
        hub = "" if name == "generated" else "; a dataset on the Hub needs --reference_split"
        raise ValueError(f"{source} is not there or of another kind: give {kinds}{hub}.")
    if result.images is not None:
        check_images(result, num_images, image_size)
    elif num_images is not None and name == "generated":
        raise ValueError(f"--num_images needs images, but {source} holds statistics.")
    return result


def make_statistics(path: Path, mu: np.ndarray, sigma: np.ndarray) -> Statistics:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: the mean has the shape {mu.shape} and the covariance {sigma.shape}: no statistics.")
    return Statistics(np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64))


def read_tensors(path: Path) -> Statistics:
    """Halton-MaskGIT's file: a dict of the tensors mu and cov."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises many kinds
        raise ValueError(f"{path} cannot be read as tensors: {str(error).splitlines()[0]}") from None
    tensors = [content.get(name) if isinstance(content, dict) else None for name in ("mu", "cov")]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ValueError(f"{path} holds no statistics: expected the tensors mu and cov.")
    return make_statistics(path, *(tensor.numpy() for tensor in tensors))


def read_npz(path: Path, result: ImageSet) -> None:
    """What an .npz file has: images, statistics, features, and what was written about them."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file, or a damaged one.")
    try:
        with np.load(path) as file:
            if "mu" in file and "sigma" in file:
                result.statistics = make_statistics(path, file["mu"], file["sigma"])
            if "features" in file:
                result.features = torch.from_numpy(file["features"])
            if "facts" in file:
                facts = json.loads(str(file["facts"]))
                result.facts |= {"statistics": facts}
                result.num_images, result.size = facts["num_images"], tuple(facts["size"])
            if "settings" in file:
                result.facts["settings"] = json.loads(str(file["settings"]))
            has_images = "arr_0" in file
        if has_images:
            result.images = ArrayImages(path)
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{path} is no .npz file, or a damaged one: {error}") from None
    if not has_images and result.statistics is None:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma).")


def check_images(result: ImageSet, num_images: int | None, image_size: int | None) -> None:
    """Look at the headers of all images; raises an error for too few of them and for different sizes."""
    source, there = result.source, len(result.images)
    settings = result.facts.get("settings", {})
    if num_images is not None and there < num_images:
        raise ValueError(f"There are {there} images in {source}, fewer than --num_images {num_images}.")
    if num_images is None and there != settings.get("num_images", there):
        raise ValueError(
            f"There are {there} images in {source}, not the {settings['num_images']} of its settings.json: run generate.py "
            "again with the same options to finish it, or give --num_images."
        )
    result.num_images = num_images or there
    sizes, modes = scan_headers(result.images, result.num_images, f"looking at the {result.name} images")
    if image_size is None and len(sizes) > 1:
        (first, i), (second, j) = list(sizes.items())[:2]
        raise ValueError(
            f"The images in {source} differ in size: {result.images.name(i)} is {first[0]}x{first[1]}, "
            f"{result.images.name(j)} {second[0]}x{second[1]}. Give --image_size to resize and crop them."
        )
    result.size = next(iter(sizes)) if image_size is None else (image_size, image_size)
    result.facts |= {"num_images": result.num_images, "size": list(result.size), "modes": modes}
    if image_size is not None:
        result.facts["resized_from"] = sorted(f"{width}x{height}" for width, height in sizes)[:10]
        result.facts["num_original_sizes"] = len(sizes)


def check_sets(args: argparse.Namespace, metrics: list[str], sets: dict[str, ImageSet]) -> list[str]:
    """Raise an error for what cannot be compared; returns warnings of what makes a number worth little."""
    warnings = []
    for one in sets.values():
        for metric, needed, option in (
            ("fid", 2, None),
            ("isc", args.isc_splits if one.name == "generated" else 0, "isc_splits"),
            ("kid", args.kid_subset_size, "kid_subset_size"),
            ("prc", args.prc_neighbors + 1, "prc_neighbors"),
            ("dc", args.dc_neighbors + 1, "dc_neighbors"),
        ):
            if metric in metrics and one.num_images is not None and one.num_images < needed:
                smaller = "" if option is None else f", or give a smaller --{option}"
                raise ValueError(
                    f"{metric} needs at least {needed} {one.name} images, but there are {one.num_images}: leave it out of "
                    f"--metrics{smaller}."
                )
        others = [metric for metric in metrics if metric != "fid" and (metric != "isc" or one.name == "generated")]
        if one.images is None and (others if one.features is None else "isc" in others):
            raise ValueError(f"{one.source} holds no images for {', '.join(others)}: leave them out of --metrics.")
        made_with = one.facts.get("statistics", {})
        for option in ("feature_extractor", "resizing"):
            if made_with.get(option, getattr(args, option)) != getattr(args, option):
                raise ValueError(
                    f"{one.source} was made with --{option} {made_with[option]}, not {getattr(args, option)}."
                )
        if one.statistics is not None and not made_with:
            warnings.append(
                f"{one.source} does not say how its statistics were made: they are taken to be of the same network, "
                "resizing and image size."
            )
        if isinstance(one.images, FolderImages) and one.name == "generated":
            lossy = sum(path.suffix.lower() in LOSSY_SUFFIXES for path in one.images.paths[: one.num_images])
            if lossy:
                warnings.append(f"{lossy} of the generated images are in a lossy format, which changes every metric.")
        transparent = sum(one.facts.get("modes", {}).get(mode, 0) for mode in TRANSPARENT_MODES)
        if transparent:
            warnings.append(f"{transparent} of the {one.name} images are transparent: they are laid on white.")
    sizes = [one.size for one in sets.values() if one.size is not None]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The generated images are {sizes[0][0]}x{sizes[0][1]}, but those of the reference {sizes[1][0]}x{sizes[1][1]}: "
            "give --image_size to resize and crop both."
        )
    return warnings


def check_network(metrics: list[str], sets: dict[str, ImageSet], extractor: FeatureExtractor) -> list[str]:
    """The same for what only the network knows."""
    warnings = []
    for one in sets.values():
        if one.statistics is not None and len(one.statistics.mu) != extractor.num_features:
            raise ValueError(
                f"{one.source} has {len(one.statistics.mu)} features, but {extractor.name} gives {extractor.num_features}."
            )
        if one.facts.get("statistics", extractor.facts)["weights_sha256"] != extractor.facts["weights_sha256"]:
            warnings.append(f"{one.source} was made with other weights of {extractor.name} than these.")
        if "fid" in metrics and one.num_images is not None and one.num_images < extractor.num_features:
            if one.statistics is None or one.images is None:
                warnings.append(
                    f"With {one.num_images} {one.name} images, fewer than the {extractor.num_features} features, FID is much "
                    "too high: compare it with FIDs of the same counts only."
                )
    return warnings


# ---------------------------------------------------------------- the comparison


def read_batches(args: argparse.Namespace, one: ImageSet, clean_size: int | None) -> Iterator[torch.Tensor]:
    tensors = ImageTensors(one.images, one.num_images, args.image_size, clean_size)
    workers = args.num_workers if args.num_workers is not None else 0 if args.device == "cpu" else 4
    loader = torch.utils.data.DataLoader(tensors, args.batch_size, num_workers=workers)
    with tqdm(total=len(tensors), desc=f"features of the {one.name} images", unit="image") as progress_bar:
        for batch in loader:
            yield batch
            progress_bar.update(len(batch))


def measure(
    args: argparse.Namespace, metrics: list[str], sets: dict[str, ImageSet], extractor: FeatureExtractor
) -> dict:
    """The metrics asked for, by name; statistics and features are filled in on the way."""
    logits = None
    for one in sets.values():
        has_all = one.features is not None or (one.statistics is not None and metrics == ["fid"])
        if one.images is not None and not has_all and (one.name == "generated" or metrics != ["isc"]):
            outputs = extractor.extract(
                read_batches(args, one, extractor.input_size if args.resizing == "clean" else None)
            )
            one.features = outputs[extractor.layer]
            logits = outputs.get(LOGITS) if one.name == "generated" else logits
        is_needed = "fid" in metrics or args.save_statistics is not None
        if is_needed and one.statistics is None and one.features is not None:
            one.statistics = Statistics.of(one.features)

    values = {}
    generated, reference = sets.get("generated"), sets.get("reference")

    def features_on_device() -> tuple[torch.Tensor, torch.Tensor]:
        """For distances between all pairs of images, of which 50,000 and 50,000 take minutes on a CPU."""
        return generated.features.to(args.device), reference.features.to(args.device)

    for metric in tqdm(metrics, desc="metrics", leave=False, disable=not metrics):
        if metric == "fid":
            values["fid"] = frechet_distance(generated.statistics, reference.statistics)
        elif metric == "isc":
            values["inception_score"], values["inception_score_std"] = inception_score(logits, args.isc_splits)
        elif metric == "kid":
            pair = kernel_distance(generated.features, reference.features, subset_size=args.kid_subset_size)
            values["kid"], values["kid_std"] = pair
        elif metric == "prc":
            pair = precision_recall(*features_on_device(), args.prc_neighbors)
            values["precision"], values["recall"] = pair
        else:
            pair = density_coverage(*features_on_device(), args.dc_neighbors)
            values["density"], values["coverage"] = pair
    return values


def save_statistics(path: Path, reference: ImageSet, facts: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {name: value for name, value in reference.facts.items() if name != "settings"} | facts
    arrays = {
        "mu": reference.statistics.mu,
        "sigma": reference.statistics.sigma,
        "features": reference.features.numpy(),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays, facts=np.array(json.dumps(facts)))
    temporary.replace(path)


def state(args: argparse.Namespace, sets: dict[str, ImageSet]) -> str:
    """The sentence that belongs beside the numbers."""
    words = []
    for one in sets.values():
        count = "unknown number of" if one.num_images is None else f"{one.num_images:,}"
        size = "" if one.size is None else f" of {one.size[0]}x{one.size[1]} pixels"
        origin = one.facts.get("statistics", one.facts)
        split = f", split {origin['split']}" if "split" in origin else ""
        statistics = (
            "; FID by the statistics in the file" if one.images is not None and one.statistics is not None else ""
        )
        words.append(f"{count} {one.name} images{size} ({origin['source']}{split}{statistics})")
    return f"{' against '.join(words)}; features of {args.feature_extractor}, resizing: {RESIZINGS[args.resizing]}"


def check_options(args: argparse.Namespace) -> list[str]:
    """Raise an error for options that make no sense; returns the metrics to measure."""
    metrics = [name.strip() for name in args.metrics.split(",")]
    check_keys(metrics, METRICS, "metric")
    at_least_one = ("isc_splits", "kid_subset_size", "prc_neighbors", "dc_neighbors", "batch_size")
    for name in (*at_least_one, "num_images", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1.")
    for option in ("output", "save_statistics"):
        path = getattr(args, option)
        if path is not None and Path(path).exists() and not args.overwrite:
            raise ValueError(f"{path} is there already: give another --{option}, or --overwrite to replace it.")
    if args.save_statistics is not None and Path(args.save_statistics).suffix != ".npz":
        raise ValueError(f"--save_statistics {args.save_statistics}: give a name that ends in .npz.")
    if args.save_statistics is not None and args.save_statistics == args.output:
        raise ValueError(f"--output and --save_statistics are both {args.output}: give two names.")
    if args.generated is None and args.save_statistics is None:
        raise ValueError("Give --generated, or --save_statistics for the reference alone.")
    if args.reference is None and (args.save_statistics is not None or metrics != ["isc"]):
        raise ValueError("Give --reference: only the Inception score alone (--metrics isc) does without it.")
    if args.generated is None and args.num_images is not None:
        raise ValueError("--num_images counts generated images, and there are none: a reference is taken whole.")
    args.device = str(find_device(args.device))
    if args.batch_size is None:
        args.batch_size = 16 if args.device == "cpu" else 64
    if args.feature_extractor_weights is None and args.feature_extractor == INCEPTION:
        args.feature_extractor_weights = os.environ.get(WEIGHTS_VARIABLE)
    for option in ("output", "save_statistics"):  # last, since it makes their folders
        if getattr(args, option) is not None:
            check_writable(option, Path(getattr(args, option)))
    return [] if args.generated is None else metrics


def evaluate(args: argparse.Namespace) -> dict:
    """The result, ready for JSON. What is wrong with the options or the files is a ValueError or an OSError that says so."""
    start = time.perf_counter()
    metrics = check_options(args)
    sets = {}
    if args.generated is not None:
        sets["generated"] = open_set("generated", args.generated, None, args.num_images, args.image_size)
    if args.reference is not None:
        sets["reference"] = open_set("reference", args.reference, args.reference_split, None, args.image_size)
    if args.save_statistics is not None and (
        sets["reference"].images is None or sets["reference"].statistics is not None
    ):
        raise ValueError(f"--save_statistics needs images, but {args.reference} holds statistics.")
    warnings = check_sets(args, metrics, sets)
    statement = state(args, sets)
    network = args.feature_extractor, args.feature_extractor_weights, args.device
    extractor = FeatureExtractor(*network, "isc" in metrics, args.features_cache)
    warnings += check_network(metrics, sets, extractor)
    values = measure(args, metrics, sets, extractor)
    protocol = extractor.facts | {"resizing": args.resizing, "image_size": args.image_size}
    if args.save_statistics is not None:
        save_statistics(Path(args.save_statistics), sets["reference"], protocol)
    parameters = {
        "isc": {"splits": args.isc_splits},
        "kid": {"subsets": 100, "subset_size": args.kid_subset_size, "kernel": "polynomial of degree 3"},
        "prc": {"neighbors": args.prc_neighbors},
        "dc": {"neighbors": args.dc_neighbors},
    }
    return {
        "metrics": values,
        "statement": statement,
        "protocol": protocol | {name: parameters[name] for name in metrics if name in parameters},
        **{name: one.facts for name, one in sets.items()},
        "warnings": warnings,
        "options": vars(args),
        "versions": {
            "maskgit": maskgit.__version__,
            "torch_fidelity": torch_fidelity.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "pillow": PIL.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    written = args.output or args.save_statistics
    until_written = f"{written}.features" if written is not None and args.features_cache is None else None
    args.features_cache = args.features_cache or until_written
    with user_errors():
        result = evaluate(args)
        if until_written is not None:  # a folder that will not be there
            result["options"]["features_cache"] = None
        for warning in result["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        for name, value in result["metrics"].items():
            print(f"{name:20} {value:.6g}")
        print(result["statement"])
        if args.output is not None:
            Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if until_written is not None:
            for folder in Path(until_written).glob(f"{args.feature_extractor}-*"):
                shutil.rmtree(folder)
            if not any(Path(until_written).iterdir()):  # what else may lie there is not ours
                Path(until_written).rmdir()
    for path in (args.output, args.save_statistics):
        if path is not None:
            print(f"Wrote {path}")


if __name__ == "__main__":
    main()
