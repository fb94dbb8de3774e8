# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Where models come from: the ones inside this package, folders, and the Hub."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from .pipelines import MaskGitPipeline
from .schedulers import ConfidenceScheduler, HaltonScheduler, SelfGuidedScheduler


BUILTIN_MODELS = Path(__file__).parent / "builtin_models"
DEFAULT_BUILTIN = "fashion-mnist"
SCHEDULERS = {"halton": HaltonScheduler, "confidence": ConfidenceScheduler, "self-guided": SelfGuidedScheduler}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def builtin(name: str | None = None) -> Path:
    """
    Folder of a model that comes with this package, for `MaskGitPipeline.from_pretrained`.

    Args:
        name (`str`, *optional*): Which one; the default is a small model of Fashion-MNIST.
    """
    name = DEFAULT_BUILTIN if name is None else name
    names = sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"There is no built-in model {name!r}: there are {', '.join(names) or 'none'}.")
    return BUILTIN_MODELS / name


def resolve_builtin(model: str) -> str:
    """The folder of the built-in model that `builtin` or `builtin-NAME` means; any other name or path as it is."""
    if model == "builtin" or model.startswith("builtin-"):
        return str(builtin(model.partition("-")[2] or None))
    return model


def _find_folder(model: str) -> Path:
    """The folder of `model`, downloaded if it is on the Hub."""
    model = resolve_builtin(model)
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise OSError(f"There is no folder {model!r}: give a folder, user/name on the Hub, builtin or builtin-NAME.")
    try:
        return Path(MaskGitPipeline.download(model))
    except (OSError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise OSError(f"There is no folder {model!r}, and the Hub gives no model of this name: {reason}") from error


def _read_weight_names(folder: Path) -> dict[str, set[str]]:
    """Names of the weights of each model in the folder. An OSError tells what the folder lacks, or its damaged file."""
    index = MaskGitPipeline.load_config(folder) if (folder / "model_index.json").is_file() else {}
    has_toast = index.get("toast", [None])[0] is not None
    models = ["transformer", "vqvae"] + (["toast"] if has_toast else [])
    needed = ["model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in models)]
    missing = [name for name in needed if not (folder / name).is_file()]
    files = {name: sorted((folder / name).glob("*.safetensors")) for name in models}
    missing += [f"{name}/*.safetensors" for name, paths in files.items() if not paths]
    if missing:
        raise OSError(f"The folder '{folder}' holds no complete pipeline: it lacks {', '.join(missing)}.")
    weight_names = {name: set() for name in files}
    for name, paths in files.items():
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    weight_names[name].update(file.keys())
            except SafetensorError as error:
                raise OSError(f"The file '{path}' is damaged or cut short, get it again: {error}") from error
    return weight_names


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """No bar for the few files of a folder, and no warnings of what is checked here."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def find_device(device: str | None) -> torch.device:
    """The device of that name, by default the GPU (cuda, mps, ...) if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return accelerator or torch.device("cpu")
    available = ["cpu"]
    if accelerator is not None:
        available += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in available:
        raise ValueError(f"There is no device {device!r} on this machine: there are {', '.join(available)}.")
    return torch.device(device)


def load_pipeline(
    model: str = "builtin", scheduler: str | None = None, dtype: str = "float32", device: str | None = None
) -> MaskGitPipeline:
    """
    Load a pipeline for sampling. What is wrong with the arguments or the files is a ValueError or an OSError that says so.

    Args:
        model (`str`): "builtin", "builtin-NAME", a folder, or the id of a repository on the Hub.
        scheduler (`str`, *optional*): "halton", "confidence" or "self-guided", with its default settings if the checkpoint's
            own scheduler is another one. Defaults to the checkpoint's own.
        dtype (`str`): "float32", "bfloat16" or "float16".
        device (`str`, *optional*): A device of torch. Defaults to the GPU (cuda, mps, ...) if there is one, else the CPU.
    """
    for name, value, allowed in (("scheduler", scheduler, (None, *SCHEDULERS)), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"The {name} is {value!r}, but must be one of {', '.join(filter(None, allowed))}.")
    target = find_device(device)
    with _quiet_diffusers():
        folder = _find_folder(model)
        in_files = _read_weight_names(folder)
        pipe = MaskGitPipeline.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True)
        for name, in_file in in_files.items():
            # diffusers leaves out what does not fit, and goes on.
            different = sorted(in_file ^ set(getattr(pipe, name).state_dict()))
            if different:
                raise OSError(
                    f"The weights in '{folder / name}' are not those of a {type(getattr(pipe, name)).__name__} with this "
                    f"config: {len(different)} are missing or too many, such as {different[0]}."
                )
        pipe.to(target)
    if scheduler is not None and not isinstance(pipe.scheduler, SCHEDULERS[scheduler]):
        pipe.scheduler = SCHEDULERS[scheduler](mask_token_id=pipe.scheduler.config.mask_token_id)
    return pipe
