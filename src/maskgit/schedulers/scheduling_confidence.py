# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_maskgit_utils import (
    ANNEALINGS,
    MaskGitSchedulerMixin,
    MaskGitSchedulerOutput,
    gumbel_noise,
    masking_ratio,
    most_confident,
    uniform_noise,
)


SELECTIONS = ("confidence", "random", "warm_up")
PROGRESSES = ("completed", "elapsed", "elapsed_plus_one", "elapsed_increments")


class ConfidenceScheduler(MaskGitSchedulerMixin, SchedulerMixin, ConfigMixin):
    """
    Draws a token at every masked position and keeps those that the transformer is most sure of, with some noise.

    Source: Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022, arXiv 2202.04200).

    Args:
        mask_token_id (`int`): Id of a masked token.
        masking_schedule (`str`, defaults to `"cosine"`): Share of the tokens that is left masked after each step: arccos,
            cosine, linear, square, cubic, root, log, exp, or powX with a positive number X.
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
        progress (`str`, defaults to `"completed"`): What r is at step i of T, and how many tokens the schedule decides there.
            "completed": r is (i + 1) / T, as in MaskGIT. The others, with r = i / (T - 1), decide a single token first:
            "elapsed" as Halton-MaskGIT's confidence sampler; "elapsed_plus_one", where this token comes on top of the
            schedule's, as Partition Generative Modeling; "elapsed_increments", where the schedule, read from its end, is not
            what is left but what each step decides in proportion to the others, as MaskGIT-pytorch v1.
        schedule_all_tokens (`bool`, defaults to `False`): Whether each step decides as many tokens as it would if all were
            masked at the start, as in MaskGIT-pytorch v1. Partly known images are then complete before the last step. By
            default, all the steps share the masked tokens.
        mask_logit_counts (`bool`, defaults to `False`): Whether a confidence is the token's probability among the codes and
            the mask token, as in MaskGIT-pytorch v1, and not among the codes alone. The mask token is drawn in neither case.
            Only for transformers whose `full_vocabulary` logits go on with the mask token's: the pipeline asks for them.
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
        schedule_all_tokens: bool = False,
        mask_logit_counts: bool = False,
    ):
        self._check_config()
        for name, value, allowed in (
            ("choice_temperature_annealing", choice_temperature_annealing, ANNEALINGS),
            ("selection", selection, SELECTIONS),
            ("progress", progress, PROGRESSES),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(allowed)}.")
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
        self._set_choice_temperatures(temperature, self.config.choice_temperature_annealing)

    def _progress(self, step_index: int) -> float:
        if self.config.progress == "completed":
            return super()._progress(step_index)
        return step_index / max(self.num_inference_steps - 1, 1)

    def _increments(self, num_tokens: int | torch.LongTensor) -> torch.Tensor:
        """Share of the tokens that each step decides, float32 (T,) or (B, T), by "elapsed_increments"."""
        if self.num_inference_steps == 1:
            return torch.ones(1)
        progress = torch.linspace(1, 0, self.num_inference_steps)
        shares = masking_ratio(progress, self.config.masking_schedule, torch.as_tensor(num_tokens)[..., None])
        return shares / shares.sum(-1, keepdim=True)

    def _masking_ratio(self, step_index: int, num_tokens: int | torch.LongTensor) -> torch.Tensor:
        if self.config.progress == "elapsed_increments":
            return (1 - self._increments(num_tokens).cumsum(-1)[..., step_index]).clamp(0.0, 1.0)
        return super()._masking_ratio(step_index, num_tokens)

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
        total, num_decided, num_masked, num_steps = self._schedule(
            step_index, masked, all_tokens=self.config.schedule_all_tokens
        )
        if step_index == self.num_inference_steps - 1:
            counts = num_masked
        elif self.config.progress == "elapsed_increments":
            # Rounded step by step, and at least one token each; the last step takes what that leaves.
            counts = (total[:, None] * self._increments(total)).round().long().clamp(min=1)
            counts = counts[:, : step_index + 1].sum(-1) - num_decided
        elif self.config.progress == "completed":
            counts = total - (total * self._masking_ratio(step_index, total)).floor().long() - num_decided
            counts = torch.minimum(counts.clamp(min=1), num_masked - 1)  # some are kept, and some stay masked
        else:
            counts = (total * (1 - self._masking_ratio(step_index, total))).floor().long()
            counts = counts + 1 if self.config.progress == "elapsed_plus_one" else counts.clamp(min=num_steps)
            counts = counts - num_decided
        return torch.minimum(counts, num_masked).clamp(min=0)[:, None].to(masked.device)

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
        step_index = self._step_index(timestep)
        masked, pred_original_sample, confidence = self._draw(model_output, step_index, sample, positions, generator)
        if self.config.selection == "random" or (self.config.selection == "warm_up" and step_index < 2):
            confidence = uniform_noise(*masked.shape, generator, masked.device)
        elif self.choice_temperatures[step_index] > 0:
            noise = gumbel_noise(*masked.shape, generator, masked.device)
            confidence = confidence + self.choice_temperatures[step_index] * noise
        confidence = confidence.masked_fill(~masked, -torch.inf)
        kept = most_confident(confidence, self._num_kept(step_index, masked)) & masked

        pred_original_sample = pred_original_sample.view_as(sample)
        prev_sample = torch.where(kept.view_as(sample), pred_original_sample, sample)
        if not return_dict:
            return (prev_sample, pred_original_sample)
        return MaskGitSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
