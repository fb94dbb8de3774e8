# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Google's MaskGIT: published settings and results, and what the model cards of converted checkpoints say."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..schedulers import ConfidenceScheduler, SelfGuidedScheduler
from .cards import Card
from .maskgit_google import CODEBOOK_SIZE, HIDDEN_SIZE, NUM_CLASSES, NUM_HEADS


@dataclass(frozen=True)
class PublishedResult:
    """What somebody measured of the published weights on ImageNet, FID against real images; None where it is not stated."""

    image_size: int
    fid: float
    inception_score: float | None
    num_inference_steps: int | None
    protocol: str


@dataclass(frozen=True)
class Project:
    """What is known of a project that publishes Google's weights."""

    name: str
    url: str
    licence: str
    conversion: str
    citations: tuple[str, ...]
    results: tuple[PublishedResult, ...]
    reconstruction: str = ""
    papers: str = "[paper](https://arxiv.org/abs/2202.04200)"


GOOGLE_CITATION = """\
@inproceedings{chang2022maskgit,
  title     = {MaskGIT: Masked Generative Image Transformer},
  author    = {Chang, Huiwen and Zhang, Han and Jiang, Lu and Liu, Ce and Freeman, William T.},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}
"""
UNLOCKMGM_CITATION = """\
@inproceedings{hur2024unlocking,
  title     = {Unlocking the Capabilities of Masked Generative Models for Image Synthesis via Self-Guidance},
  author    = {Hur, Jiwan and Lee, Dong-Jae and Han, Gyojin and Choi, Jaehyun and Jeon, Yunho and Kim, Junmo},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}
"""
GOOGLE_RESULTS = (
    PublishedResult(256, 6.06, None, None, "google-research/maskgit, README; steps and temperature not stated"),
    PublishedResult(512, 7.32, None, None, "google-research/maskgit, README; steps and temperature not stated"),
)
GOOGLE_RECONSTRUCTION = (
    "FID of reconstructions: 2.28 (256 px), 1.97 (512 px), from the README of google-research/maskgit."
)

PROJECTS = {
    "maskgit-jax": Project(
        name="MaskGIT",
        url="https://github.com/google-research/maskgit",
        licence="google-research/maskgit, which publishes the weights: Apache-2.0.",
        conversion="matrices and convolutions were transposed from Flax's order to PyTorch's; nothing else was changed.",
        citations=(GOOGLE_CITATION,),
        results=(
            *GOOGLE_RESULTS,
            PublishedResult(256, 6.18, 182.1, 8, "the paper; precision 0.80, recall 0.51; temperature not stated"),
            PublishedResult(512, 7.32, 156.0, 12, "the paper; precision 0.78, recall 0.50; temperature not stated"),
        ),
        reconstruction=GOOGLE_RECONSTRUCTION,
    ),
    "maskgit-torch": Project(
        name="maskgit-torch",
        url="https://github.com/hmorimitsu/maskgit-torch",
        licence="hmorimitsu/maskgit-torch, which publishes the weights of google-research/maskgit in this format: both "
        "Apache-2.0.",
        conversion="joint query, key and value matrices were divided; nothing else was changed.",
        citations=(GOOGLE_CITATION,),
        results=tuple(
            PublishedResult(
                image_size,
                fid,
                None,
                16,
                "maskgit-torch, README; choice temperature 4.5, 50 images a class, clean-fid against the validation set",
            )
            for image_size, fid in ((256, 6.10), (512, 7.04))
        ),
        reconstruction="FID of reconstructions: 2.26 (256 px), 1.24 (512 px), from the README of maskgit-torch; 50,000 "
        "validation images, shorter side resized, centre crop, clean-fid.",
    ),
    "unlockmgm": Project(
        name="MaskGIT of UnlockMGM",
        url="https://github.com/JiwanHur/UnlockMGM",
        licence="The weights are those of google-research/maskgit, Apache-2.0; JiwanHur/UnlockMGM has no licence file.",
        conversion="the output matrix, a copy of the token embedding, was left out; nothing else was changed.",
        citations=(GOOGLE_CITATION, UNLOCKMGM_CITATION),
        results=GOOGLE_RESULTS,
        reconstruction=GOOGLE_RECONSTRUCTION,
        papers="[paper](https://arxiv.org/abs/2410.13136); the weights are those of "
        "[MaskGIT](https://github.com/google-research/maskgit), [paper](https://arxiv.org/abs/2202.04200)",
    ),
}


def make_scheduler(transformer: Mapping) -> ConfidenceScheduler:
    """Google's sampler, which maskgit-torch has too."""
    return ConfidenceScheduler(
        mask_token_id=transformer["codebook_size"], masking_schedule="cosine", choice_temperature=4.5
    )


def call_defaults(transformer: Mapping) -> dict:
    """The settings of Google's demo and of maskgit-torch. The paper's numbers are of 8 steps (256 px) and 12 (512 px)."""
    return {"num_inference_steps": 16}


def make_muse_scheduler(transformer: Mapping) -> SelfGuidedScheduler:
    """UnlockMGM's sampler, as its training shows the model without guidance."""
    return SelfGuidedScheduler(
        mask_token_id=transformer["codebook_size"], masking_schedule="cosine", choice_temperature=4.5
    )


def muse_call_defaults(transformer: Mapping) -> dict:
    """The settings with which UnlockMGM's training shows the model without guidance."""
    return {"num_inference_steps": 8}


def _format(project: Project) -> str:
    return f"in the format of [{project.url.rpartition('github.com/')[2]}]({project.url}) ({project.papers})"


def describe_transformer(source: str, config: Mapping) -> Card:
    """The model card's part about a transformer converted from `source`, one of `PROJECTS`."""
    project = PROJECTS[source]
    title, results, training = project.name, "", ""
    sizes = ("codebook_size", "num_classes", "hidden_size", "num_layers", "num_attention_heads", "intermediate_size")
    if [config[name] for name in sizes] == [CODEBOOK_SIZE, NUM_CLASSES, HIDDEN_SIZE, 24, NUM_HEADS, 3072]:
        # 16 x 16 pixels a token
        rows = [result for result in project.results if config["sample_size"] == result.image_size // 16]
        if rows:
            title += f", {rows[0].image_size} px"
            results = (
                "Published for the model of this size, not measured on this conversion: class-conditional ImageNet, without "
                "guidance.\n\n| steps | FID | inception score | where and how |\n|---|---|---|---|\n"
            ) + "\n".join(
                f"| {row.num_inference_steps or '-'} | {row.fid:.2f} | {row.inception_score or '-'} | {row.protocol} |"
                for row in rows
            )
            training = (
                "ImageNet-1k, training split, as tokens of the tokenizer, by Google. The model knows the 1000 classes of "
                "that data only, and shares its biases. It was trained without a label for no class, so that there is no "
                "classifier-free guidance."
            )
    return Card(
        title=title,
        summary=f"A class-conditional masked generative image transformer {_format(project)}, converted for diffusers.",
        conversion=f"Transformer: {project.conversion} On small random checkpoints the converted model's logits agree with "
        "those of the published code to 2e-4 (float32, CPU).",
        licence=project.licence,
        citation="\n".join(project.citations),
        license="apache-2.0",
        results=results,
        training=training,
    )


def describe_tokenizer(source: str, config: Mapping) -> Card:
    """The model card's part about a tokenizer converted from `source`, one of `PROJECTS`."""
    project = PROJECTS[source]
    sizes = ("block_out_channels", "layers_per_block", "latent_channels", "num_vq_embeddings")
    published = [config[name] for name in sizes] == [[128, 128, 256, 256, 512], 2, 256, CODEBOOK_SIZE]
    return Card(
        title=f"{project.name} tokenizer",
        summary=f"The tokenizer between images and codes is {_format(project)}, converted for diffusers.",
        conversion="Tokenizer: its tensors were renamed and, where they come from Flax, transposed; its images are in [-1, 1] "
        "here, in [0, 1] there. On small random checkpoints its codes equal those of the published code, and its images "
        "agree to 2e-4 (float32, CPU).",
        licence=project.licence,
        citation=GOOGLE_CITATION,
        license="apache-2.0",
        results=f"Published for the tokenizer, not measured on this conversion. {project.reconstruction}"
        if published
        else "",
    )
