# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""The file formats of Google's MaskGIT (Flax) and of open-muse."""

import json
import mmap
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .checkpoints import ConversionError, one_line, read_weights


# How open-muse names the weights in a folder.
MUSE_FILES = ("pytorch_model.bin", "model.safetensors", "pytorch_model.safetensors")


def _flax_array(code: int, data: bytes) -> torch.Tensor | None:
    """An extension type of flax's msgpack files: 1 is an array, of (shape, name of its dtype, bytes in C order)."""
    import msgpack

    if code != 1:
        return None  # single numbers, of an optimizer
    shape, dtype, values = msgpack.unpackb(data)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"array of type {dtype}")
    return torch.frombuffer(bytearray(values), dtype=getattr(torch, dtype)).reshape(shape)


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def read_flax(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Reads the weights of a Flax checkpoint (msgpack).

    Args:
        path (`str` or `Path`): The file.
        trust_pickle (`bool`): As in `read_weights`; of no effect, since msgpack holds data only.

    Returns:
        The tensors by their names, joined by "/", and the names of the other entries of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path} is {'a folder, not a file' if path.is_dir() else 'not there'}.")
    try:
        import msgpack
    except ImportError:
        raise ConversionError(
            f"{path} is read with the package msgpack, which is missing: pip install msgpack"
        ) from None
    if zipfile.is_zipfile(path):
        raise ConversionError(f"{path} is no Flax checkpoint but a zip file, as PyTorch's are: choose its own source.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            tree = msgpack.unpackb(contents, ext_hook=_flax_array)
    except Exception as error:  # arbitrary bytes raise anything
        known = type(error) is ValueError  # with a message worth reading
        reason = f" ({one_line(error).strip(' .')})" if known else ""
        raise ConversionError(f"{path} is no Flax checkpoint, or a damaged one{reason}.") from None
    if not isinstance(tree, Mapping) or not isinstance(tree.get("params"), Mapping):
        held = f"a dict of {', '.join(map(str, list(tree)[:8]))}" if isinstance(tree, Mapping) else type(tree).__name__
        raise ConversionError(f"{path} holds no 'params', where a Flax checkpoint has its weights, but {held}.")
    entries = dict(_flatten(tree["params"]))
    weights = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    others = [name for name in tree if name != "params"] + [name for name in entries if name not in weights]
    return weights, others


def _find_muse_folder(path: Path) -> Path:
    """The folder with the weights at or below `path`: its own, that of the averaged weights, or the only one."""
    folders = sorted(
        config.parent
        for config in path.rglob("config.json")
        if any((config.parent / name).is_file() for name in MUSE_FILES)
    )
    averaged = [folder for folder in folders if folder.name == "ema_model"]
    for candidates in ([folder for folder in folders if folder == path], averaged, folders):
        if len(candidates) == 1:
            return candidates[0]
    if folders:
        listed = ", ".join(str(folder.relative_to(path)) for folder in (averaged or folders)[:8])
        raise ConversionError(f"{path} holds several models: give the folder of one of {listed}.")
    raise ConversionError(
        f"{path} holds no model: expected a folder with config.json and {' or '.join(MUSE_FILES[:2])}."
    )


def read_muse_folder(path: str | Path, trust_pickle: bool = False) -> tuple[dict[str, torch.Tensor], list[str], dict]:
    """
    Reads the weights of an open-muse model.

    Args:
        path (`str` or `Path`): Its folder, one that holds it somewhere below, or its file of weights alone.
        trust_pickle (`bool`, defaults to `False`): As in `read_weights`.

    Returns:
        The tensors by name, the names of the other entries of the file, and the config beside the file; an empty one if
        there is none.
    """
    path = Path(path)
    if path.suffix == ".zip" and path.is_file():
        raise ConversionError(f"{path} is an archive: extract it, and give the folder.")
    if path.is_dir():
        path = _find_muse_folder(path)
        path = next(path / name for name in MUSE_FILES if (path / name).is_file())
    weights, others = read_weights(path, trust_pickle)
    config_path = path.with_name("config.json")
    if not config_path.is_file():
        return weights, others, {}
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{config_path} is no JSON ({one_line(error)}).") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{config_path} is not the config of a model.")
    return weights, others, config
