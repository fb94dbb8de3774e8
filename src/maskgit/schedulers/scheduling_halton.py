# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_maskgit_utils import (
    MaskGitSchedulerMixin,
    MaskGitSchedulerOutput,
    draw_tokens,
    shape_logits,
    uniform_noise,
)


def _radical_inverse(indices: np.ndarray, base: int) -> np.ndarray:
    """Van der Corput sequence: the digits of `indices` in `base`, mirrored at the point. In [0, 1)."""
    indices, result, scale = indices.copy(), np.zeros(len(indices)), 1.0 / base
    while indices.any():
        result += scale * (indices % base)
        indices //= base
        scale /= base
    return result


def halton_order(height: int, width: int) -> torch.LongTensor:
    """
    The order in which the Halton scheduler decides the cells of a grid: flat row-major positions, long (height * width,).

    The points of the two-dimensional Halton sequence (base 2 for rows, base 3 for columns), scaled to the grid, each cell
    at its first visit.
    """
    num_points = 4 * height * width
    while True:
        indices = np.arange(1, num_points + 1)
        rows = (_radical_inverse(indices, 2) * height).astype(np.int64)
        columns = (_radical_inverse(indices, 3) * width).astype(np.int64)
        cells, first_visits = np.unique(rows * width + columns, return_index=True)
        if len(cells) == height * width:
            return torch.from_numpy(cells[np.argsort(first_visits)])
        num_points *= 2


class HaltonScheduler(MaskGitSchedulerMixin, SchedulerMixin, ConfigMixin):
    """
    Decides tokens in the order of a Halton sequence, which spreads each step's tokens over the whole image, whatever the
    transformer's confidence.

    Source: Besnier et al., "Halton Scheduler for Masked Generative Image Transformer" (ICLR 2025, arXiv 2503.17076).

    Args:
        mask_token_id (`int`): Id of a masked token.
        masking_schedule (`str`, defaults to `"arccos"`): Share of the tokens that is left masked after each step: arccos,
            cosine, linear, square, cubic, root, log, exp, or powX with a positive number X.
        softmax_temperature (`tuple[float, float]`, defaults to `(1.0, 1.0)`): What the logits are divided by in the first
            and the last step, evenly in its inverse between.
        temperature_warmup_steps (`int`, defaults to 0): Number of first steps that draw at twice the temperature.
        top_k (`int`, *optional*): Draw from the `top_k` most likely tokens only; 1 is greedy.
        top_p (`float`, *optional*): Draw from the most likely tokens that together reach this probability only.
        randomize (`bool`, defaults to `False`): Whether each image starts at its own random point of the order.
    """

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str = "arccos",
        softmax_temperature: tuple[float, float] = (1.0, 1.0),
        temperature_warmup_steps: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        randomize: bool = False,
    ):
        self._check_config()
        self.timesteps = None
        self._ranks = None
        self._offsets = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | tuple[float, float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """
        Set the steps of the next images.

        Args:
            num_inference_steps (`int`): Number of steps, at least 1. Steps beyond the number of tokens decide nothing.
            temperature (`float` or `tuple[float, float]`, *optional*): The noise on confidences in the schedulers that
                rank tokens by confidence; this one ranks them by the Halton sequence. It stands here because diffusers'
                pipelines pass it to every scheduler.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`.
        """
        self._set_timesteps(num_inference_steps, device)
        self._offsets = None
        for step in range(min(self.config.temperature_warmup_steps, num_inference_steps)):
            self.softmax_temperatures[step] *= 2

    def _grid(self, sample: torch.Tensor) -> tuple[int, int]:
        if sample.ndim == 3:
            return sample.shape[1], sample.shape[2]
        side = round(sample.shape[1] ** 0.5)
        if side * side != sample.shape[1]:
            raise ValueError(
                f"`sample` has {sample.shape[1]} tokens an image, which is no square grid: pass it as (B, H, W)."
            )
        return side, side

    def _ranks_of(self, sample: torch.Tensor, generator) -> torch.Tensor:
        """Place of each position in its image's order: long (1 or B, N)."""
        key = (self._grid(sample), sample.device)
        if self._ranks is None or self._ranks[0] != key:
            self._ranks = (key, halton_order(*key[0]).argsort()[None].to(sample.device))
        ranks = self._ranks[1]
        if self.config.randomize:
            if self._offsets is None or len(self._offsets) != len(sample):
                noise = uniform_noise(len(sample), 1, generator, sample.device)
                self._offsets = (noise * ranks.shape[1]).long()
            ranks = (ranks - self._offsets) % ranks.shape[1]
        return ranks

    def positions_to_predict(
        self,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        The positions that the step at `timestep` will decide: only there are logits needed.

        Args:
            timestep (`int` or 0-d `torch.Tensor`): One of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`): The tokens.
            generator (`torch.Generator` or a list of them, one an image, *optional*): For the random starting points of
                `randomize`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, M)`: flat row-major positions, in the order of the sequence. When
            images have different numbers of known tokens, the shorter rows end in known positions, which `step` leaves
            alone. M is 0 when this step decides nothing: the transformer need not run then.
        """
        step_index = self._step_index(timestep)
        masked = sample.flatten(1) == self.config.mask_token_id
        num_tokens = masked.shape[1]
        ranks = self._ranks_of(sample, generator)
        total, num_decided, num_masked, num_steps = self._schedule(step_index, masked)
        counts = (total * (1 - self._masking_ratio(step_index, total))).floor().long().clamp(
            min=num_steps
        ) - num_decided
        if step_index == self.num_inference_steps - 1:
            counts = num_masked
        counts = torch.minimum(counts, num_masked).clamp(min=0)

        # Masked positions first, in the order of the sequence; behind them known ones, as padding.
        order = torch.where(masked, ranks, ranks + num_tokens).argsort(dim=-1)
        width = int(counts.max())
        positions = order[:, :width]
        if (counts < width).any():
            # Masked positions beyond an image's own count must wait for a later step: put a known one in their place.
            padding = torch.arange(width)[None] >= counts[:, None]
            positions = torch.where(padding.to(positions.device), order[:, -1:], positions)
        return positions

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
        Draw the tokens of this step's positions. Known tokens never change.

        Args:
            model_output (`torch.Tensor`): Logits of every position, `(batch_size, N, K)`, `(batch_size, K, height, width)`
                or `(batch_size, height, width, K)` (read in this order), or of `positions` only, `(batch_size, M, K)`.
            timestep (`int` or 0-d `torch.Tensor`): One of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`): The tokens that the
                logits were computed from; left as they are.
            positions (`torch.LongTensor` of shape `(batch_size, M)`, *optional*): The result of `positions_to_predict`,
                when `model_output` holds the logits of these positions only.
            generator (`torch.Generator` or a list of them, one an image, *optional*): Source of the random numbers.
            return_dict (`bool`, defaults to `True`): Whether to return a `MaskGitSchedulerOutput`, else a tuple.
            starting_mask_ratio (`float` or `torch.Tensor`): Passed by diffusers' inpainting pipelines. The masked tokens
                are counted instead.
        """
        logits, tokens = self._flatten(model_output, sample, positions)
        step_index = self._step_index(timestep)
        masked = tokens == self.config.mask_token_id
        predicted = tokens
        if positions is None:
            positions = self.positions_to_predict(timestep, sample, generator)
            likely = shape_logits(logits, 1.0, self.config.mask_token_id).argmax(-1)
            predicted = torch.where(masked, likely, tokens)
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))

        logits = shape_logits(logits, self.softmax_temperatures[step_index], self.config.mask_token_id)
        uniform = uniform_noise(*tokens.shape, generator, tokens.device).gather(1, positions)
        drawn = draw_tokens(logits, uniform, self.config.top_k, self.config.top_p)
        drawn = torch.where(masked.gather(1, positions), drawn, tokens.gather(1, positions))

        prev_sample = tokens.scatter(1, positions, drawn).view_as(sample)
        pred_original_sample = predicted.scatter(1, positions, drawn).view_as(sample)
        if step_index == self.num_inference_steps - 1:
            self._offsets = None  # the next image starts elsewhere
        if not return_dict:
            return (prev_sample, pred_original_sample)
        return MaskGitSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
