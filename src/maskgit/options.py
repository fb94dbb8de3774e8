# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Options of the training scripts: dataclasses, filled from a YAML file and key=value, and errors that fit on one line."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import torch
import yaml
from diffusers.optimization import SchedulerType
from huggingface_hub.utils import validate_repo_id


# piecewise_constant needs rules that no option holds.
LR_SCHEDULERS = (
    *(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT),
    "constant_with_cosine_tail",
)


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A documented field of an options dataclass; without a default the user must give it."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True)
class RunOptions:
    """
    Options of every training run. A script subclasses it, adds its own fields with `option(...)`, and sets:

    - `debug_values`: small values that `debug=true` puts in place of the config's (dotted keys reach into dicts; those of
      `model` are left out where a `pretrained_model` has its own);
    - `must_match`: options that a resumed run must share with its checkpoint.
    """

    debug_values: ClassVar[dict[str, Any]] = {}
    must_match: ClassVar[tuple[str, ...]] = (
        "seed",
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
    )

    output_dir: str = option(help="Folder for checkpoints, logs, sample images and the final model.")
    overwrite: bool = option(
        False, help="Start anew in an output_dir that holds another run; its checkpoints and logs are deleted."
    )
    seed: int = option(0, help="Seed of initial weights, data order and everything drawn during training.")
    debug: bool = option(False, help="Use small values for everything, to try the whole run in a minute on a CPU.")

    max_train_steps: int = option(100_000, help="Optimizer steps to train for.")
    train_batch_size: int = option(32, help="Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, help="Forward passes per optimizer step.")
    learning_rate: float = option(1e-4, help="Peak learning rate. It is not scaled with batch size or processes.")
    lr_scheduler: str = option("constant", help=f"One of {', '.join(LR_SCHEDULERS)}.")
    lr_warmup_steps: int = option(0, help="Optimizer steps of linear warm-up, for the schedules that have one.")
    max_grad_norm: float | None = option(1.0, help="Gradients are clipped to this norm; null: no clipping.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", help="Autocast precision; weights stay float32. fp16 needs a GPU."
    )

    dataloader_num_workers: int = option(0, help="Worker processes that load data, per training process; 0: none.")
    log_every: int = option(50, help="Steps between log lines in the tracker.")
    validation_steps: int | None = option(
        1000, help="Steps between validations with sample images; null: at the end only."
    )
    checkpointing_steps: int | None = option(1000, help="Steps between checkpoints; null: none.")
    checkpoints_total_limit: int | None = option(
        2, help="The oldest checkpoints are deleted beyond this number; null: keep all."
    )
    resume_from_checkpoint: str | None = option(
        None,
        help="latest (go on from the newest checkpoint in output_dir, or start if there is none), or a checkpoint folder.",
    )
    report_to: Literal["tensorboard", "wandb", "none"] = option(
        "tensorboard", help="Tracker to log to; tensorboard writes to output_dir/logs."
    )
    push_to_hub: bool = option(False, help="Upload the final model to the Hub.")
    hub_model_id: str | None = option(None, help="Repository on the Hub to upload to, as user/name.")

    def __post_init__(self):
        positive = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "log_every")
        optional = ("validation_steps", "checkpointing_steps", "checkpoints_total_limit", "max_grad_norm")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give a number above 0{' or null' if name in optional else ''}."
                )
        for name in ("seed", "lr_warmup_steps", "dataloader_num_workers", "learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more.")
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise ValueError(f"lr_scheduler={self.lr_scheduler!r}: expected one of {', '.join(LR_SCHEDULERS)}.")
        if self.mixed_precision == "fp16" and not torch.accelerator.is_available():
            raise ValueError("mixed_precision='fp16' has no effect without a GPU: use bf16 or no.")
        if self.overwrite and self.resume_from_checkpoint:
            raise ValueError("overwrite and resume_from_checkpoint exclude each other: give one of them.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id=user/name.")
        if self.hub_model_id:
            try:
                validate_repo_id(self.hub_model_id)
            except ValueError as error:
                raise ValueError(f"hub_model_id={self.hub_model_id!r}: {error}") from None
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ValueError(
                f"report_to={self.report_to!r} needs a missing package: pip install {self.report_to}, or report_to=none."
            )


OptionsType = TypeVar("OptionsType", bound=RunOptions)


def check_keys(given: Iterable[str], known: Iterable[str], what: str):
    """Raises a ValueError that names the nearest known key if one of `given` is not known."""
    known = list(known)
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}."
            raise ValueError(f"unknown {what} {key!r}: {hint}")


def convert_value(name: str, value: Any, annotation: Any) -> Any:
    """`value`, read from YAML, as the type `annotation`; a ValueError if it is of another one."""
    choices = get_args(annotation)
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        if value is None and NoneType in choices:
            return None
        for choice in choices:
            with contextlib.suppress(ValueError):
                return convert_value(name, value, choice)
    elif kind is Literal:
        if value is False and "no" in choices:  # YAML reads a bare `no` as false
            return "no"
        if value in choices:
            return value
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
    elif kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-4 as text
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = (
        annotation.__name__
        if isinstance(annotation, type)
        else str(annotation).replace("NoneType", "null").replace("None", "null")
    )
    raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: expected {expected}.")


def set_value(values: dict[str, Any], key: str, value: Any, fields: dict[str, dataclasses.Field]):
    """Sets `values[key]`; a dotted key (`model.hidden_size`) reaches into a dict, made from the field's default if need be."""
    name, *path = key.split(".")
    check_keys([name], fields, "option")
    if not path:
        values[name] = value
        return
    if name not in values and fields[name].default_factory is not dataclasses.MISSING:
        values[name] = fields[name].default_factory()
    target = values.setdefault(name, {})
    for part in path[:-1]:
        target = target.setdefault(part, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise ValueError(f"{key}: {name} is no mapping, so it has no {'.'.join(path)!r}.")
    target[path[-1]] = value


@contextlib.contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)):
    """Ends the program with exit code 2 and one line when one of `kinds`, taken for a user's mistake, is raised inside."""
    try:
        yield
    except kinds as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_writable(option: str, path: Path) -> None:
    """Raise an error if a file cannot be written there, before the hours of work that it is for."""
    if path.is_dir():
        raise ValueError(f"--{option} {path} is a folder: give a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"--{option} {path}: cannot write to '{path.parent}', {error.strerror}.") from error


def load_options(cls: type[OptionsType], argv: list[str] | None = None) -> OptionsType:
    """
    Reads `--config FILE.yaml [key=value ...]` into an options dataclass. Later ones win: the file, `debug_values` if debug is on, key=value.
    A user's mistake ends the program with exit code 2 and one line.

    Args:
        cls (`type`): `RunOptions` or a subclass.
        argv (`list[str]`, *optional*): the arguments, `sys.argv[1:]` by default.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    lines = ["options (in the YAML file, or as key=value; dotted keys such as model.act_fn=silu reach into mappings):"]
    for name, field in fields.items():
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        shown = "required" if default is dataclasses.MISSING else f"default: {json.dumps(default)}"
        lines += [f"  {name} ({shown})", f"      {field.metadata['help']}"]
    parser = argparse.ArgumentParser(
        description=sys.modules[cls.__module__].__doc__,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="options of the run; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    arguments = parser.parse_args(argv)

    with user_errors():
        path = Path(arguments.config)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            overrides = {}
            for text in arguments.overrides:
                key, separator, value = text.partition("=")
                if not separator:
                    raise ValueError(f"{text!r} is not of the form key=value.")
                overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} or an override is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no options: expected lines of the form `key: value`.")
        check_keys(values, fields, f"option in {path},")
        if overrides.get("debug", values.get("debug", False)):
            pretrained = overrides.get("pretrained_model", values.get("pretrained_model"))
            small = {
                key: value for key, value in cls.debug_values.items() if not (pretrained and key.startswith("model."))
            }
            overrides = small | overrides
        for key, value in overrides.items():
            set_value(values, key, value, fields)
        for name, field in fields.items():
            if name in values:
                values[name] = convert_value(name, values[name], field.type)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{name} is missing: add it to {path}, or {name}=... to the command line.")
        return cls(**values)
