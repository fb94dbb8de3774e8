#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Train a masked generative transformer on images of classes.

    accelerate launch training/train_maskgit.py --config configs/maskgit_fashion_mnist.yaml
    accelerate launch training/train_maskgit.py --config configs/maskgit_fashion_mnist.yaml debug=true output_dir=outputs/try

The final pipeline is in output_dir/pipeline: `maskgit sample --model output_dir/pipeline`.
"""

import dataclasses
import inspect
import shutil
import time
from pathlib import Path
from typing import ClassVar, Literal

import torch
import yaml
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from maskgit import (
    ConfidenceScheduler,
    HaltonScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
)
from maskgit.data import UnreadableImageError
from maskgit.images import make_grid
from maskgit.loading import resolve_builtin
from maskgit.masking import MaskedDataset, masked_token_loss
from maskgit.model_card import write_model_card
from maskgit.options import RunOptions, check_keys, load_options, option, user_errors
from maskgit.publishing import push_folder_to_hub
from maskgit.tokenization import encode_images
from maskgit.training_utils import (
    averaged_weights,
    load_checkpoint,
    load_data,
    make_accelerator,
    make_lr_scheduler,
    make_train_loader,
    save_checkpoint,
    start_run,
    start_trackers,
    training_batches,
)


logger = get_logger(__name__)

# architecture: its class, and the scheduler that its published models are sampled with
ARCHITECTURES = {
    "dit": (MaskGitDiTTransformer2DModel, HaltonScheduler),
    "bert": (MaskGitBertTransformer2DModel, ConfidenceScheduler),
    "vit": (MaskGitViTTransformer2DModel, ConfidenceScheduler),
    "partition": (PartitionTransformer2DModel, HaltonScheduler),
}


@dataclasses.dataclass(kw_only=True)
class MaskGitOptions(RunOptions):
    debug_values: ClassVar[dict] = {
        "max_train_steps": 20,
        "lr_warmup_steps": 2,
        "train_batch_size": 8,
        "validation_steps": 10,
        "checkpointing_steps": 10,
        "log_every": 1,
        "dataloader_num_workers": 0,
        "compile": False,
        "num_inference_steps": 4,
        "model.hidden_size": 64,
        "model.num_layers": 2,
        "model.num_attention_heads": 4,
        "model.intermediate_size": 128,
    }
    must_match: ClassVar[tuple[str, ...]] = (
        *RunOptions.must_match,
        "data",
        "split",
        "architecture",
        "model",
        "masking_schedule",
        "label_drop",
        "ema_decay",
    )

    data: str = option(
        help="A token dataset made by encode_dataset.py, or images: a folder, webdataset shards, a name on the Hub."
    )
    split: str = option("train", help="Split of the data to train on.")
    validation_split: str | None = option(
        None, help="Split on which loss and accuracy are measured, with the same masks each time; null: none."
    )
    tokenizer: str | None = option(
        None, help="Folder or Hub id of the tokenizer; null: the one that the token dataset was made with."
    )
    image_size: int | None = option(None, help="Side of the images in pixels, when data holds images.")
    random_flip: bool = option(False, help="Mirror half of the images, when data holds images.")

    architecture: Literal["dit", "bert", "vit", "partition"] = option(
        "dit",
        help="Transformer: dit (Halton-MaskGIT), bert (Google's MaskGIT), vit (MaskGIT-pytorch v1), partition (Partition "
        "Generative Modeling).",
    )
    model: dict = option(
        {}, help="Arguments of the transformer's class; codebook, classes and grid are those of the data."
    )
    pretrained_model: str | None = option(
        None, help="Start from this pipeline's transformer (folder, Hub id or builtin) instead of random weights."
    )

    masking_schedule: str = option("arccos", help="Distribution of the masking ratio: arccos, cosine, linear, ...")
    label_drop: float = option(0.1, help="Share of the images that is trained without class, for guidance.")
    loss_on: Literal["all", "masked"] = option("all", help="Loss at all positions, or at the masked ones only.")
    label_smoothing: float = option(0.0, help="Label smoothing of the loss.")
    adam_beta1: float = option(0.9, help="First beta of AdamW.")
    adam_beta2: float = option(0.999, help="Second beta of AdamW.")
    adam_weight_decay: float = option(0.03, help="Weight decay of AdamW, on every parameter.")
    ema_decay: float | None = option(
        None, help="Decay of the average of the weights that is sampled from and saved; null: no average."
    )
    gradient_checkpointing: bool = option(False, help="Recompute blocks in the backward pass: slower, less memory.")
    compile: bool = option(False, help="torch.compile the transformer.")

    guidance_scale: float = option(2.0, help="Guidance of the samples, and default of the saved pipeline; 1: off.")
    num_inference_steps: int = option(32, help="Steps of the samples, and default of the saved pipeline.")

    def __post_init__(self):
        super().__post_init__()
        allowed = set(inspect.signature(self.transformer_class.__init__).parameters) - {"self"}
        check_keys(self.model, allowed - {"codebook_size", "num_classes", "sample_size"}, "option in model,")
        for name in ("label_drop", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: give a number between 0 and 1, or null.")
        if self.guidance_scale < 0 or self.num_inference_steps < 1:
            raise ValueError("guidance_scale must be 0 or more, num_inference_steps 1 or more.")
        if self.architecture == "partition" and self.loss_on != "all":
            raise ValueError("the partition transformer predicts every token from the others: give loss_on=all.")
        if self.guidance_scale != 1 and self.label_drop == 0:
            raise ValueError(
                "guidance_scale other than 1 needs a label_drop above 0: only then is 'no class' trained."
            )

    @property
    def transformer_class(self) -> type[ModelMixin]:
        return ARCHITECTURES[self.architecture][0]


def make_transformer(options: MaskGitOptions, codebook_size: int, num_classes: int, grid: tuple[int, int]):
    model_class = options.transformer_class
    sample_size = grid[0] if grid[0] == grid[1] else grid
    if options.pretrained_model is None:
        transformer = model_class(
            codebook_size=codebook_size, num_classes=num_classes, sample_size=sample_size, **options.model
        )
    else:
        folder = resolve_builtin(options.pretrained_model)
        config = model_class.load_config(folder, subfolder="transformer")
        if config["_class_name"] != model_class.__name__:
            raise ValueError(
                f"{options.pretrained_model} holds a {config['_class_name']}, but architecture={options.architecture} is "
                f"a {model_class.__name__}: give the architecture that it has."
            )
        if config["codebook_size"] != codebook_size:
            raise ValueError(
                f"{options.pretrained_model} predicts {config['codebook_size']} codes, but the tokenizer has "
                f"{codebook_size}: encode the images with the tokenizer of the pretrained model."
            )
        for name, value in options.model.items():
            if name != "dropout" and config.get(name, value) != value:
                raise ValueError(
                    f"model.{name}={value!r}, but {options.pretrained_model} has {config[name]!r}: leave it out."
                )
        transformer = model_class.from_pretrained(folder, subfolder="transformer", **options.model).float().train()
        if transformer.config.num_classes != num_classes:
            logger.warning(
                f"{num_classes} classes instead of {config['num_classes']}: their embeddings start at random."
            )
            transformer.resize_class_embeddings(num_classes)
        if transformer.config.sample_size != sample_size:
            transformer.resize_position_embeddings(sample_size)
    if options.label_drop > 0 and not transformer.config.has_null_class:
        raise ValueError(
            f"this {model_class.__name__} has no label for dropped classes: give label_drop=0 and guidance_scale=1."
        )
    return transformer


def make_optimizer(options: MaskGitOptions, transformer: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        transformer.parameters(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
    )


class Trainer:
    """One training run: what its steps share."""

    def __init__(self, options: MaskGitOptions):
        self.options = options
        with user_errors():
            self.accelerator = make_accelerator(options)
            splits = [options.split] + ([options.validation_split] if options.validation_split else [])
            self.tokenizer, (train_set, *validation_sets), self.label_names, self.grid = load_data(
                options.data,
                splits,
                options.tokenizer,
                options.image_size,
                random_flip=options.random_flip,
                seed=options.seed,
            )
            num_tokens = self.grid[0] * self.grid[1]
            self.codebook_size, self.num_classes = self.tokenizer.config.num_vq_embeddings, len(self.label_names)
            masking = (num_tokens, options.masking_schedule, options.label_drop, options.seed)
            transformer = make_transformer(options, self.codebook_size, self.num_classes, self.grid)
            set_seed(options.seed, device_specific=True)
            checkpoint = start_run(self.accelerator, options)
            self.loader = make_train_loader(self.accelerator, options, MaskedDataset(train_set, *masking))

        self.validation_loader = None
        if validation_sets:
            loader = torch.utils.data.DataLoader(MaskedDataset(validation_sets[0], *masking), options.train_batch_size)
            self.validation_loader = self.accelerator.prepare(loader)
        self.tokenizer.to(self.accelerator.device).requires_grad_(False)
        self.prepare(transformer, checkpoint)
        start_trackers(self.accelerator, options, "maskgit")

    def prepare(self, transformer: torch.nn.Module, checkpoint: Path | None = None):
        """What `train_step` works on, put on the device, and in the state of a checkpoint if there is one."""
        options = self.options
        if options.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.ema = None
        if options.ema_decay is not None:
            self.ema = EMAModel(transformer.parameters(), decay=options.ema_decay, foreach=True)
            self.accelerator.register_for_checkpointing(self.ema)
        optimizer = make_optimizer(options, transformer)
        if options.compile:
            transformer.compile()  # in place: checkpoints are the same with and without
        self.transformer, self.optimizer = self.accelerator.prepare(transformer, optimizer)
        self.lr_scheduler = make_lr_scheduler(self.accelerator, options, self.optimizer)
        self.step = load_checkpoint(self.accelerator, checkpoint) if checkpoint is not None else 0
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    def loss(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = batch["input_ids"] if "input_ids" in batch else encode_images(self.tokenizer, batch["pixel_values"])
        return masked_token_loss(
            self.transformer,
            tokens,
            batch["label"],
            batch["mask"],
            batch["drop_label"],
            codebook_size=self.codebook_size,
            num_classes=self.num_classes,
            loss_on=self.options.loss_on,
            label_smoothing=self.options.label_smoothing,
        )

    def train_step(self, batches: list[dict]) -> dict[str, torch.Tensor]:
        """One optimizer step on the batches that are accumulated: sums over all processes, and the gradient norm."""
        accelerator = self.accelerator
        counted = torch.stack([batch["mask"].sum() for batch in batches]).sum()
        if self.options.loss_on == "all":
            counted = torch.tensor(sum(batch["mask"].numel() for batch in batches), device=accelerator.device)
        # The mean over all processes and accumulated batches together, whatever each one's share of masked tokens. Both
        # accelerate and DDP divide; their factors are put back.
        total = accelerator.reduce(counted.float()).clamp(min=1)
        scale = accelerator.num_processes * len(batches) / total
        sums = {"loss": 0.0, "correct": 0.0, "masked": 0.0}
        for batch in batches:
            with accelerator.accumulate(self.transformer):
                loss, _, num_correct = self.loss(batch)
                accelerator.backward(loss * scale)
                sums["loss"] += loss.detach() / total
                sums["correct"] += num_correct
                sums["masked"] += batch["mask"].sum()
                if accelerator.sync_gradients and self.options.max_grad_norm is not None:
                    sums["grad_norm"] = accelerator.clip_grad_norm_(
                        self.transformer.parameters(), self.options.max_grad_norm
                    )
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.transformer.parameters())
        self.step += 1
        return sums

    def train(self):
        options, accelerator = self.options, self.accelerator
        accumulation = options.gradient_accumulation_steps
        batches = training_batches(self.loader, self.step * accumulation)
        images_per_step = options.train_batch_size * accumulation * accelerator.num_processes
        bar = tqdm(
            total=options.max_train_steps, initial=self.step, desc="steps", disable=not accelerator.is_main_process
        )
        if self.step == options.max_train_steps:
            logger.info(f"nothing is left to train: the checkpoint has all {self.step} steps")
        history, start = [], time.perf_counter()
        while self.step < options.max_train_steps:
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            history.append(self.train_step([next(batches) for _ in range(accumulation)]))
            bar.update()
            if self.step % options.log_every == 0 or self.step == options.max_train_steps:
                speed = len(history) * images_per_step / (time.perf_counter() - start)
                logs = self.summarize(history) | {"learning_rate": learning_rate, "images_per_second": speed}
                accelerator.log(logs, step=self.step)
                bar.set_postfix(
                    loss=f"{logs['loss']:.3f}", accuracy=f"{logs['masked_accuracy']:.1%}", images_s=f"{speed:.0f}"
                )
                history, start = [], time.perf_counter()
            last = self.step == options.max_train_steps
            if options.checkpointing_steps and (last or self.step % options.checkpointing_steps == 0):
                save_checkpoint(accelerator, options, self.step)
            if not last and options.validation_steps and self.step % options.validation_steps == 0:
                self.validate()
                start = time.perf_counter()
        bar.close()
        self.validate()
        if accelerator.is_main_process:
            with averaged_weights(self.ema, self.transformer):
                self.save_pipeline()
        accelerator.end_training()

    def summarize(self, history: list[dict]) -> dict[str, float]:
        """Means over the steps since the last log and over all processes."""
        sums = {
            name: self.accelerator.reduce(torch.stack([entry[name] for entry in history]).sum().float()).item()
            for name in ("loss", "correct", "masked")
        }
        logs = {
            "loss": sums["loss"] / len(history),
            "masked_accuracy": sums["correct"] / max(sums["masked"], 1),
            "chance_accuracy": 1 / self.codebook_size,
        }
        if "grad_norm" in history[-1]:
            logs["grad_norm"] = float(history[-1]["grad_norm"])
        return logs

    @torch.no_grad()
    def validate(self):
        """Measure loss and accuracy on the validation split, and sample two images of each of the first ten classes."""
        self.transformer.eval()
        with averaged_weights(self.ema, self.transformer):
            if self.validation_loader is not None:
                totals = torch.zeros(4, device=self.accelerator.device)
                for batch in self.validation_loader:
                    loss, count, num_correct = self.loss(batch)
                    totals += torch.stack([loss, count, num_correct, batch["mask"].sum()]).float()
                loss, count, num_correct, num_masked = self.accelerator.reduce(totals).tolist()
                logs = {"validation_loss": loss / count, "validation_masked_accuracy": num_correct / num_masked}
                self.accelerator.log(logs, step=self.step)
                logger.info(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in logs.items()))
            if self.accelerator.is_main_process:
                self.sample_images()
        self.accelerator.wait_for_everyone()
        self.transformer.train()

    def make_pipeline(self) -> MaskGitPipeline:
        return MaskGitPipeline(
            transformer=self.accelerator.unwrap_model(self.transformer),
            vqvae=self.tokenizer,
            scheduler=ARCHITECTURES[self.options.architecture][1](mask_token_id=self.codebook_size),
            id2label=dict(enumerate(self.label_names)),
            call_defaults={
                "guidance_scale": self.options.guidance_scale,
                "num_inference_steps": self.options.num_inference_steps,
            },
        )

    @property
    def samples_file(self) -> Path:
        return Path(self.options.output_dir) / "samples" / f"step-{self.step:07d}.png"

    def sample_images(self):
        pipeline = self.make_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        labels = list(range(min(self.num_classes, 10)))
        generators = [torch.Generator().manual_seed(seed) for seed in range(2 * len(labels))]
        with torch.compiler.set_stance("force_eager"):  # a compiled transformer would be compiled anew for these sizes
            images = pipeline(labels, num_images_per_label=2, generator=generators).images
        grid = make_grid(images[0::2] + images[1::2], columns=len(labels))
        self.samples_file.parent.mkdir(exist_ok=True)
        grid.save(self.samples_file)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = pipeline.image_processor.pil_to_numpy(grid)
                tracker.writer.add_images("samples", pixels, self.step, dataformats="NHWC")

    def save_pipeline(self):
        """Write the final pipeline with the last sample grid and a model card, and upload it if asked to."""
        options = self.options
        folder = Path(options.output_dir) / "pipeline"
        # The card is to be published: of paths on this disk it has the last part.
        shown = {
            name: Path(value).resolve().name if isinstance(value, str) and Path(value).exists() else value
            for name, value in dataclasses.asdict(options).items()
        }
        self.make_pipeline().save_pretrained(folder)
        shutil.copyfile(self.samples_file, folder / "grid.png")
        images_per_step = (
            options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        )
        write_model_card(
            folder,
            title=shown["output_dir"],
            summary=f"A masked generative transformer for images of {self.num_classes} classes.",
            sections={
                "Training": f"Data `{shown['data']}`, {options.max_train_steps} steps of {images_per_step} images, with "
                "`train_maskgit.py` of the package `maskgit` and these options:\n\n"
                f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"
            },
        )
        print(f"Saved the pipeline. Sample from it: maskgit sample --model {folder}")
        if options.push_to_hub:
            with user_errors():
                print(f"Uploaded it: {push_folder_to_hub(folder, options.hub_model_id)}")


if __name__ == "__main__":
    trainer = Trainer(load_options(MaskGitOptions))
    with user_errors((UnreadableImageError,)):
        trainer.train()
