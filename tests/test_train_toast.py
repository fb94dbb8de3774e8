"""The training script of the self-guidance adapter, launched as a user would, and its published numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_toast
from accelerate.state import AcceleratorState
from diffusers import VQModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from fill import state_dict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit import (
    HaltonScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
    ToastAdapter,
)
from maskgit.conversion.maskgit_google import convert_muse_transformer, split_toast
from maskgit.conversion.unlockmgm import convert_toast
from maskgit.options import load_options
from maskgit.tokenization import load_tokenizer, tokenizer_checksum


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "unlockmgm"
SCRIPT = ROOT / "training" / "train_toast.py"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# Published numbers


def load_golden(model_class, converted):
    model = model_class(**converted.config | {"dropout": 0.0} if "dropout" in converted.config else converted.config)
    model.load_state_dict(converted.state_dict)
    return model


@pytest.fixture
def golden():
    """The published model in training, its batch, and what comes of it."""
    manifest = json.loads((GOLDEN / "train_tiny.json").read_text())
    base, adapter = split_toast(state_dict(manifest))
    transformer = load_golden(
        MaskGitBertTransformer2DModel, convert_muse_transformer(base, manifest["config"])
    ).requires_grad_(False)
    toast = load_golden(ToastAdapter, convert_toast(adapter, manifest["config"]))
    numbers = load_file(GOLDEN / "train_tiny.safetensors")
    tokens = numbers["in.input_ids"][:, 1:]
    mask = tokens > 1023
    substituted = torch.stack(
        [train_toast.choose_substitutes(*pair, 0.3) for pair in zip(mask, numbers["in.uniform"], strict=True)]
    )
    batch = (tokens.clamp(max=1023), numbers["in.input_ids"][:, 0] - 1024, mask, substituted, numbers["in.sampled_ids"])
    return train_toast.TrainableToast(toast, transformer, label_smoothing=0.1), batch, numbers


def published_losses(model, batch):
    correction, variational, _ = model(*batch)
    return correction / batch[3].sum(), 0.1 * variational


def test_published_losses_and_gradients(golden):
    model, batch, numbers = golden
    tokens, _, mask, substituted, substitutes = batch
    assert torch.equal(substituted, numbers["out.substitute_mask"].bool())
    assert substituted.sum(-1).tolist() == numbers["out.num_substitute"].tolist()
    seen = tokens.where(~substituted, substitutes).masked_fill(mask, 1034)
    assert torch.equal(seen, numbers["out.substituted_ids"][:, 1:])
    correction, variational = published_losses(model, batch)
    torch.testing.assert_close(correction, numbers["out.correction_loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(variational, numbers["out.variational_loss"][0], rtol=1e-5, atol=0)
    (correction + variational).backward()
    weights = {name: parameter.grad for name, parameter in model.toast.named_parameters()}
    # The key map renames and flattens only, so that it takes gradients as it takes weights.
    stored = {name.removeprefix("out.grad."): tensor for name, tensor in numbers.items() if "out.grad." in name}
    expected = convert_toast(stored, {}).state_dict
    assert expected.keys() == weights.keys()
    for name, gradient in weights.items():
        limit = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=limit, msg=name)
