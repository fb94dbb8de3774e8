# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""The training objective of masked token modelling: which tokens are hidden, and the loss on predicting them."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel

from .models import PartitionTransformer2DModel
from .schedulers.scheduling_maskgit_utils import check_masking_schedule, masking_ratio


class MaskedDataset(torch.utils.data.Dataset):
    """
    Adds to each item of a dataset what training hides of it: `mask`, bool (num_tokens,), true where a token is masked, and
    `drop_label`, bool, true where the class is replaced by "no class" (for classifier-free guidance).

    An image's masking ratio is the schedule's at a uniform random number, and each of its tokens is masked independently with
    that probability. All draws depend on the seed, the epoch (`set_epoch`) and the image alone: a resumed run, and a run with
    other processes or accumulation, masks the same tokens.

    Args:
        dataset (`torch.utils.data.Dataset`): Map-style, of dicts.
        num_tokens (`int`): Tokens an image.
        masking_schedule (`str`): One of arccos, cosine, linear, square, cubic, root, log, exp and powX.
        label_drop (`float`): Probability of dropping a class.
        seed (`int`): Of the draws.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        num_tokens: int,
        masking_schedule: str,
        label_drop: float,
        seed: int,
    ):
        check_masking_schedule(masking_schedule)
        self.dataset = dataset
        self.num_tokens = num_tokens
        self.masking_schedule = masking_schedule
        self.label_drop = label_drop
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        # The leading 1 keeps these numbers apart from those that the dataset draws for crops and flips.
        draws = torch.from_numpy(np.random.default_rng((1, self.seed, self.epoch, index)).random(self.num_tokens + 2))
        ratio = masking_ratio(draws[0], self.masking_schedule, self.num_tokens)
        return self.dataset[index] | {"mask": draws[2:] < ratio, "drop_label": draws[1] < self.label_drop}


def masked_token_loss(
    transformer: torch.nn.Module,
    tokens: torch.LongTensor,
    class_labels: torch.LongTensor,
    mask: torch.BoolTensor,
    drop_label: torch.BoolTensor,
    codebook_size: int,
    num_classes: int,
    loss_on: str,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cross-entropy of the original tokens, predicted from those that are left when some are masked. A partition transformer is
    given all tokens: those that others would mask are one group, the rest is the other, and each is predicted from the other.

    Args:
        transformer (`torch.nn.Module`): A MaskGIT transformer, wrapped or not.
        tokens (`torch.LongTensor` of shape `(B, N)` or `(B, H, W)`): Codes in `[0, codebook_size)`.
        class_labels (`torch.LongTensor` of shape `(B,)`): Classes in `[0, num_classes)`.
        mask (`torch.BoolTensor` of shape `(B, N)`): True where a token is hidden, or in group 1 of a partition.
        drop_label (`torch.BoolTensor` of shape `(B,)`): True where the class is hidden.
        codebook_size (`int`): Number of codes, and the mask token's id.
        num_classes (`int`): Number of classes, and the label of "no class".
        loss_on (`str`): "all" for the loss of all positions, as Halton-MaskGIT, MaskGIT-pytorch and partition transformers
            train, or "masked".
        label_smoothing (`float`): Share of the target probability that is spread over the whole vocabulary.

    Returns:
        The summed loss, the number of positions it is summed over, and the number of masked tokens that the most likely
        code gets right: 0-d tensors.
    """
    tokens = tokens.flatten(1)
    class_labels = class_labels.masked_fill(drop_label, num_classes)
    if isinstance(extract_model_from_parallel(transformer, keep_torch_compile=False), PartitionTransformer2DModel):
        inputs = {"input_ids": tokens, "group_ids": mask}
    else:
        inputs = {"input_ids": tokens.masked_fill(mask, codebook_size)}
    logits = transformer(class_labels=class_labels, full_vocabulary=True, return_dict=False, **inputs)[0].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=label_smoothing, reduction="none")
    counted = mask.flatten() if loss_on == "masked" else torch.ones_like(mask).flatten()
    num_correct = ((logits.argmax(-1) == tokens) & mask).sum()
    return (losses * counted).sum(), counted.sum(), num_correct
