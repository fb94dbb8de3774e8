# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Reading checkpoint files, and renaming tensors with nothing missing, unknown or of a wrong shape."""

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch


# Where training programs put the weights, the first that is there: averaged weights before the last ones.
WEIGHTS_KEYS = ("model_state_dict", "ema", "model", "state_dict")
WRAPPERS = ("module", "_orig_mod")  # prefixes of DistributedDataParallel and torch.compile
MAX_NAMES = 8


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message is one line for its user."""


@dataclass(frozen=True)
class Converted:
    """
    A converted model.

    Args:
        config (`dict`): Arguments of the model's class.
        state_dict (`dict[str, torch.Tensor]`): Its parameters, float32.
        dropped (`list[str]`): Tensors of the checkpoint that the model does not need, with the reason where it is not plain.
    """

    config: dict
    state_dict: dict[str, torch.Tensor]
    dropped: list[str]


@dataclass(frozen=True)
class Rename:
    """
    Where a tensor of a checkpoint goes.

    Args:
        source (`str`): Its name in the checkpoint.
        target (`str`): Its name in the model. Tensors of the same target are joined along the first axis, in order.
        shape (`tuple[int, ...]`): Its shape in the checkpoint; 0 for a size that is not known.
        change (`Callable`, *optional*): What is done to its values.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _load_pickle(path: Path, trust_pickle: bool):
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        # Memory-mapped tensors are read without a look at their checksums.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConversionError(
                f"{path} is damaged: the checksum of its part {damaged} is wrong. Download it again."
            )
    options = {"map_location": "cpu", "mmap": is_zip}
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if not needed and not is_zip:
            raise
        if not trust_pickle:
            raise ConversionError(
                f"{path} is a pickle that holds more than tensors{f' ({needed[1]})' if needed else ''}, and opening it could "
                "run any program. If you trust where it comes from, add --trust_pickle."
            ) from None
    try:
        return torch.load(path, weights_only=False, **options)
    except ImportError as error:
        raise ConversionError(
            f"{path} can only be opened where its program is installed: {one_line(error)}."
        ) from None


def read_weights(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Reads the weights of a checkpoint file: a pickle written by `torch.save`, or `.safetensors`. Tensors stay on disk
    until they are used.

    Args:
        path (`str` or `Path`): The file.
        trust_pickle (`bool`, defaults to `False`): Whether a pickle that holds more than tensors may be opened, which lets
            it run any program.

    Returns:
        The tensors by name, without the prefixes of wrappers, and the names of the other entries of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path} is {'a folder, not a file' if path.is_dir() else 'not there'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":
                contents = safetensors.torch.load_file(path)
            else:
                contents = _load_pickle(path, trust_pickle)
    except ConversionError:
        raise
    except Exception as error:  # the unpickler raises anything on arbitrary bytes
        known = isinstance(error, (RuntimeError, OSError, safetensors.SafetensorError))  # with a message worth reading
        reason = f" ({one_line(error).partition('. ')[0].strip(' .')})" if known else ""
        raise ConversionError(f"{path} is no checkpoint, or a damaged one{reason}.") from None

    entries = contents if isinstance(contents, Mapping) else {}
    others: list[str] = []
    key = next((key for key in WEIGHTS_KEYS if isinstance(entries.get(key), Mapping) and entries[key]), None)
    if key is not None:
        others = [str(name) for name in entries if name != key]
        entries = entries[key]
    # Parameters are tensors that require a gradient.
    weights = {name: value.detach() for name, value in entries.items() if isinstance(value, torch.Tensor)}
    others += [str(name) for name in entries if name not in weights]
    if not weights:
        held = f"a dict of {_listed(map(str, entries))}" if entries else f"a {type(contents).__name__}"
        raise ConversionError(f"{path} holds no weights, but {held}.")
    return strip_wrappers(weights), others


def strip_wrappers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` without `module.` and `_orig_mod.` in their names, wherever they stand."""
    stripped: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        plain = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if plain in stripped:
            raise ConversionError(f"{plain} is there twice, with and without the prefix of a wrapper.")
        stripped[plain] = tensor
    return stripped


def count_indices(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Number of different N in the names `prefix`N.(...), or `prefix`N/(...)."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)[./]")
    return len({match[1] for match in map(pattern.match, weights) if match})


def common_size(weights: Mapping[str, torch.Tensor], axes: Iterable[tuple[str, int]]) -> int:
    """
    The size that most of `axes`, pairs of a tensor's name and an axis, have; 0 when none is there. One wrong tensor is then
    reported as wrong, instead of all the others.
    """
    sizes = [weights[name].shape[axis] for name, axis in axes if name in weights and weights[name].ndim > axis]
    return Counter(sizes).most_common(1)[0][0] if sizes else 0


def rename_tensors(weights: Mapping[str, torch.Tensor], renames: list[Rename], what: str) -> dict[str, torch.Tensor]:
    """The tensors under their new names, in float32. Raises a `ConversionError` unless `weights` are exactly the sources."""
    sources = {rename.source for rename in renames}
    missing = [rename.source for rename in renames if rename.source not in weights]
    unknown = [name for name in weights if name not in sources]
    wrong = []
    for rename in renames:
        if rename.source not in weights:
            continue
        tensor, shape = weights[rename.source], rename.shape
        if (
            len(tensor.shape) != len(shape)
            or any(size not in (0, actual) for size, actual in zip(shape, tensor.shape))
            or tensor.numel() == 0
        ):
            expected = " x ".join(str(size or "?") for size in shape)
            actual = " x ".join(map(str, tensor.shape)) or "a single number"
            wrong.append(f"{rename.source} ({actual} instead of {expected})")
        elif tensor.layout != torch.strided or tensor.is_meta:
            wrong.append(
                f"{rename.source} ({'without values' if tensor.is_meta else tensor.layout} instead of a dense tensor)"
            )
        elif not tensor.is_floating_point():
            wrong.append(f"{rename.source} ({tensor.dtype} instead of a float type)")
        elif not tensor.isfinite().all():
            wrong.append(f"{rename.source} (has infinite or undefined values)")
    problems = [
        f"{kind}: {_listed(dict.fromkeys(names))}"  # a tensor that is taken apart has several targets
        for kind, names in {"missing": missing, "unknown": unknown, "wrong": wrong}.items()
        if names
    ]
    if problems:
        raise ConversionError(f"these are not the tensors of a {what}. {'; '.join(problems)}.")

    pieces: dict[str, list[torch.Tensor]] = {}
    for rename in renames:
        tensor = weights[rename.source].float()
        pieces.setdefault(rename.target, []).append(rename.change(tensor) if rename.change else tensor)
    return {name: (torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()) for name, parts in pieces.items()}
