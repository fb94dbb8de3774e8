# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_maskgit_utils import (
    MaskGitSchedulerMixin,
    MaskGitSchedulerOutput,
    gumbel_noise,
    most_confident,
)


# What drawn tokens have in place of a confidence. It is finite: noise at a high temperature may rank them below others.
DRAWN_CONFIDENCE = math.log(torch.finfo(torch.float32).max)


class SelfGuidedScheduler(MaskGitSchedulerMixin, SchedulerMixin, ConfigMixin):
    """
    Keeps the tokens that the transformer is most sure of, with strong noise at first that fades fast, and masks a few drawn
    tokens again. It is made for self-guided logits, whose errors are smaller, but knows nothing of guidance: the pipeline
    applies it (`self_guidance_scale`).

    Source: Hur et al., "Unlocking the Capabilities of Masked Generative Models for Image Synthesis via Self-Guidance"
    (NeurIPS 2024, arXiv 2410.13136).

    Args:
        mask_token_id (`int`): Id of a masked token.
        masking_schedule (`str`, defaults to `"cosine"`): Share of the tokens that is left masked after each step: arccos,
            cosine, linear, square, cubic, root, log, exp, or powX with a positive number X.
        softmax_temperature (`tuple[float, float]`, defaults to `(1.0, 1.0)`): What the logits are divided by in the first
            and the last step, evenly in its inverse between.
        top_k (`int`, *optional*): Draw from the `top_k` most likely tokens only; 1 is greedy.
        top_p (`float`, *optional*): Draw from the most likely tokens that together reach this probability only.
        choice_temperature (`float`, defaults to 25.0): Scale of the Gumbel noise on the confidences (the logarithms of the
            drawn tokens' probabilities) before annealing: at step i of T it is multiplied by all of 1 - (j + 1) / T, j = 0
            to i. So 25 here, published for 256 px, is less noise than 25 in `ConfidenceScheduler`; 45 is for 512 px.
    """

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str = "cosine",
        softmax_temperature: tuple[float, float] = (1.0, 1.0),
        top_k: int | None = None,
        top_p: float | None = None,
        choice_temperature: float = 25.0,
    ):
        self._check_config()
        self.timesteps = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | tuple[float, float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """
        Set the steps of the next images.

        Args:
            num_inference_steps (`int`): Number of steps, at least 1.
            temperature (`float` or `tuple[float, float]`, *optional*): Replaces the config's `choice_temperature`; a pair
                is the scale in the first and the last step, linear between, as in diffusers' `AmusedScheduler`.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.
        """
        self._set_timesteps(num_inference_steps, device)
        self._set_choice_temperatures(temperature, annealing="compound")

    def positions_to_predict(
        self,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> None:
        """None: which positions are decided depends on the logits, which are needed wherever `sample` is masked."""
        return None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        positions: torch.LongTensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        starting_mask_ratio: float | torch.Tensor = 1.0,
    ) -> MaskGitSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """
        Draw tokens at the masked positions, and mask those of the lowest confidence again, among them drawn ones of earlier
        steps. Tokens that were known when sampling began never change.

        Args:
            model_output (`torch.Tensor`): Logits of every position, `(batch_size, N, K)`, `(batch_size, K, height, width)`
                or `(batch_size, height, width, K)` (read in this order), or of `positions` only, `(batch_size, M, K)`.
            timestep (`int` or 0-d `torch.Tensor`): One of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`): The tokens that the
                logits were computed from; left as they are.
            positions (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): The positions whose logits `model_output`
                holds: every masked one, and any known ones.
            generator (`torch.Generator` or a list of them, one an image, *optional*): Source of the random numbers.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitSchedulerOutput`, else a tuple.
            starting_mask_ratio (`float` or `torch.Tensor`): Passed by diffusers' inpainting pipelines. The masked tokens
                are counted instead.
        """
        step_index = self._step_index(timestep)
        masked, pred_original_sample, confidence = self._draw(model_output, step_index, sample, positions, generator)
        total, _, num_masked, _ = self._schedule(step_index, masked)
        _, masked_at_start, _ = self._start

        prev_sample = pred_original_sample
        if step_index < self.num_inference_steps - 1:
            confidence = confidence.masked_fill(~masked, DRAWN_CONFIDENCE)
            noise = gumbel_noise(*masked.shape, generator, masked.device)
            confidence = confidence + self.choice_temperatures[step_index] * noise
            confidence = confidence.masked_fill(~masked_at_start, torch.inf)
            left = (total * self._masking_ratio(step_index, total)).floor().long()
            left = torch.minimum(left, num_masked - 1).clamp(min=1)  # some stay masked, and some are kept
            num_kept = (masked.shape[1] - left)[:, None].to(masked.device)
            kept = most_confident(confidence, num_kept) | ~masked_at_start
            prev_sample = prev_sample.masked_fill(~kept, self.config.mask_token_id)

        prev_sample = prev_sample.view_as(sample)
        pred_original_sample = pred_original_sample.view_as(sample)
        if not return_dict:
            return (prev_sample, pred_original_sample)
        return MaskGitSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
