# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""What the schedulers of masked generative transformers share: masking schedules, logit shaping, and random numbers."""

import inspect
import math
import re
import sys
from dataclasses import dataclass

import torch
from diffusers import AmusedScheduler
from diffusers.utils import BaseOutput


MASKING_SCHEDULES = ("arccos", "cosine", "linear", "square", "cubic", "root", "log", "exp")
POWERS = {"root": 0.5, "linear": 1.0, "square": 2.0, "cubic": 3.0}
ANNEALINGS = ("linear", "compound", "none")


def check_masking_schedule(masking_schedule: str) -> None:
    """Raise a ValueError for a name that `masking_ratio` does not know."""
    power = re.fullmatch(r"pow(\d+\.?\d*|\.\d+)", masking_schedule)
    if masking_schedule not in MASKING_SCHEDULES and not (power and float(power[1]) > 0):
        raise ValueError(
            f"`masking_schedule` is {masking_schedule!r}, but must be one of {', '.join(MASKING_SCHEDULES)}, or powX with a "
            "positive number X."
        )


def masking_ratio(progress: torch.Tensor, masking_schedule: str, num_tokens: int | torch.LongTensor) -> torch.Tensor:
    """
    Share of the tokens that is masked after a share `progress` of the way from noise to image: 1 at 0, 0 at 1.

    Samplers evaluate it at their steps; training evaluates it at uniform random numbers, once an image.

    Args:
        progress (`torch.Tensor`): Floats in [0, 1], of any shape.
        masking_schedule (`str`): One of `MASKING_SCHEDULES`, or "powX" for 1 - progress^X with any positive number X, such
            as "pow2.5"; root, linear, square and cubic are those with 0.5, 1, 2 and 3. Cosine, log, exp and the powers are
            those of MaskGIT (Chang et al., CVPR 2022), arccos that of its PyTorch reproduction (Besnier and Chen, 2023).
        num_tokens (`int` or `torch.LongTensor`): Number of tokens to decide, which the steepness of "log" and "exp" depends
            on; a tensor must broadcast with `progress`.
    """
    if masking_schedule == "arccos":
        ratio = torch.arccos(progress) / (math.pi / 2)
    elif masking_schedule == "cosine":
        ratio = torch.cos(progress * (math.pi / 2))
    elif masking_schedule in ("log", "exp"):
        bits = torch.as_tensor(num_tokens, device=progress.device).clamp(min=2).to(progress.dtype).log2()
        if masking_schedule == "log":
            ratio = -torch.log2(progress) / bits
        else:
            ratio = 1 - torch.exp2(-bits * (1 - progress))
    else:
        check_masking_schedule(masking_schedule)
        power = POWERS.get(masking_schedule)
        ratio = 1 - progress ** (float(masking_schedule.removeprefix("pow")) if power is None else power)
    return ratio.clamp(0.0, 1.0)


def uniform_noise(
    batch_size: int,
    num_tokens: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """
    Uniform random numbers in [0, 1), one a token of the grid, float32 (batch_size, num_tokens) on `device`.

    One number for each token of the whole grid, whether it is needed or not: what an image draws then depends on its own
    generator (when `generator` is a list) and on the position alone, not on the rest of the batch nor on what is masked.
    """
    if isinstance(generator, list):
        if len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but the batch has {batch_size} images.")
        return torch.stack([torch.rand(num_tokens, generator=g, device=g.device) for g in generator]).to(device)
    noise_device = device if generator is None else generator.device
    return torch.rand(batch_size, num_tokens, generator=generator, device=noise_device).to(device)


def gumbel_noise(
    batch_size: int,
    num_tokens: int,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Standard Gumbel random numbers, of as many uniform ones, float32 (batch_size, num_tokens) on `device`."""
    uniform = uniform_noise(batch_size, num_tokens, generator, device)
    return -torch.log((-torch.log(uniform.clamp(min=1e-20))).clamp(min=1e-20))


def most_confident(confidence: torch.Tensor, num_kept: torch.LongTensor) -> torch.BoolTensor:
    """
    True at the `num_kept` (B, 1) highest of `confidence` (B, N) of each image.

    As in the published samplers, those that are equal to the lowest of these are kept too: there is no reason to prefer one.
    """
    descending = confidence.sort(dim=-1, descending=True).values
    lowest_kept = descending.gather(-1, (num_kept - 1).clamp(min=0))
    return (confidence >= lowest_kept) & (num_kept > 0)


def shape_logits(logits: torch.Tensor, softmax_temperature: float, mask_token_id: int) -> torch.Tensor:
    """Logits in float32, divided by `softmax_temperature`, the mask token's at -inf: it must never be drawn."""
    logits = logits.float()
    if logits.shape[-1] > mask_token_id:
        excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits if softmax_temperature == 1.0 else logits / softmax_temperature


def _check_finite(values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(
            "The transformer's logits are not finite. In float16 they may overflow: use bfloat16 or float32."
        )


def draw_tokens(logits: torch.Tensor, uniform: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """
    Draw tokens from softmax(logits), by inverting the cumulative distribution at `uniform`.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`): float32.
        uniform (`torch.Tensor` of shape `(...)`): Random numbers in [0, 1).
        top_k (`int`, *optional*): Draw from the `top_k` most likely tokens only.
        top_p (`float`, *optional*): Of these, draw from the most likely ones that together reach this probability only.

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    if top_k == 1:
        highest, tokens = logits.max(-1)
        _check_finite(highest)
        return tokens
    indices = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, indices = logits.topk(top_k, dim=-1)  # in descending order
    elif top_p is not None:
        logits, indices = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if top_p is not None:
        kept = cumulative - probabilities < top_p
        cumulative = probabilities.where(kept, 0.0).cumsum(-1)
    total = cumulative[..., -1:].contiguous()
    _check_finite(total)
    tokens = torch.searchsorted(cumulative, uniform[..., None] * total, right=True)
    # Rounding may put the threshold on the total: the answer is then the last token of positive probability.
    tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))
    return (tokens if indices is None else indices.gather(-1, tokens))[..., 0]


@dataclass
class MaskGitSchedulerOutput(BaseOutput):
    """
    Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.LongTensor` of the shape of `sample`): Tokens after the step: the next input of the transformer.
        pred_original_sample (`torch.LongTensor` of the shape of `sample`): The whole image as far as this step's logits
            tell: the known tokens, the drawn ones, and elsewhere the most likely ones (where `positions` left out
            positions, these stay masked).
    """

    prev_sample: torch.LongTensor
    pred_original_sample: torch.LongTensor


class MaskGitSchedulerMixin:
    """Time steps, shapes and checks that are the same for every scheduler of masked tokens."""

    order = 1

    @classmethod
    def _get_compatibles(cls):
        # diffusers looks names up on its own module only.
        package = sys.modules.get(cls.__module__.rpartition(".")[0])
        ours = (
            getattr(package, name, None) for name in ("HaltonScheduler", "ConfidenceScheduler", "SelfGuidedScheduler")
        )
        return list({cls, AmusedScheduler, *(scheduler for scheduler in ours if scheduler is not None)})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        config_dict = dict(config_dict)
        if "_use_default_values" in config_dict:
            # diffusers takes what was given by position for a default; the mask token has none.
            config_dict["_use_default_values"] = [
                name for name in config_dict["_use_default_values"] if name != "mask_token_id"
            ]
        # A saved config spells out every value. What another scheduler has by default is no choice of the user's: where this
        # one's default differs, it takes its place, as it does in a config that was never saved; or what this scheduler had
        # before the user switched to the other.
        own = inspect.signature(cls).parameters
        before = dict(config_dict.get("_switched_from", {}))
        for other in cls._get_compatibles():
            if other is not cls and other.__name__ == config_dict.get("_class_name"):
                for name, parameter in inspect.signature(other).parameters.items():
                    if name in config_dict and name in own and own[name].default != parameter.default:
                        value = before[f"{other.__name__}.{name}"] = config_dict[name]
                        if value == parameter.default:
                            del config_dict[name]
                            if f"{cls.__name__}.{name}" in before:
                                config_dict[name] = before[f"{cls.__name__}.{name}"]
                config_dict["_switched_from"] = before
        return super().extract_init_dict(config_dict, **kwargs)

    def _check_config(self):
        config = self.config
        check_masking_schedule(config.masking_schedule)
        is_pair = isinstance(config.softmax_temperature, (tuple, list)) and len(config.softmax_temperature) == 2
        if not is_pair or min(config.softmax_temperature) <= 0:
            raise ValueError(
                f"`softmax_temperature` is {config.softmax_temperature}, but must be two positive numbers, for the first "
                "and the last step. For greedy choices use top_k=1."
            )
        if config.top_k is not None and config.top_k < 1:
            raise ValueError(f"`top_k` is {config.top_k}, but must be at least 1, or None for no limit.")
        if config.top_p is not None and not 0 < config.top_p <= 1:
            raise ValueError(f"`top_p` is {config.top_p}, but must be in (0, 1], or None for no limit.")
        if config.get("choice_temperature", 0) < 0:
            raise ValueError(f"`choice_temperature` is {config.choice_temperature}, but must not be negative.")

    def _set_timesteps(self, num_inference_steps: int, device: str | torch.device | None):
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        # Even steps in 1 / temperature, the factor on the logits, as the published samplers take them.
        start, end = (1.0 / temperature for temperature in self.config.softmax_temperature)
        factors = torch.linspace(start, end, num_inference_steps, dtype=torch.float64)
        self.softmax_temperatures = (1.0 / factors).tolist()
        self._start = None
        self._noised_step = None

    def _set_choice_temperatures(self, temperature: float | tuple[float, float] | None, annealing: str):
        """Scale of the noise on confidences at each step: the config's, or `temperature`, annealed; or a pair's line."""
        if isinstance(temperature, (tuple, list)):
            self.choice_temperatures = torch.linspace(*temperature, self.num_inference_steps).tolist()
            return
        start = self.config.choice_temperature if temperature is None else temperature
        if start < 0:
            raise ValueError(f"`temperature` is {start}, but must not be negative.")
        left = 1 - torch.tensor(
            [self._progress(step) for step in range(self.num_inference_steps)], dtype=torch.float64
        )
        if annealing == "compound":
            left = left.cumprod(0)
        elif annealing == "none":
            left = torch.ones_like(left)
        self.choice_temperatures = (start * left).tolist()

    def _step_index(self, timestep: int | torch.Tensor) -> int:
        if self.timesteps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        timestep = int(timestep)
        if not 0 <= timestep < self.num_inference_steps:
            raise ValueError(
                f"`timestep` is {timestep}, but must be one of `timesteps`: {self.num_inference_steps - 1} to 0."
            )
        return self.num_inference_steps - 1 - timestep

    def _progress(self, step_index: int) -> float:
        """How far the image is after this step, 1 at the end."""
        return (step_index + 1) / self.num_inference_steps

    def _masking_ratio(self, step_index: int, num_tokens: int | torch.LongTensor) -> torch.Tensor:
        # In float32 as the published samplers take it: rounding decides some floors, e.g. 576 / 3.
        return masking_ratio(torch.tensor(self._progress(step_index)), self.config.masking_schedule, num_tokens)

    def _schedule(
        self, step_index: int, masked: torch.BoolTensor, all_tokens: bool = False
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor, int]:
        """
        What the masking schedule counts, and where it stands.

        Sampling begins at the first time step, or where a first call after `set_timesteps` finds it: the steps before are
        left out, and this one decides their tokens too. Only if `add_noise` masked what the step before would have left
        masked (image-to-image), these were decided already.

        Args:
            step_index (`int`): Number of steps before this one in the whole schedule.
            masked (`torch.BoolTensor` of shape `(B, N)`): What is masked now.
            all_tokens (`bool`): Whether to count all tokens instead of those that are masked at the start.

        Returns:
            Number of tokens of each image that the schedule is over, how many of them are decided, and how many are masked
            now, long (B,) on the CPU; and the number of steps so far, this one included.
        """
        num_masked = masked.sum(-1).cpu()
        if step_index == 0 or self._start is None or self._start[1].shape != masked.shape:
            self._start = (step_index, masked, num_masked)
        first, _, at_start = self._start
        num_tokens = torch.full_like(at_start, masked.shape[1])
        if first > 0 and self._noised_step == first - 1:
            return num_tokens, num_tokens - num_masked, num_masked, step_index - first + 1
        return num_tokens if all_tokens else at_start, at_start - num_masked, num_masked, step_index - first + 1

    def _draw(
        self,
        model_output: torch.Tensor,
        step_index: int,
        sample: torch.LongTensor,
        positions: torch.LongTensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[torch.BoolTensor, torch.LongTensor, torch.Tensor]:
        """
        Draw a token at every masked position.

        Returns:
            Where tokens are masked, bool (B, N); the tokens, with those drawn in place of masked ones, long (B, N); and the
            logarithms of their probabilities, 0 for known ones, float32 (B, N).
        """
        logits, tokens = self._flatten(model_output, sample, positions)
        masked = tokens == self.config.mask_token_id
        uniform = uniform_noise(*tokens.shape, generator, tokens.device)
        if positions is None:
            # Masked positions first; only as many as some image needs are drawn.
            positions = masked.int().argsort(dim=-1, descending=True, stable=True)[:, : int(masked.sum(-1).max())]
            logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        temperature, mask_token_id = self.softmax_temperatures[step_index], self.config.mask_token_id
        if self.config.get("mask_logit_counts") and logits.shape[1] > 0 and logits.shape[-1] != mask_token_id + 1:
            raise ValueError(
                f"`mask_logit_counts` needs the logits of the {mask_token_id} codes and of the mask token, but "
                f"`model_output` has {logits.shape[-1]} an image token: set it to False for this transformer."
            )
        mask_logit = logits[..., mask_token_id : mask_token_id + 1].float() / temperature
        logits = shape_logits(logits, temperature, mask_token_id)
        drawn = draw_tokens(logits, uniform.gather(1, positions), self.config.top_k, self.config.top_p)
        # Probabilities before top_k and top_p: after them, greedy choices would all have probability 1.
        if self.config.get("mask_logit_counts"):
            logits = torch.cat([logits, mask_logit], dim=-1)
        log_probability = logits.gather(-1, drawn[..., None])[..., 0] - logits.logsumexp(-1)
        drawn = torch.where(masked.gather(1, positions), drawn, tokens.gather(1, positions))
        log_probability = torch.zeros(tokens.shape, device=tokens.device).scatter(1, positions, log_probability)
        return masked, tokens.scatter(1, positions, drawn), log_probability.masked_fill(~masked, 0.0)

    def _flatten(
        self, model_output: torch.Tensor, sample: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as (B, N or M, K) and tokens as (B, N), whatever layout they came in."""
        grid = sample.shape[1:]
        if model_output.ndim == 4:
            if model_output.shape[2:] == grid:
                model_output = model_output.movedim(1, -1)
            elif model_output.shape[1:3] != grid:
                raise ValueError(
                    f"`model_output` of shape {tuple(model_output.shape)} does not fit `sample` of shape "
                    f"{tuple(sample.shape)}: expected (B, K, H, W) or (B, H, W, K)."
                )
            model_output = model_output.flatten(1, 2)
        sample = sample.flatten(1)
        expected = sample.shape if positions is None else positions.shape
        if model_output.ndim != 3 or model_output.shape[:2] != expected:
            raise ValueError(
                f"`model_output` has the shape {tuple(model_output.shape)}, but must hold the logits of "
                f"{tuple(expected)} (batch, tokens)."
            )
        return model_output, sample

    def add_noise(
        self,
        sample: torch.LongTensor,
        timesteps: int | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        Mask tokens at random, each with the probability that is left masked after the step at `timesteps`.

        Args:
            sample (`torch.LongTensor` of shape `(batch_size, N)` or `(batch_size, height, width)`): Tokens.
            timesteps (`int` or 0-d `torch.Tensor`): One of the scheduler's `timesteps`; higher masks more.
            generator (`torch.Generator` or a list of them, one an image, *optional*): Source of the random numbers.
        """
        num_tokens = sample[0].numel()
        self._noised_step = self._step_index(timesteps)
        ratio = self._masking_ratio(self._noised_step, num_tokens).to(sample.device)
        noise = uniform_noise(len(sample), num_tokens, generator, sample.device).view_as(sample)
        return sample.masked_fill(noise < ratio, self.config.mask_token_id)
