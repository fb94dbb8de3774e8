# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: the accelerator, data order, learning rates, averaged weights, checkpoints."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi

from .data import TOKEN_DATASET_INFO, ImageDataset, TokenDataset, load_image_dataset
from .options import RunOptions
from .tokenization import load_tokenizer, tokenizer_checksum


logger = get_logger(__name__)

OPTIONS_NAME = "options.yaml"
PROGRESS_NAME = "progress.json"
# What `accelerate launch` sets for training in shards.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


# ---------------------------------------------------------------- the data


def load_data(
    data: str,
    splits: Sequence[str],
    tokenizer: str | ModelMixin | None,
    image_size: int | None = None,
    random_crop: bool = False,
    random_flip: bool = False,
    seed: int = 0,
) -> tuple[ModelMixin, list[TokenDataset] | list[ImageDataset], list[str], tuple[int, int]]:
    """
    Images of classes as tokens, or as pixels for the tokenizer to encode in training.

    Args:
        data (`str`): A token dataset made by `encode_dataset.py`, or images: what `load_image_dataset` takes.
        splits (`Sequence[str]`): Of the data; the first is trained on.
        tokenizer (`str` or `ModelMixin`, *optional*): Folder or Hub id of the tokenizer, or the tokenizer. Defaults to the one that
            the token dataset was made with.
        image_size (`int`, *optional*): Side of the images in pixels. Images need it.
        random_crop, random_flip (`bool`): How the images of the first split are varied.
        seed (`int`): Of these variations.

    Returns:
        The tokenizer, a dataset for each split, the names of the classes, and height and width of the token grid.
    """
    if (Path(data) / TOKEN_DATASET_INFO).is_file():
        sets = [TokenDataset(data, split) for split in splits]
        name, remedy = "the model", "encode the images with its tokenizer."
        if not isinstance(tokenizer, ModelMixin):
            name = tokenizer or sets[0].tokenizer
            remedy = "give the tokenizer that they were made with, or encode the images again."
            tokenizer = load_tokenizer(name)
        names, grid = sets[0].label_names, sets[0].grid_size
        if tokenizer.config.num_vq_embeddings != sets[0].codebook_size:
            raise ValueError(
                f"the tokens in {data} are of {sets[0].codebook_size} codes, but the tokenizer of {name} has "
                f"{tokenizer.config.num_vq_embeddings}: {remedy}"
            )
        if tokenizer_checksum(tokenizer) != sets[0].tokenizer_checksum:
            raise ValueError(f"the tokens in {data} were made with other weights than those of {name}: {remedy}")
        return tokenizer, sets, names, grid

    if tokenizer is None or image_size is None:
        found = "is no token dataset" if Path(data).exists() else "is not there"
        missing = "image_size" if tokenizer is not None else "tokenizer and image_size"
        raise ValueError(
            f"{data} {found}: encode images with encode_dataset.py, or give {missing} to train on images."
        )
    tokenizer = tokenizer if isinstance(tokenizer, ModelMixin) else load_tokenizer(tokenizer)
    images = [load_image_dataset(data, split) for split in splits]
    if "label" not in images[0].features:
        raise ValueError(f"{data} has no labels: put the images of each class into a folder of its own.")
    factor = 2 ** (len(tokenizer.config.block_out_channels) - 1)
    if image_size % factor:
        raise ValueError(f"image_size={image_size} must be a multiple of {factor}, the tokenizer's factor.")
    sets = [
        ImageDataset(dataset, image_size, random_crop and i == 0, random_flip and i == 0, seed)
        for i, dataset in enumerate(images)
    ]
    return tokenizer, sets, images[0].features["label"].names, (image_size // factor,) * 2


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
