# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Converted models as folders: written whole or not at all, and loaded again before they are shown."""

import inspect
import os
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from ..pipelines import MaskGitPipeline
from .checkpoints import ConversionError, Converted, one_line


def imagenet_labels() -> dict[int, str]:
    """Names of ImageNet's 1000 classes by id: those of torchvision."""
    names = (Path(__file__).parents[1] / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return dict(enumerate(names))


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the program as an exception, so that what was begun is put away."""
    if threading.current_thread() is not threading.main_thread():  # only this one may handle signals
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def new_folder(output_dir: str | Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """
    A folder to write in that becomes `output_dir` at the end, and vanishes if anything fails before, or the program is
    stopped.

    Args:
        output_dir (`str` or `Path`): The folder to make.
        overwrite (`bool`): Whether to replace it if it is there and not empty.
        inputs (`Sequence`): Files that `overwrite` must not delete.
    """
    output = Path(output_dir).resolve()
    if output.exists() and not output.is_dir():
        raise ConversionError(f"{output_dir} is a file, so it cannot be the output folder.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise ConversionError(f"{output_dir} is not empty: choose another --output_dir, or add --overwrite.")
        for path in (*inputs, Path.cwd(), Path.home()):
            if Path(path).resolve().is_relative_to(output):
                raise ConversionError(f"overwriting {output_dir} would delete {path}: choose another --output_dir.")
    parent = next(folder for folder in output.parents if folder.exists())
    with _terminable():
        yield from _staged(output, output_dir, parent)


def _staged(output: Path, output_dir: str | Path, parent: Path) -> Iterator[Path]:
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=parent))
    except OSError as error:
        raise ConversionError(f"{output_dir} cannot be made: {error.strerror} ({parent}).") from None
    try:
        folder, old = staging / "new", staging / "old"
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            if output.exists():
                output.rename(old)
            folder.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    except SafetensorError as error:
        raise ConversionError(f"the weights cannot be written to {output_dir}: {one_line(error)}") from None
    finally:
        shutil.rmtree(staging)


def make_readable(folder: Path) -> None:
    """Gives the weights below `folder` the mode of other new files; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def _build(model_class: type[ModelMixin], converted: Converted) -> ModelMixin:
    """The model around the converted tensors, without copies of them."""
    with torch.device("meta"):
        model = model_class.from_config(converted.config)
    model.load_state_dict(converted.state_dict, strict=True, assign=True)
    return model.eval()


def _checksums(state_dict: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: zlib.crc32(tensor.contiguous().numpy()) for name, tensor in state_dict.items()}


def write_models(folder: Path, models: dict[str, tuple[type[ModelMixin], Converted]], **pipeline_arguments) -> None:
    """
    Saves converted models in `folder` and loads them again, which must give the same tensors.

    Args:
        folder (`Path`): Where to write.
        models (`dict`): Class and conversion of the "transformer" and the "vqvae", or of one of them, and perhaps of the
            "toast". Transformer and vqvae make a pipeline; without either, each model is saved alone in its subfolder. The
            dict is emptied, so that the checkpoints leave memory before the folder is loaded.
        pipeline_arguments: What else `MaskGitPipeline` is made of.
    """
    classes = {name: model_class for name, (model_class, _) in models.items()}
    checksums = {name: _checksums(converted.state_dict) for name, (_, converted) in models.items()}
    built = {name: _build(*models.pop(name)) for name in classes}
    is_pipeline = {"transformer", "vqvae"} <= set(classes)
    if is_pipeline:
        MaskGitPipeline(**built, **pipeline_arguments).save_pretrained(folder)
    else:
        for name, model in built.items():
            model.save_pretrained(folder / name)
            if not type(model).__module__.startswith("diffusers."):
                source = Path(inspect.getsourcefile(type(model)))
                shutil.copyfile(source, folder / name / source.name)
        del model
    del built
    make_readable(folder)

    loaded = {}
    for name, model_class in classes.items():
        loaded[name], info = model_class.from_pretrained(folder / name, output_loading_info=True)
        problems = [f"{kind}: {names}" for kind, names in info.items() if names]
        written = _checksums(loaded[name].state_dict())
        problems += [
            f"{tensor} differs" for tensor, checksum in checksums[name].items() if written[tensor] != checksum
        ]
        if problems:
            raise ConversionError(f"what was written does not load as what was converted ({'; '.join(problems[:3])}).")
    if is_pipeline:
        MaskGitPipeline.from_pretrained(folder, **loaded)
