#!/usr/bin/env python
# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Trains an image tokenizer (`diffusers.VQModel`) as in taming transformers' VQGAN or LlamaGen's VQ: reconstruction, optional perceptual
(LPIPS) and adversarial (PatchGAN, hinge) losses, codebook learnt by gradient, unused codes restarted.

    accelerate launch training/train_vqgan.py --config configs/vqgan_fashion_mnist.yaml
    torchrun --standalone --nproc_per_node 2 training/train_vqgan.py --config ...        two processes without a GPU
"""

import dataclasses
import importlib.util
import inspect
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from maskgit.data import ImageDataset, UnreadableImageError, load_image_dataset
from maskgit.images import make_grid
from maskgit.options import RunOptions, check_keys, load_options, option, user_errors
from maskgit.publishing import push_folder_to_hub
from maskgit.tokenization import decode_tokens, encode_images, psnr
from maskgit.training_utils import (
    averaged_weights,
    load_checkpoint,
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
class TokenizerOptions(RunOptions):
    """Options of `train_vqgan.py`, besides those of every run."""

    must_match: ClassVar[tuple[str, ...]] = (
        *RunOptions.must_match,
        *("model", "data", "image_size", "quantizer_loss", "discriminator_learning_rate", "adam_beta1", "adam_beta2"),
        *("discriminator_channels", "discriminator_layers"),
    )
    debug_values: ClassVar[dict[str, Any]] = {
        "max_train_steps": 4,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "image_size": 32,
        "model.block_out_channels": [16, 32, 32],
        "model.down_block_types": ["DownEncoderBlock2D"] * 3,
        "model.up_block_types": ["UpDecoderBlock2D"] * 3,
        "model.layers_per_block": 1,
        "model.norm_num_groups": 16,
        "model.num_vq_embeddings": 64,
        "perceptual_weight": 0.0,
        "discriminator_start": 2,
        "discriminator_channels": 8,
        "discriminator_layers": 2,
        "restart_steps": 2,
        "validation_images": 16,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "log_every": 1,
        "dataloader_num_workers": 0,
    }

    data: str = option(
        help="Images: a folder (of class folders, parquet, webdataset shards or saved by datasets), or a dataset on the Hub."
    )
    train_split: str = option("train", help="Split of the data to train on.")
    validation_split: str | None = option(
        None,
        help="Split of held-out images; null: validation_images of the training images are held out, at most a tenth.",
    )
    validation_images: int = option(
        1000, help="Held-out images used at each validation; the last one uses all of them."
    )
    image_size: int = option(256, help="Side of the square images, in pixels.")
    random_crop: bool = option(True, help="Cut training images at random places; false: at the centre.")
    random_flip: bool = option(True, help="Mirror half of the training images left to right.")

    model: dict = option({}, help="Arguments of diffusers.VQModel; lookup_from_codebook is always on.")
    quantizer_loss: Literal["taming", "llamagen"] = option(
        "taming",
        help="taming: weight 1 on the encoder's distance to its code, 0.25 on the code's; llamagen: the reverse, on unit vectors.",
    )
    reconstruction_loss: Literal["l1", "mse"] = option("l1", help="l1 (taming) or mse (LlamaGen).")
    perceptual_weight: float = option(
        0.0, help="Weight of LPIPS (VGG16), published: 1. Needs the package lpips, which downloads its weights."
    )
    discriminator_start: int | None = option(None, help="Step at which the adversarial loss sets in; null: never.")
    discriminator_weight: float = option(
        0.8, help="Weight of the adversarial loss (taming: 0.8 and adaptive; LlamaGen: 0.5 and not)."
    )
    discriminator_adaptive: bool = option(
        True, help="Scale the adversarial loss to the reconstruction's gradient at the last layer."
    )
    discriminator_learning_rate: float | None = option(
        None, help="Constant rate of the discriminator; null: learning_rate."
    )
    discriminator_channels: int = option(64, help="Width of the discriminator's first layer.")
    discriminator_layers: int = option(3, help="Layers of the discriminator with stride 2.")
    adam_beta1: float = option(0.9, help="Adam's first decay rate (taming: 0.5).")
    adam_beta2: float = option(0.95, help="Adam's second decay rate (taming: 0.9).")
    restart_steps: int | None = option(
        None,
        help="Every so many steps, codes unused since the last time become outputs of the encoder; "
        "not in the last fifth of the run, so that what is saved has settled. null: never.",
    )
    ema_decay: float = option(
        0.9999, help="Decay of the moving average of the weights, which is what is validated and saved."
    )

    def __post_init__(self):
        super().__post_init__()
        self.model = self.model | {"lookup_from_codebook": True}
        check_keys(
            self.model,
            list(inspect.signature(VQModel.__init__).parameters)[1:],
            "argument of diffusers.VQModel in model,",
        )
        for name in (
            "validation_images",
            "image_size",
            "discriminator_channels",
            "discriminator_layers",
            "restart_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0.")
        factor = 2 ** (len(self.model.get("block_out_channels", (64,))) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size={self.image_size}: the model downsamples {factor} times, give a multiple of {factor}."
            )
        if (
            self.mixed_precision == "fp16"
            and self.gradient_accumulation_steps > 1
            and self.discriminator_start is not None
        ):  # clipping one model's gradients takes the loss scale from those that the other has accumulated
            raise ValueError(
                "mixed_precision='fp16' with a discriminator needs gradient_accumulation_steps=1: give bf16, or a larger train_batch_size."
            )
        if self.perceptual_weight and importlib.util.find_spec("lpips") is None:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} needs the package lpips: pip install lpips, or give 0."
            )


class PatchDiscriminator(nn.Sequential):
    """
    The PatchGAN discriminator of pix2pix, in the sizes of taming transformers: images (batch, 3, height, width) in [-1, 1] to one logit per
    patch. https://huggingface.co/papers/1611.07004
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        for i in range(num_layers):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self:
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)


class TrainableTokenizer(nn.Module):
    """
    A `VQModel` with what training needs from one forward pass. With `unit_codes` the encoder's outputs are normalised to length 1, as the
    codebook is kept (`normalize_codebook`): the nearest code is then the same with and without normalising, so that the trained model is a
    plain `VQModel`. `code_counts` says how often each code was chosen, by all processes, since codes were last restarted.
    """

    def __init__(self, vqvae: VQModel, unit_codes: bool):
        super().__init__()
        self.vqvae = vqvae
        self.unit_codes = unit_codes
        self.register_buffer("code_counts", torch.zeros(vqvae.config.num_vq_embeddings, dtype=torch.long))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latents = self.vqvae.encode(images).latents
        with torch.autocast(images.device.type, enabled=False):
            latents = F.normalize(latents.float(), dim=1) if self.unit_codes else latents.float()
            codes, quantizer_loss, (_, _, indices) = self.vqvae.quantize(latents)
        reconstruction = self.vqvae.decoder(self.vqvae.post_quant_conv(codes))
        return reconstruction, quantizer_loss, latents.permute(0, 2, 3, 1).flatten(0, 2), indices


@torch.no_grad()
def normalize_codebook(codebook: torch.Tensor):
    codebook.copy_(F.normalize(codebook, dim=-1))


@torch.no_grad()
def restart_unused_codes(
    tokenizer: TrainableTokenizer,
    average: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    latents: torch.Tensor,
    seed: int,
) -> int:
    """
    Replaces the codes that were not used since the last restart by some of the given encoder outputs (vectors, dim), in the codebook and in
    its moving average; their optimizer state starts anew. Returns how many. Alike on every process if the arguments are.
    """
    codebook = tokenizer.vqvae.quantize.embedding.weight
    unused = (tokenizer.code_counts == 0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = latents[torch.randint(len(latents), (len(unused),), generator=generator).to(latents.device)]
    for tensor in (codebook, average):
        tensor[unused] = chosen
    for value in optimizer.state[codebook].values():
        if value.shape == codebook.shape:
            value[unused] = 0
    tokenizer.code_counts.zero_()
    return len(unused)


@contextmanager
def averaged_vqvae(ema: EMAModel, tokenizer: TrainableTokenizer):
    """The tokenizer's `VQModel` with the averaged weights, in evaluation mode, as it is saved."""
    with averaged_weights(ema, tokenizer):
        if tokenizer.unit_codes:
            normalize_codebook(tokenizer.vqvae.quantize.embedding.weight)
        tokenizer.eval()
        yield tokenizer.vqvae
    tokenizer.train()


@torch.no_grad()
def validate(accelerator: Accelerator, vqvae: VQModel, loader, grid_file: Path) -> dict[str, float]:
    """
    PSNR (dB, mean over images, of images rounded to bytes) and the share of codes used on held-out images; writes a grid image of originals
    above their reconstructions.
    """
    decibels, tokens = [], []
    for index, batch in enumerate(loader):
        images = batch["pixel_values"]
        indices = encode_images(vqvae, images)
        reconstructions = decode_tokens(vqvae, indices)
        decibels.append(accelerator.gather_for_metrics(psnr(images, reconstructions)))
        tokens.append(accelerator.gather_for_metrics(indices))
        if index == 0 and accelerator.is_main_process:
            count = min(16, len(images))
            pictures = torch.cat([images[:count], reconstructions[:count]]).cpu()
            grid_file.parent.mkdir(parents=True, exist_ok=True)
            make_grid(VaeImageProcessor().postprocess(pictures), columns=count).save(grid_file)
    used = torch.cat(tokens).unique().numel()
    return {"psnr": torch.cat(decibels).mean().item(), "codebook_usage": used / vqvae.config.num_vq_embeddings}


def main(options: TokenizerOptions):
    with user_errors():
        accelerator = make_accelerator(
            options, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
        )
        images = load_image_dataset(options.data, options.train_split)
        if options.validation_split is not None:
            held_out = load_image_dataset(options.data, options.validation_split)
        else:
            count = min(options.validation_images, len(images) // 10)
            if count == 0:
                raise ValueError(f"{options.data} has only {len(images)} images: give more, or a validation_split.")
            logger.info(f"{count} of the {len(images):,} training images are held out for validation")
            parts = images.train_test_split(test_size=count, seed=options.seed)
            images, held_out = parts["train"], parts["test"]
        images = ImageDataset(images, options.image_size, options.random_crop, options.random_flip, options.seed)
        loader = make_train_loader(accelerator, options, images)
        vqvae = VQModel(**options.model)
        checkpoint = start_run(accelerator, options)

    def make_validation_loader(count: int):
        rows = ImageDataset(held_out.select(range(min(count, len(held_out)))), options.image_size)
        return accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=options.train_batch_size))

    validation_loader = make_validation_loader(options.validation_images)

    # VQModel's quantiser has taming's weights; `legacy=False` is how diffusers spells the ones that VQ-VAE's authors and LlamaGen use.
    unit_codes = options.quantizer_loss == "llamagen"
    vqvae.quantize.legacy = not unit_codes
    codebook = vqvae.quantize.embedding.weight
    if unit_codes:
        normalize_codebook(codebook)
    tokenizer = TrainableTokenizer(vqvae, unit_codes)
    discriminator = PatchDiscriminator(options.discriminator_channels, options.discriminator_layers)
    set_seed(options.seed, device_specific=True)
    perceptual = None
    if options.perceptual_weight:
        import lpips

        try:
            perceptual = lpips.LPIPS(net="vgg").requires_grad_(False).eval().to(accelerator.device)
        except OSError as error:  # its VGG16 is downloaded
            with user_errors():
                raise ValueError(
                    f"perceptual_weight={options.perceptual_weight} needs VGG16's weights, which cannot be downloaded ({error}): "
                    "put them into torch's cache, or give perceptual_weight=0."
                ) from None

    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=options.learning_rate, betas=betas)
    discriminator_rate = options.discriminator_learning_rate or options.learning_rate
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=discriminator_rate, betas=betas)
    wrapped_tokenizer, wrapped_discriminator, optimizer, discriminator_optimizer = accelerator.prepare(
        tokenizer, discriminator, optimizer, discriminator_optimizer
    )
    lr_scheduler = make_lr_scheduler(accelerator, options, optimizer)
    ema = EMAModel(tokenizer.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    codebook_index = next(i for i, parameter in enumerate(tokenizer.parameters()) if parameter is codebook)
    accelerator.register_for_checkpointing(ema)

    step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    ema.to(accelerator.device)
    start_trackers(accelerator, options, "vqgan")
    logger.info(
        f"{vqvae.num_parameters():,} parameters, {len(images):,} images, steps {step} to {options.max_train_steps}"
    )
    progress = tqdm(
        total=options.max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process
    )
    last_time, last_step = time.time(), step

    for batch in training_batches(loader, step * options.gradient_accumulation_steps):
        if step >= options.max_train_steps:
            break
        images = batch["pixel_values"]
        adversarial = options.discriminator_start is not None and step >= options.discriminator_start
        with accelerator.accumulate(wrapped_tokenizer, wrapped_discriminator):
            reconstruction, quantizer_loss, latents, indices = wrapped_tokenizer(images)
            if options.restart_steps:
                tokenizer.code_counts += accelerator.reduce(torch.bincount(indices, minlength=len(codebook)))
            distance = F.l1_loss if options.reconstruction_loss == "l1" else F.mse_loss
            reconstruction_loss = distance(reconstruction, images)
            losses = {"reconstruction": reconstruction_loss, "quantizer": quantizer_loss}
            if perceptual is not None:
                losses["perceptual"] = perceptual(reconstruction, images).mean()
                reconstruction_loss = reconstruction_loss + options.perceptual_weight * losses["perceptual"]
            loss = reconstruction_loss + quantizer_loss
            if adversarial:
                discriminator.requires_grad_(False)
                with accelerator.autocast():
                    losses["generator"] = -discriminator(reconstruction).float().mean()
                discriminator.requires_grad_(True)
                weight = options.discriminator_weight
                if options.discriminator_adaptive:
                    last_layer = vqvae.decoder.conv_out.weight
                    wanted, given = (
                        torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
                        for term in (reconstruction_loss, losses["generator"])
                    )
                    weight = weight * (wanted / (given + 1e-4)).clamp(0, 1e4)
                loss = loss + weight * losses["generator"]
            accelerator.backward(loss)
            if accelerator.sync_gradients and options.max_grad_norm is not None:
                accelerator.clip_grad_norm_(tokenizer.parameters(), options.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

            if adversarial:
                real, fake = (wrapped_discriminator(x).float() for x in (images, reconstruction.detach()))
                losses["discriminator"] = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
                accelerator.backward(losses["discriminator"])
                if accelerator.sync_gradients and options.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(discriminator.parameters(), options.max_grad_norm)
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        step += 1
        if unit_codes:
            normalize_codebook(codebook)
        ema.step(tokenizer.parameters())
        logs = {}
        if options.restart_steps and step % options.restart_steps == 0 and step <= 0.8 * options.max_train_steps:
            logs["restarted_codes"] = restart_unused_codes(
                tokenizer,
                ema.shadow_params[codebook_index],
                optimizer,
                accelerator.gather(latents.detach()),
                options.seed + step,
            )
        progress.update()
        if step % options.log_every == 0 or step == options.max_train_steps:
            names, values = list(losses), torch.stack([value.detach().float() for value in losses.values()])
            logs |= dict(zip((f"loss/{name}" for name in names), accelerator.reduce(values, "mean").tolist()))
            count = (step - last_step) * options.train_batch_size * options.gradient_accumulation_steps
            logs["images_per_second"] = count * accelerator.num_processes / (time.time() - last_time)
            logs["learning_rate"] = lr_scheduler.get_last_lr()[0]
            last_time, last_step = time.time(), step
            progress.set_postfix(
                loss=f"{logs['loss/reconstruction']:.4f}", images_per_s=f"{logs['images_per_second']:.0f}"
            )
        if options.validation_steps and step % options.validation_steps == 0 and step < options.max_train_steps:
            with averaged_vqvae(ema, tokenizer) as averaged:
                grid_file = Path(options.output_dir) / "samples" / f"step-{step}.png"
                results = validate(accelerator, averaged, validation_loader, grid_file)
            logger.info(f"step {step}: {json.dumps(results)}")
            logs |= {f"validation/{name}": value for name, value in results.items()}
        if logs:
            accelerator.log(logs, step=step)
        if options.checkpointing_steps and (
            step % options.checkpointing_steps == 0 or step == options.max_train_steps
        ):
            save_checkpoint(accelerator, options, step)

    progress.close()
    with averaged_vqvae(ema, tokenizer) as averaged:
        grid_file = Path(options.output_dir) / "grid.png"
        results = validate(accelerator, averaged, make_validation_loader(len(held_out)), grid_file)
        logger.info(f"final: {json.dumps(results)}")
        accelerator.log({f"validation/{name}": value for name, value in results.items()}, step=step)
        if accelerator.is_main_process:
            (Path(options.output_dir) / "results.json").write_text(json.dumps(results | {"step": step}) + "\n")
            folder = Path(options.output_dir) / "vqvae"
            averaged.save_pretrained(folder)
            if options.push_to_hub:
                with user_errors():
                    logger.info(f"uploaded: {push_folder_to_hub(folder, options.hub_model_id)}")
            print(f"Saved the tokenizer: {folder}")
    accelerator.end_training()


if __name__ == "__main__":
    options = load_options(TokenizerOptions)
    with user_errors((UnreadableImageError,)):
        main(options)
