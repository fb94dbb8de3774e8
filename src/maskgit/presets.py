# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Published results as presets: which checkpoint, which sampler, and the numbers to expect. One YAML file each."""

import dataclasses
import difflib
import inspect
from pathlib import Path
from typing import Any

import yaml

from .loading import SCHEDULERS
from .pipelines import MaskGitPipeline
from .pipelines.pipeline_maskgit import CALL_DEFAULTS


PRESETS = Path(__file__).parent / "preset_files"  # a link to configs/presets, which packaging follows
SCHEDULER_CLASSES = {cls.__name__: cls for cls in SCHEDULERS.values()}


@dataclasses.dataclass(frozen=True)
class Preset:
    """
    A published result.

    Args:
        name (`str`): Name of its file.
        model (`dict`): `source`, `download` and `conversion`: how to get the checkpoint, as commands.
        scheduler (`str`): Class of the scheduler.
        scheduler_config (`dict`): What differs from that class's defaults; the mask token is the model's.
        call (`dict`): Arguments of the pipeline's call.
        published (`dict`): `metrics`, their `protocol` and their `source`.
        reproduced (`bool`): Whether this project has measured the same.
    """

    name: str
    model: dict[str, Any]
    scheduler: str
    scheduler_config: dict[str, Any]
    call: dict[str, Any]
    published: dict[str, Any]
    reproduced: bool


def _check_keys(path: Path, given: dict, known, what: str, complete: bool = True) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{path} is no preset: {what} must be keys with values, but there is {given!r}.")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"{path}: unknown key {key!r} in {what}: {hint}")
    missing = [key for key in known if key not in given]
    if complete and missing:
        raise ValueError(f"{path}: {what} lacks {', '.join(missing)}.")


def preset_names() -> list[str]:
    """Names of the presets that come with this package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """
    Read a preset. What is wrong with it is a ValueError or an OSError that says so.

    Args:
        name_or_path (`str` or `Path`): One of `preset_names()`, or a YAML file of the same form.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name_or_path}.yaml"
        names = preset_names()
        if str(name_or_path) not in names:
            near = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."
            raise ValueError(f"There is no preset {str(name_or_path)!r}: {hint} A file of your own ends in .yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    fields = [field.name for field in dataclasses.fields(Preset) if field.name != "name"]
    _check_keys(path, content, fields, "a preset")
    for name, known, complete in (
        ("model", ("source", "download", "conversion"), True),
        ("published", ("metrics", "protocol", "source"), True),
        ("call", tuple(CALL_DEFAULTS), False),
    ):
        _check_keys(path, content[name], known, name, complete)
    if content["scheduler"] not in SCHEDULER_CLASSES:
        raise ValueError(
            f"{path}: the scheduler is {content['scheduler']!r}, but must be one of {', '.join(SCHEDULER_CLASSES)}."
        )
    cls = SCHEDULER_CLASSES[content["scheduler"]]
    known = [name for name in inspect.signature(cls).parameters if name != "mask_token_id"]
    _check_keys(path, content["scheduler_config"], known, "scheduler_config", complete=False)
    try:
        cls(mask_token_id=0, **content["scheduler_config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: scheduler_config: {error}") from None
    return Preset(name=path.stem, **content)


def apply_preset(pipe: MaskGitPipeline, preset: Preset) -> dict[str, Any]:
    """
    Give a pipeline the preset's scheduler.

    Args:
        pipe (`MaskGitPipeline`): Any pipeline: what is published for one model may be tried with another.
        preset (`Preset`): The result of `load_preset`.

    Returns:
        `dict`: Arguments of its call, all of those that a checkpoint has defaults for: `pipe(labels, **arguments)`.
    """
    cls = SCHEDULER_CLASSES[preset.scheduler]
    pipe.scheduler = cls(mask_token_id=pipe.transformer.config.codebook_size, **preset.scheduler_config)
    return CALL_DEFAULTS | preset.call
