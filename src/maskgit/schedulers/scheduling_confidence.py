# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
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


ANNEALINGS = ("linear", "compound", "none")
SELECTIONS = ("confidence", "random", "warm_up")
PROGRESSES = ("completed", "elapsed")


class ConfidenceScheduler(MaskGitSchedulerMixin, SchedulerMixin, ConfigMixin):
    """
    Draws a token at every masked position and keeps those that the transformer is most sure of, with some noise.

    Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022, arXiv 2202.04200).

    Args:
        mask_token_id (`int`): Id of a masked token.
        masking_schedule (`str`, defaults to `"cosine"`): Share of the tokens that is left masked after each step: arccos,
            cosine, linear, square, cubic, root, log or exp.
        softmax_temperature (`tuple[float, float]`, defaults to `(1.0, 1.0)`): What the logits are divided by in the first
            and the last step, evenly in its inverse between.
        top_k (`int`, *optional*): Draw from the `top_k` most likely tokens only; 1 is greedy.
        top_p (`float`, *optional*): Draw from the most likely tokens that together reach this probability only.
        choice_temperature (`float`, defaults to 4.5): Scale of the Gumbel noise on the confidences (the logarithms of the
            drawn tokens' probabilities) before annealing.
        choice_temperature_annealing (`str`, defaults to `"linear"`): How that scale falls with the progress r: "linear" is
            times 1 - r, "compound" is times the product of 1 - r over all steps so far, "none" is constant.
        selection (`str`, defaults to `"confidence"`): Which drawn tokens are kept: the most confident ones, "random" ones,
            or, with "warm_up", random ones in the first two steps.
        progress (`str`, defaults to `"completed"`): What r is at step i of T. "completed" is (i + 1) / T, as in MaskGIT;
            "elapsed" is i / (T - 1), as in Halton-MaskGIT's confidence sampler, which keeps very few tokens at first.
    """

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str = "cosine",
        softmax_temperature: tuple[float, float] = (1.0, 1.0),
        top_k: int | None = None,
        top_p: float | None = None,
        choice_temperature: float = 4.5,
        choice_temperature_annealing: str = "linear",
        selection: str = "confidence",
        progress: str = "completed",
    ):
        self._check_config()
        for name, value, allowed in (
            ("choice_temperature_annealing", choice_temperature_annealing, ANNEALINGS),
            ("selection", selection, SELECTIONS),
            ("progress", progress, PROGRESSES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(allowed)}.")
        if choice_temperature < 0:
            raise ValueError(f"`choice_temperature` is {choice_temperature}, but must not be negative.")
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
        if isinstance(temperature, (tuple, list)):
            self.choice_temperatures = torch.linspace(*temperature, num_inference_steps).tolist()
            return
        start = self.config.choice_temperature if temperature is None else temperature
        left = 1 - torch.tensor([self._progress(step) for step in range(num_inference_steps)], dtype=torch.float64)
        if self.config.choice_temperature_annealing == "compound":
            left = left.cumprod(0)
        elif self.config.choice_temperature_annealing == "none":
            left = torch.ones_like(left)
        self.choice_temperatures = (start * left).tolist()

    def _progress(self, step_index: int) -> float:
        if self.config.progress == "completed":
            return super()._progress(step_index)
        return step_index / max(self.num_inference_steps - 1, 1)

    def positions_to_predict(
        self,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> None:
        """None: which positions are decided depends on the logits, which are needed wherever `sample` is masked."""
        return None

    def _num_kept(self, step_index: int, masked: torch.Tensor) -> torch.Tensor:
        """Number of drawn tokens that each image keeps in this step, long (B, 1)."""
        at_start, num_masked, ratio, num_steps = self._schedule(step_index, masked)
        if step_index == self.num_inference_steps - 1:
            left = torch.zeros_like(num_masked)
        elif self.config.progress == "completed":
            left = (at_start * ratio).floor().long()
            left = torch.minimum(left, num_masked - 1).clamp(min=1)  # some stay masked, and some are kept
        else:
            left = at_start - (at_start * (1 - ratio)).floor().long().clamp(min=num_steps)
        return (num_masked - left).clamp(min=0)[:, None].to(masked.device)

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
        Draw tokens at the masked positions and keep some. Known tokens never change.

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
        logits, tokens = self._flatten(model_output, sample, positions)
        step_index = self._step_index(timestep)
        masked = tokens == self.config.mask_token_id
        uniform = uniform_noise(*tokens.shape, generator, tokens.device)
        if positions is None:
            # Masked positions first; only as many as some image needs are drawn.
            positions = masked.int().argsort(dim=-1, descending=True, stable=True)[:, : int(masked.sum(-1).max())]
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))

        logits = shape_logits(logits, self.softmax_temperatures[step_index], self.config.mask_token_id)
        drawn = draw_tokens(logits, uniform.gather(1, positions), self.config.top_k, self.config.top_p)
        drawn = torch.where(masked.gather(1, positions), drawn, tokens.gather(1, positions))
        pred_original_sample = tokens.scatter(1, positions, drawn)

        if self.config.selection == "random" or (self.config.selection == "warm_up" and step_index < 2):
            confidence = uniform_noise(*tokens.shape, generator, tokens.device)
        else:
            # Probabilities before top_k and top_p: after them, greedy choices would all have probability 1.
            log_probability = logits.gather(-1, drawn[..., None])[..., 0] - logits.logsumexp(-1)
            confidence = torch.zeros(tokens.shape, device=tokens.device).scatter(1, positions, log_probability)
            if self.choice_temperatures[step_index] > 0:
                noise = uniform_noise(*tokens.shape, generator, tokens.device).clamp(min=1e-20)
                gumbel = -torch.log((-torch.log(noise)).clamp(min=1e-20))
                confidence = confidence + self.choice_temperatures[step_index] * gumbel
        confidence = confidence.masked_fill(~masked, -torch.inf)
        ranks = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept = (ranks < self._num_kept(step_index, masked)) & masked

        prev_sample = torch.where(kept, pred_original_sample, tokens).view_as(sample)
        pred_original_sample = pred_original_sample.view_as(sample)
        if not return_dict:
            return (prev_sample, pred_original_sample)
        return MaskGitSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
