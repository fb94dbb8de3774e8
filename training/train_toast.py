#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Train a self-guidance adapter for a masked generative transformer, which stays as it is.

    accelerate launch training/train_toast.py --config configs/toast_fashion_mnist.yaml
    accelerate launch training/train_toast.py --config configs/toast_fashion_mnist.yaml debug=true output_dir=outputs/try

The pipeline with the adapter is in output_dir/pipeline: `maskgit sample --model output_dir/pipeline`.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from maskgit import MaskGitPipeline, PartitionTransformer2DModel, ToastAdapter
from maskgit.data import UnreadableImageError
from maskgit.images import make_grid
from maskgit.loading import load_pipeline
from maskgit.model_card import write_model_card
from maskgit.options import RunOptions, load_options, option, user_errors
from maskgit.publishing import push_folder_to_hub
from maskgit.schedulers.scheduling_maskgit_utils import check_masking_schedule, masking_ratio
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


@dataclasses.dataclass(kw_only=True)
class ToastOptions(RunOptions):
    debug_values: ClassVar[dict] = {
        "max_train_steps": 10,
        "lr_warmup_steps": 2,
        "ema_start_step": 2,
        "train_batch_size": 8,
        "validation_steps": 5,
        "validation_batches": 2,
        "checkpointing_steps": 5,
        "log_every": 1,
        "dataloader_num_workers": 0,
        "num_inference_steps": 4,
    }
    must_match: ClassVar[tuple[str, ...]] = (
        *RunOptions.must_match,
        "pretrained_model",
        "data",
        "split",
        "anchor_factor",
        "use_blank_second",
        "masking_schedule",
        "substitution_rate",
        "ema_decay",
    )

    pretrained_model: str = option(
        help="The pipeline to train an adapter for: a folder, a Hub id, builtin or builtin-NAME. It is not changed."
    )
    data: str = option(
        help="A token dataset made by encode_dataset.py with the pipeline's tokenizer, or images: a folder, webdataset shards, a "
        "name on the Hub."
    )
    split: str = option("train", help="Split of the data to train on.")
    validation_split: str | None = option(
        None, help="Split on which the losses are measured, with the same masks each time; null: none."
    )
    validation_batches: int | None = option(None, help="Measure them on so many batches only; null: on all.")
    image_size: int | None = option(None, help="Side of the images in pixels, when data holds images.")
    random_crop: bool = option(
        False, help="Cut images at random places instead of the centre, when data holds images."
    )
    random_flip: bool = option(False, help="Mirror half of the images, when data holds images.")

    anchor_factor: int = option(16, help="Width of the adapter's table of classes, in hidden sizes.")
    use_blank_second: bool = option(
        True, help="Whether the second pass sees a blank canvas, as published, or what the first pass saw."
    )
    masking_schedule: str = option("cosine", help="Distribution of the masking ratio: cosine, arccos, linear, ...")
    substitution_rate: float = option(
        0.3, help="Share of the known tokens that are replaced by random ones, which the adapter learns to correct."
    )
    label_smoothing: float = option(0.1, help="Label smoothing of the correction loss.")
    variational_weight: float = option(0.1, help="Weight of the variational loss.")
    adam_beta1: float = option(0.9, help="First beta of Adam.")
    adam_beta2: float = option(0.96, help="Second beta of Adam.")
    ema_decay: float | None = option(
        0.9999, help="Highest decay of the average of the weights that is sampled from and saved; null: no average."
    )
    ema_start_step: int = option(
        0, help="The average starts after this step s, with the decay (1 + i) / (10 + i) at step s + 1 + i."
    )
    gradient_checkpointing: bool = option(False, help="Recompute blocks in the backward pass: slower, less memory.")

    self_guidance_scale: float = option(
        1.0, help="Self-guidance of the guided samples, and default of the saved pipeline."
    )
    num_inference_steps: int | None = option(None, help="Steps of the samples; null: the pipeline's own.")

    def __post_init__(self):
        super().__post_init__()
        check_masking_schedule(self.masking_schedule)
        for name in ("substitution_rate", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a number from 0 to 1.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: give a number between 0 and 1, or null.")
        for name in ("variational_weight", "ema_start_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more.")
        for name in ("anchor_factor", "self_guidance_scale", "validation_batches", "num_inference_steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0.")


def choose_substitutes(mask: torch.Tensor, draws: torch.Tensor, substitution_rate: float) -> torch.Tensor:
    """
    Which known tokens of an image are replaced by wrong ones: a share of them, but at least one. An image without known
    tokens has none; the published code replaces a masked one there, and trains it to be the mask.

    Args:
        mask (`torch.Tensor` of shape `(N,)`): True where a token is masked.
        draws (`torch.Tensor` of shape `(N,)`): Uniform random numbers; the lowest are chosen.
        substitution_rate (`float`): The share.

    Returns:
        `torch.Tensor`: bool (N,).
    """
    num_known = int((~mask).sum())
    count = max(1, round(substitution_rate * num_known)) if num_known > 0 else 0
    chosen = draws.masked_fill(mask, torch.inf).argsort()[:count]
    return torch.zeros_like(mask).scatter(0, chosen, True)


class CorruptedDataset(torch.utils.data.Dataset):
    """
    Adds to each item of a dataset what training hides and what it gets wrong of it: `mask`, bool (num_tokens,), true where a
    token is masked; `substituted`, bool (num_tokens,), true where it is replaced; and `substitutes`, long (num_tokens,), by
    what.

    All draws depend on the seed, the epoch (`set_epoch`) and the image alone. Substitutes are uniform over the codes: the
    published code means to draw them from the model's own prediction of the empty image, but takes the softmax twice, which
    leaves less than 0.2 % of a difference to uniform draws.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, num_tokens: int, codebook_size: int, options: ToastOptions):
        self.dataset = dataset
        self.num_tokens = num_tokens
        self.codebook_size = codebook_size
        self.options = options
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        # The leading 1 keeps these numbers apart from those that the dataset draws for crops and flips.
        random = np.random.default_rng((1, self.options.seed, self.epoch, index))
        draws = torch.from_numpy(random.random((2, self.num_tokens)))
        ratio = masking_ratio(torch.tensor(random.random()), self.options.masking_schedule, self.num_tokens)
        num_masked = max(1, round(float(ratio) * self.num_tokens))
        mask = torch.zeros(self.num_tokens, dtype=torch.bool).scatter(0, draws[0].argsort()[:num_masked], True)
        return self.dataset[index] | {
            "mask": mask,
            "substituted": choose_substitutes(mask, draws[1], self.options.substitution_rate),
            "substitutes": torch.from_numpy(random.integers(self.codebook_size, size=self.num_tokens)),
        }


class TrainableToast(torch.nn.Module):
    """
    An adapter and its transformer in one module, whose forward pass gives the losses: all of it runs inside what accelerate
    wraps, so that gradients are averaged over the processes, which the published code misses.

    Args:
        toast (`ToastAdapter`): The adapter: all that is trained.
        transformer (`ModelMixin`): A frozen transformer.
        label_smoothing (`float`): Of the correction loss.
    """

    def __init__(self, toast: ToastAdapter, transformer: ModelMixin, label_smoothing: float):
        super().__init__()
        self.toast = toast
        # Not a submodule: it is frozen, so that neither checkpoints nor other processes need its weights.
        self.frozen = (transformer,)
        self.label_smoothing = label_smoothing
        self.recorded: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        for block in transformer.transformer_blocks:
            block.register_forward_hook(self._record)

    def _record(self, block: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor):
        # Gradient checkpointing runs blocks again, in the backward pass: what they give then is known.
        if self.recorded is not None:
            self.recorded.append((inputs[0].detach(), output.detach()))

    def forward(
        self,
        tokens: torch.LongTensor,
        class_labels: torch.LongTensor,
        mask: torch.BoolTensor,
        substituted: torch.BoolTensor,
        substitutes: torch.LongTensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens (`torch.LongTensor` of shape `(B, N)`): Codes of the images.
            class_labels (`torch.LongTensor` of shape `(B,)`): Their classes.
            mask, substituted (`torch.BoolTensor` of shape `(B, N)`): Where tokens are masked, and where replaced.
            substitutes (`torch.LongTensor` of shape `(B, N)`): By which codes.

        Returns:
            The correction loss, summed over the replaced tokens: cross-entropy of the original ones in the second pass. The
            variational loss: how far each layer's decoder is from restoring the layer's input from its output, a mean over
            elements, summed over layers. And the number of replaced tokens that the most likely code of the second pass
            restores. 0-d tensors.
        """
        (transformer,) = self.frozen
        codebook_size = transformer.config.codebook_size
        input_ids = tokens.where(~substituted, substitutes).masked_fill(mask, codebook_size)
        with torch.no_grad():
            nowhere = tokens[:, :0]  # only the hidden states of this pass are needed
            hidden_states = transformer(
                input_ids, class_labels, positions=nowhere, output_hidden_states=True, return_dict=False
            )[1]
        features = self.toast(hidden_states, class_labels)
        if self.toast.config.use_blank_second:
            input_ids, class_labels = torch.full_like(input_ids, codebook_size), None
        self.recorded = []
        logits = transformer(
            input_ids, class_labels, top_down_features=features, full_vocabulary=True, return_dict=False
        )[0].float()
        recorded, self.recorded = self.recorded, None

        losses = F.cross_entropy(
            logits.flatten(0, 1), tokens.flatten(), label_smoothing=self.label_smoothing, reduction="none"
        )
        correction = (losses * substituted.flatten()).sum()
        variational = sum(
            F.mse_loss(decoder.to_below(after).float(), before.float())
            for decoder, (before, after) in zip(self.toast.decoders, recorded, strict=True)
        )
        num_correct = ((logits[..., :codebook_size].argmax(-1) == tokens) & substituted).sum()
        return correction, variational, num_correct


class Trainer:
    """One training run: what its steps share."""

    def __init__(self, options: ToastOptions):
        self.options = options
        with user_errors():
            self.accelerator = make_accelerator(options)
            self.pipeline = load_pipeline(options.pretrained_model, device="cpu")
            self.transformer, self.tokenizer = self.pipeline.transformer, self.pipeline.vqvae
            if isinstance(self.transformer, PartitionTransformer2DModel):
                raise ValueError(
                    f"{options.pretrained_model} has a partition transformer, which has no pass over a blank canvas and "
                    "cannot guide itself: give another model."
                )
            splits = [options.split] + ([options.validation_split] if options.validation_split else [])
            _, sets, label_names, grid = load_data(
                options.data,
                splits,
                self.tokenizer,
                options.image_size,
                options.random_crop,
                options.random_flip,
                options.seed,
            )
            self.check_fit(label_names, grid)
            config = self.transformer.config
            sets = [CorruptedDataset(images, grid[0] * grid[1], config.codebook_size, options) for images in sets]
            toast = ToastAdapter(
                config.hidden_size,
                config.num_layers,
                config.num_classes,
                anchor_factor=options.anchor_factor,
                use_blank_second=options.use_blank_second,
            )
            set_seed(options.seed, device_specific=True)
            checkpoint = start_run(self.accelerator, options)
            self.loader = make_train_loader(self.accelerator, options, sets[0])

        self.validation_loader = None
        if len(sets) > 1:
            count = (options.validation_batches or len(sets[1])) * options.train_batch_size
            images = torch.utils.data.Subset(sets[1], range(min(count, len(sets[1]))))
            loader = torch.utils.data.DataLoader(images, options.train_batch_size)
            self.validation_loader = self.accelerator.prepare(loader)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.toast = None
        self.pipeline.to(self.accelerator.device)
        for model in (self.transformer, self.tokenizer):
            model.requires_grad_(False)
        if options.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()  # of the second pass, the only one with a graph
        self.ema = None
        if options.ema_decay is not None:
            self.ema = EMAModel(
                toast.parameters(), decay=options.ema_decay, update_after_step=options.ema_start_step, foreach=True
            )
            self.accelerator.register_for_checkpointing(self.ema)
        optimizer = torch.optim.Adam(
            toast.parameters(), lr=options.learning_rate, betas=(options.adam_beta1, options.adam_beta2)
        )
        model = TrainableToast(toast, self.transformer, options.label_smoothing)
        self.toast = toast
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.lr_scheduler = make_lr_scheduler(self.accelerator, options, self.optimizer)
        self.step = load_checkpoint(self.accelerator, checkpoint) if checkpoint is not None else 0
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        start_trackers(self.accelerator, options, "maskgit")
        logger.info(f"{toast.num_parameters():,} parameters to train, {len(sets[0]):,} images")

    def check_fit(self, label_names: list[str], grid: tuple[int, int]):
        """Raises a ValueError unless the data is what the transformer was trained on."""
        config = self.transformer.config
        size = config.sample_size
        for what, has, needs in (
            ("classes", len(label_names), config.num_classes),
            ("codes", self.tokenizer.config.num_vq_embeddings, config.codebook_size),
            ("tokens a side", grid, (size, size) if isinstance(size, int) else tuple(size)),
        ):
            if has != needs:
                raise ValueError(
                    f"{self.options.data} has {has} {what}, but {self.options.pretrained_model} has {needs}: give the data that "
                    "it was trained on."
                )
        if self.options.use_blank_second:
            blank = torch.full((1, grid[0] * grid[1]), config.codebook_size)
            try:
                self.transformer(blank, None, positions=blank[:, :0])
            except ValueError:
                raise ValueError(
                    f"{self.options.pretrained_model} was trained without a label for no class, which the blank canvas needs: "
                    "give use_blank_second=false."
                ) from None

    def losses(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = batch["input_ids"] if "input_ids" in batch else encode_images(self.tokenizer, batch["pixel_values"])
        return self.model(tokens.flatten(1), batch["label"], batch["mask"], batch["substituted"], batch["substitutes"])

    def train_step(self, batches: list[dict]) -> dict[str, torch.Tensor]:
        """One optimizer step on the batches that are accumulated: what this process has of the losses and of the counts."""
        accelerator = self.accelerator
        counted = torch.stack([batch["substituted"].sum() for batch in batches]).sum()
        # The mean over all processes and accumulated batches together, whatever each one's share of substitutes. Both
        # accelerate and DDP divide; their factors are put back.
        total = accelerator.reduce(counted.float()).clamp(min=1)
        scale = accelerator.num_processes * len(batches)
        sums = {"correction": 0.0, "variational": 0.0, "correct": 0.0, "substituted": counted}
        for batch in batches:
            with accelerator.accumulate(self.model):
                correction, variational, num_correct = self.losses(batch)
                correction, variational = correction / total, self.options.variational_weight * variational / scale
                accelerator.backward((correction + variational) * scale)
                sums["correction"] += correction.detach()
                sums["variational"] += variational.detach()
                sums["correct"] += num_correct
                if accelerator.sync_gradients and self.options.max_grad_norm is not None:
                    sums["grad_norm"] = accelerator.clip_grad_norm_(
                        self.toast.parameters(), self.options.max_grad_norm
                    )
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.toast.parameters())
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
        self.model.train()
        self.transformer.train()  # frozen, but with its dropout in both passes, as published
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
                    loss=f"{logs['loss']:.3f}", corrected=f"{logs['corrected']:.1%}", images_s=f"{speed:.0f}"
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
            with averaged_weights(self.ema, self.toast):
                self.save_pipeline()
        accelerator.end_training()

    def summarize(self, history: list[dict]) -> dict[str, float]:
        """Means over the steps since the last log and over all processes."""
        sums = {
            name: self.accelerator.reduce(torch.stack([entry[name] for entry in history]).sum().float()).item()
            for name in ("correction", "variational", "correct", "substituted")
        }
        losses = {name: sums[name] / len(history) for name in ("correction", "variational")}
        logs = {
            "loss": sum(losses.values()),
            "correction_loss": losses["correction"],
            "variational_loss": losses["variational"],
            "corrected": sums["correct"] / max(sums["substituted"], 1),
            "corrected_by_chance": 1 / self.transformer.config.codebook_size,
        }
        if "grad_norm" in history[-1]:
            logs["grad_norm"] = float(history[-1]["grad_norm"])
        return logs

    @torch.no_grad()
    def validate(self):
        """Measure the losses on the validation split, without label smoothing, and sample with and without self-guidance."""
        self.model.eval()
        self.transformer.eval()
        module = self.accelerator.unwrap_model(self.model)
        module.label_smoothing = 0.0
        with averaged_weights(self.ema, self.toast):
            if self.validation_loader is not None:
                totals = torch.zeros(5, device=self.accelerator.device)
                for batch in self.validation_loader:
                    correction, variational, num_correct = self.losses(batch)
                    count = batch["substituted"].sum()
                    size = torch.tensor(len(batch["label"]), device=count.device)
                    totals += torch.stack([correction, variational * size, num_correct, count, size]).float()
                correction, variational, num_correct, count, size = self.accelerator.reduce(totals).tolist()
                logs = {
                    "validation_correction_loss": correction / count,
                    "validation_variational_loss": self.options.variational_weight * variational / size,
                    "validation_corrected": num_correct / count,
                }
                self.accelerator.log(logs, step=self.step)
                logger.info(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in logs.items()))
            if self.accelerator.is_main_process:
                self.sample_images()
        self.accelerator.wait_for_everyone()
        module.label_smoothing = self.options.label_smoothing
        self.model.train()
        self.transformer.train()

    def make_pipeline(self) -> MaskGitPipeline:
        defaults = (self.pipeline.config.call_defaults or {}) | {
            "self_guidance_scale": self.options.self_guidance_scale
        }
        components = self.pipeline.components | {"toast": self.toast}
        return MaskGitPipeline(**components, id2label=self.pipeline.config.id2label, call_defaults=defaults)

    @property
    def samples_file(self) -> Path:
        return Path(self.options.output_dir) / "samples" / f"step-{self.step:07d}.png"

    def sample_images(self):
        """Two images of each of the first ten classes without self-guidance, and beside them the same seeds with it."""
        pipeline = self.make_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        labels = list(range(min(self.transformer.config.num_classes, 10)))
        grids = []
        for scale in (0.0, self.options.self_guidance_scale):
            images = pipeline(
                labels,
                num_images_per_label=2,
                self_guidance_scale=scale,
                num_inference_steps=self.options.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in range(2 * len(labels))],
            ).images
            grids.append(make_grid(images[0::2] + images[1::2], columns=len(labels)))
        width, height = grids[0].size
        gap = height // 8
        both = Image.new("RGB", (2 * width + gap, height), "white")
        both.paste(grids[0], (0, 0))
        both.paste(grids[1], (width + gap, 0))
        self.samples_file.parent.mkdir(exist_ok=True)
        both.save(self.samples_file)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = pipeline.image_processor.pil_to_numpy(both)
                tracker.writer.add_images("samples", pixels, self.step, dataformats="NHWC")

    def save_pipeline(self):
        """Write the pipeline with the adapter, the last sample grid and a model card, and upload it if asked to."""
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
            summary=f"A masked generative transformer for images of {self.transformer.config.num_classes} classes, with an "
            "adapter for self-guidance. Samples from the same seeds: without it on the left, with it on the right.",
            sections={
                "Training": f"The adapter: {options.max_train_steps} steps of {images_per_step} images, data "
                f"`{shown['data']}`, with `train_toast.py` of the package `maskgit` and these options:\n\n"
                f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"
            },
        )
        print(f"Saved the pipeline. Sample from it: maskgit sample --model {folder}")
        if options.push_to_hub:
            with user_errors():
                print(f"Uploaded it: {push_folder_to_hub(folder, options.hub_model_id)}")


if __name__ == "__main__":
    trainer = Trainer(load_options(ToastOptions))
    with user_errors((UnreadableImageError,)):
        trainer.train()
