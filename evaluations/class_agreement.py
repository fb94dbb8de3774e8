# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Does a generated image show the class that was asked for? A small classifier, trained on real images, is the judge.

    python evaluations/class_agreement.py --data data/fashion_mnist --model builtin --guidance_scale 1 2 3 --output_dir outputs/agreement
    python evaluations/class_agreement.py --data data/fashion_mnist --model builtin --generated outputs/sweep/*/ --output_dir outputs/agreement

The first makes images, the second judges those that evaluations/generate.py or sweep.py made.
It states the classifier's accuracy on real test images, the share of generated images that it gives the requested class,
how much the images of a class vary, and the accuracy on tokenizer reconstructions of the test images, with their PSNR (mean over images, of bytes). Meant for small images: the classifier reads them at the size that the model makes.
"""

import argparse
import json
import time
from pathlib import Path

import generate
import torch
import torch.nn.functional as F
from diffusers.training_utils import set_seed
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from maskgit.data import ImageDataset, load_image_dataset
from maskgit.images import image_to_tensor, make_grid
from maskgit.loading import load_pipeline
from maskgit.options import user_errors
from maskgit.tokenization import decode_tokens, encode_images, psnr


CLASSIFIER_NAME = "classifier.pt"


def make_classifier(num_classes: int) -> nn.Module:
    """Three stages of two 3x3 convolutions, halved between: float (B, 3, H, W) in [-1, 1] -> logits (B, num_classes)."""
    layers, channels = [], 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, num_classes)
    )


def load_images(data: str, split: str, size: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images, float (N, 3, size, size) in [-1, 1], their labels, long (N,), and the names of the classes."""
    dataset = load_image_dataset(data, split)
    if "label" not in dataset.features:
        raise ValueError(f"{data} has no labels to train a classifier on.")
    items = list(tqdm(ImageDataset(dataset, size), desc=f"reading {split} images"))
    labels = torch.tensor([item["label"] for item in items])
    return torch.stack([item["pixel_values"] for item in items]), labels, dataset.features["label"].names


def train_classifier(
    classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, device: str
) -> None:
    classifier.train()
    steps_per_epoch = len(images) // 128
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps_per_epoch)
    bar = tqdm(total=epochs * steps_per_epoch, desc="training the classifier")
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: steps_per_epoch * 128].view(-1, 128):
            batch = images[rows].to(device)
            # Small shifts, as the generated ones are not centred to the pixel either.
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(classifier(batch.roll(shift, (2, 3))), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    classifier.eval()


def load_generated(folder: str, num_classes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of generate.py, float (N, 3, size, size) in [-1, 1], and the classes that they were asked for, long (N,)."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        raise ValueError(f"{folder} was not written by evaluations/generate.py: it has no settings.json.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings["num_classes"] != num_classes:
        raise ValueError(
            f"{folder} has images of {settings['num_classes']} classes, but the model knows {num_classes}."
        )
    indices = sorted(generate.image_indices(Path(folder)))
    images = []
    for index in indices:
        with Image.open(generate.image_path(Path(folder), index)) as image:
            images.append(image_to_tensor(image, size))
    labels = [generate.label_of(index, settings["labels"], num_classes, settings["seed"]) for index in indices]
    return torch.stack(images), torch.tensor(labels)


def variance_within_classes(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Variance of a pixel (in [-1, 1]) among the images of a class, a mean over pixels and classes: low where all are alike."""
    return torch.stack([images[labels == label].var(dim=0).mean() for label in labels.unique()]).mean().item()


@torch.no_grad()
def classify(classifier: nn.Module, images: torch.Tensor, device: str) -> torch.Tensor:
    return torch.cat([classifier(batch.to(device)).argmax(-1).cpu() for batch in images.split(500)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="real images with classes: a folder or a name on the Hub")
    parser.add_argument("--train_split", default="train", help="split that the classifier is trained on")
    parser.add_argument("--test_split", default="test", help="split that its accuracy is measured on")
    parser.add_argument("--model", default="builtin", help="builtin, builtin-NAME, a folder, or a Hub id")
    parser.add_argument(
        "--num_images", type=int, default=1000, help="generated images, spread evenly over the classes"
    )
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="one row each")
    parser.add_argument("--num_inference_steps", type=int, default=16)
    parser.add_argument(
        "--generated",
        nargs="+",
        metavar="DIR",
        help="judge the images in these folders of evaluations/generate.py, instead of making some; one row each",
    )
    parser.add_argument("--epochs", type=int, default=6, help="passes of the classifier over the training images")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output_dir",
        required=True,
        help="for result.json, sample grids, and the classifier, which is used again when it fits",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a result.json that is there")
    args = parser.parse_args()

    output_dir = Path(args.output_dir)
    with user_errors():
        if (output_dir / "result.json").exists() and not args.overwrite:
            raise ValueError(
                f"{output_dir / 'result.json'} is there already: give another --output_dir, or --overwrite."
            )
        pipe = load_pipeline(args.model, device=args.device)
        num_classes = pipe.transformer.config.num_classes
        if args.num_images % num_classes:
            raise ValueError(f"--num_images {args.num_images} must be a multiple of the {num_classes} classes.")
        if not isinstance(pipe.transformer.config.sample_size, int):
            raise ValueError(f"{args.model} makes images that are not square, which the classifier cannot read.")
        size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        test_images, test_labels, names = load_images(args.data, args.test_split, size)
        if names != [pipe.id2label.get(i) for i in range(num_classes)]:
            raise ValueError(
                f"{args.data} has the classes {', '.join(names)}, but the model {', '.join(pipe.id2label.values())}."
            )
        generated = {Path(folder).name: load_generated(folder, num_classes, size) for folder in args.generated or []}
        output_dir.mkdir(parents=True, exist_ok=True)
        set_seed(args.seed)
        classifier = make_classifier(num_classes).to(args.device).eval()
        trained_on = {
            "data": args.data,
            "split": args.train_split,
            "size": size,
            "epochs": args.epochs,
            "seed": args.seed,
        }
        saved = {}
        if (output_dir / CLASSIFIER_NAME).exists():
            saved = torch.load(output_dir / CLASSIFIER_NAME, weights_only=True)
        if saved.get("trained_on") != trained_on:
            train_images, train_labels, _ = load_images(args.data, args.train_split, size)
            train_classifier(classifier, train_images, train_labels, args.epochs, args.device)
            saved = {"trained_on": trained_on, "state_dict": classifier.state_dict()}
            torch.save(saved, output_dir / CLASSIFIER_NAME)
        classifier.load_state_dict(saved["state_dict"])

    def share_correct(images, labels):
        return (classify(classifier, images, args.device) == labels).float().mean().item()

    tokenizer = pipe.vqvae.float()
    tokens = torch.cat([encode_images(tokenizer, batch.to(args.device)) for batch in test_images.split(500)])
    decoded = torch.cat([decode_tokens(tokenizer, batch).cpu() for batch in tokens.split(500)])
    result = {
        "model": args.model,
        "data": args.data,
        "classifier_accuracy_on_real_images": share_correct(test_images, test_labels),
        "classifier_accuracy_on_reconstructions": share_correct(decoded, test_labels),
        "variance_within_classes_of_real_images": variance_within_classes(test_images, test_labels),
        "tokenizer_psnr": psnr(test_images, decoded).mean().item(),
        "tokenizer_codebook_usage": tokens.unique().numel() / pipe.transformer.config.codebook_size,
        "agreement": {},
    }
    if not generated:
        result |= {
            "num_images": args.num_images,
            "num_inference_steps": args.num_inference_steps,
            "scheduler": type(pipe.scheduler).__name__,
        }
    print(f"classifier on {len(test_images)} real test images: {result['classifier_accuracy_on_real_images']:.1%}")
    print(f"classifier on their reconstructions: {result['classifier_accuracy_on_reconstructions']:.1%}")
    print(f"variance within their classes: {result['variance_within_classes_of_real_images']:.3f}")
    print(
        f"tokenizer: PSNR {result['tokenizer_psnr']:.2f} dB, uses {result['tokenizer_codebook_usage']:.1%} of its codes"
    )

    def add_result(name, images, labels, **more):
        right = (classify(classifier, images, args.device) == labels).float()
        of_class = {names[i]: right[labels == i].mean().item() for i in range(num_classes)}
        variance = variance_within_classes(images, labels)
        result["agreement"][name] = {
            "all": right.mean().item(),
            **of_class,
            "variance_within_classes": variance,
            **more,
        }
        shown = "  ".join(f"{n} {v:.0%}" for n, v in of_class.items())
        print(f"{name}: {right.mean():.1%}  {shown}  variance {variance:.3f}")

    for name, (images, labels) in generated.items():
        add_result(name, images, labels)

    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(num_classes).repeat_interleave(args.num_images // num_classes)
    for guidance_scale in [] if generated else args.guidance_scale:
        batches, start = [], time.perf_counter()
        for first in tqdm(range(0, args.num_images, args.batch_size), desc=f"sampling at guidance {guidance_scale}"):
            rows = labels[first : first + args.batch_size]
            generators = [torch.Generator().manual_seed(args.seed + first + i) for i in range(len(rows))]
            images = pipe(
                rows,
                guidance_scale=guidance_scale,
                num_inference_steps=args.num_inference_steps,
                generator=generators,
                output_type="pt",
            ).images
            batches.append(images.float().cpu() * 2 - 1)
        shown = [i for i in range(args.num_images) if i % (args.num_images // num_classes) < 10]
        pictures = pipe.image_processor.postprocess(torch.cat(batches)[shown], output_type="pil")
        make_grid(pictures, columns=len(shown) // num_classes).save(output_dir / f"grid_guidance_{guidance_scale}.png")
        speed = args.num_images / (time.perf_counter() - start)
        add_result(str(guidance_scale), torch.cat(batches), labels, images_per_second=speed)
    path = output_dir / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
