# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Masked generative image transformers for diffusers."""

from .loading import builtin
from .models import (
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitViTTransformer2DModel,
    MaskGitVQModel,
    PartitionTransformer2DModel,
    ToastAdapter,
)
from .pipelines import MaskGitInpaintPipeline, MaskGitPipeline
from .schedulers import ConfidenceScheduler, HaltonScheduler, SelfGuidedScheduler


__version__ = "0.1.0.dev0"
