# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: options from YAML and the command line, the accelerator, data order, checkpoints."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import torch
import yaml
from accelerate import Accelerator, skip_first_batches
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
    set_seed,
)
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id


logger = get_logger(__name__)

OPTIONS_NAME = "options.yaml"
PROGRESS_NAME = "progress.json"
# piecewise_constant needs rules that no option holds.
LR_SCHEDULERS = (
    *(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT),
    "constant_with_cosine_tail",
)
# What `accelerate launch` sets for training in shards.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


# ---------------------------------------------------------------- options


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


# ---------------------------------------------------------------- the run


def make_accelerator(options: RunOptions, **kwargs) -> Accelerator:
    """
    The accelerator of a run: seeded, logging, with the settings under which a resumed run sees the data in the same order. Without a GPU
    it runs on the CPU, where `torchrun --standalone --nproc_per_node N` starts N processes. All processes start from the same seed: call
    `set_seed(options.seed, device_specific=True)` when the initial weights are made, so that each then draws its own dropout.

    Args:
        options (`RunOptions`): of the run.
        kwargs: further arguments of `Accelerator`, such as `kwargs_handlers`.
    """
    for variable, name in SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"{name} is not supported: run `accelerate config` again and choose plain data parallel training. "
                "The largest published model fits on one GPU many times."
            )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=options.mixed_precision,
        # Accumulation goes on over the end of an epoch, so that a step is always the same number of batches.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=str(Path(options.output_dir) / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
        **kwargs,
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    logger.info(accelerator.state, main_process_only=False)
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # also "no" where nothing was chosen
    if launched_with not in ("no", options.mixed_precision):
        logger.warning(
            f"training with the option mixed_precision={options.mixed_precision}; {launched_with}, chosen for "
            "`accelerate launch`, has no effect."
        )
    set_seed(options.seed)
    return accelerator


def start_trackers(accelerator: Accelerator, options: RunOptions, project_name: str):
    """Starts the tracker with the options as its hyperparameters (trackers take numbers and text only)."""
    config = {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in dataclasses.asdict(options).items()
    }
    accelerator.init_trackers(project_name, config=config)


def make_train_loader(accelerator: Accelerator, options: RunOptions, dataset: torch.utils.data.Dataset):
    """
    A shuffled, prepared loader of whole batches for `training_batches`.

    Args:
        accelerator (`Accelerator`): from `make_accelerator`.
        options (`RunOptions`): of the run.
        dataset (`torch.utils.data.Dataset`): map-style; its `set_epoch` is called each epoch if it has one.
    """
    needed = options.train_batch_size * accelerator.num_processes
    if len(dataset) < needed:
        raise ValueError(
            f"the training data has {len(dataset)} images, less than one batch of {needed} over all processes: lower train_batch_size."
        )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=options.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.dataloader_num_workers,
        # Its own generator: making an iterator must not draw from the global one, which is restored on resume.
        generator=torch.Generator().manual_seed(options.seed),
        pin_memory=accelerator.device.type == "cuda",
    )
    return accelerator.prepare(loader)


def training_batches(loader: torch.utils.data.DataLoader, batches_done: int) -> Iterator[Any]:
    """
    Batches without end, epoch after epoch, going on exactly after the first `batches_done` ones (steps x accumulation).

    Anything random in the loader's dataset must depend on the epoch and the index only, see `maskgit.data.ImageDataset`.
    """
    epoch, skipped = divmod(batches_done, len(loader))
    while True:
        loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)
        yield from skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


def constant_with_cosine_tail(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    """
    Factor on the learning rate of Halton-MaskGIT's recipe (arXiv 2503.17076): linear warm-up from 0, constant, and over the last tenth
    of the steps a half cosine down to 1 %.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    tail = (step - 0.9 * num_training_steps) / (0.1 * num_training_steps)
    return max(0.5 * (1 + math.cos(math.pi * tail)), 0.01) if tail > 0 else 1.0


def make_lr_scheduler(
    accelerator: Accelerator, options: RunOptions, optimizer: AcceleratedOptimizer
) -> AcceleratedScheduler:
    """The learning rate schedule of the options for a prepared optimizer. Step it with that, inside `accelerator.accumulate`."""
    # A prepared scheduler is stepped num_processes times per optimizer step.
    num_warmup_steps = options.lr_warmup_steps * accelerator.num_processes
    num_training_steps = options.max_train_steps * accelerator.num_processes
    if options.lr_scheduler == "constant_with_cosine_tail":
        factor = functools.partial(
            constant_with_cosine_tail, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps
        )
        return accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, factor))
    return accelerator.prepare(
        get_scheduler(
            options.lr_scheduler,
            optimizer.optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
        )
    )


@contextlib.contextmanager
def averaged_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` has the weights of its moving average; without an average, its own."""
    if ema is None:
        yield
        return
    parameters = list(model.parameters())
    ema.store(parameters)
    try:
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)


# ---------------------------------------------------------------- checkpoints


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when a checkpoint was written."""
    return json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))["step"]


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    folders = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def start_run(accelerator: Accelerator, options: RunOptions) -> Path | None:
    """
    Prepares `output_dir` and returns the checkpoint to go on from, or None to start anew. A folder that holds something is refused unless
    `resume_from_checkpoint` or `overwrite` is set; half-written checkpoints that a killed run left are removed. If the model is to be
    uploaded, its repository is made now, so that a missing token shows before training.
    """
    output_dir = Path(options.output_dir)
    checkpoint = None
    if options.resume_from_checkpoint == "latest":
        checkpoint = next(reversed(list_checkpoints(output_dir)), None)
    elif options.resume_from_checkpoint is not None:
        checkpoint = Path(options.resume_from_checkpoint)
        if not (checkpoint / PROGRESS_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint={options.resume_from_checkpoint!r} is no checkpoint (no {PROGRESS_NAME} in it)."
            )
        step = step_of(checkpoint)
        later = [path.name for path in list_checkpoints(output_dir) if int(path.name.split("-")[1]) > step]
        if later:
            raise ValueError(
                f"resume_from_checkpoint={options.resume_from_checkpoint!r} goes back to step {step}, but "
                f"output_dir={options.output_dir!r} has later checkpoints: delete {', '.join(later)}, or give another output_dir."
            )
    elif not options.overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"output_dir={options.output_dir!r} is not empty: give another one, resume_from_checkpoint=latest to go on, or overwrite=true."
        )
    if checkpoint is not None:
        check_resumable(accelerator, options, checkpoint)
    if options.push_to_hub and accelerator.is_main_process:
        try:
            HfApi().create_repo(options.hub_model_id, exist_ok=True)
        except Exception as error:  # no token, no connection, refused: the client's errors share no base class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"cannot upload to hub_model_id={options.hub_model_id!r}: {reason}") from error

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in output_dir.glob(".checkpoint-*.tmp"):
            shutil.rmtree(leftover)
        if options.overwrite:
            for folder in (*list_checkpoints(output_dir), output_dir / "logs"):
                shutil.rmtree(folder, ignore_errors=True)
        write_options(options, output_dir)
    accelerator.wait_for_everyone()
    return checkpoint


def write_options(options: RunOptions, folder: Path):
    """Writes the options of a run into a folder, as a file that `--config` takes."""
    text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False)
    (folder / OPTIONS_NAME).write_text(text, encoding="utf-8")


def check_resumable(accelerator: Accelerator, options: RunOptions, checkpoint: Path):
    """Raises a ValueError if a checkpoint was made with other values of the options that must match; warns of other differences."""
    saved = yaml.safe_load((checkpoint / OPTIONS_NAME).read_text(encoding="utf-8"))
    progress = json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))
    for name in options.must_match:
        if saved.get(name) != getattr(options, name):
            raise ValueError(
                f"{name}={getattr(options, name)!r}, but {checkpoint} was made with {saved.get(name)!r}: use that, or another output_dir."
            )
    ignored = ("output_dir", "overwrite", "resume_from_checkpoint")
    changed = [name for name in saved if name not in ignored and saved[name] != getattr(options, name, None)]
    if changed:
        logger.warning(f"resuming from {checkpoint} with other values than it was made with: {', '.join(changed)}")
    if progress["num_processes"] != accelerator.num_processes:
        logger.warning(
            f"resuming on {accelerator.num_processes} processes from a run on {progress['num_processes']}: the data order differs"
        )


def save_checkpoint(accelerator: Accelerator, options: RunOptions, step: int):
    """
    Writes `output_dir/checkpoint-{step}` with everything given to `accelerator.prepare` and `register_for_checkpointing`, then deletes the
    oldest ones beyond the limit. Call it on every process. It is renamed into place when whole, so a killed run never leaves half of one.
    """
    output_dir = Path(options.output_dir)
    temporary = output_dir / f".checkpoint-{step}.tmp"
    final = output_dir / f"checkpoint-{step}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_options(options, temporary)
        progress = {"step": step, "num_processes": accelerator.num_processes}
        (temporary / PROGRESS_NAME).write_text(json.dumps(progress), encoding="utf-8")
        temporary.rename(final)
        checkpoints = list_checkpoints(output_dir)
        for old in checkpoints[: -options.checkpoints_total_limit] if options.checkpoints_total_limit else []:
            doomed = old.rename(
                output_dir / f".{old.name}.tmp"
            )  # so that a half-deleted one is not taken for a whole one
            shutil.rmtree(doomed)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> int:
    """
    Loads a checkpoint into everything that was prepared or registered, and returns its step. What was registered is on the CPU
    afterwards: move it to where it was.
    """
    accelerator.load_state(str(checkpoint))
    return step_of(checkpoint)
