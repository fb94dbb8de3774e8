import hashlib
import itertools
import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    UVit2DModel,
    VQModel,
)
from fill import state_dict
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import chisquare
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from maskgit import (
    ConfidenceScheduler,
    HaltonScheduler,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    SelfGuidedScheduler,
)
from maskgit.conversion.halton import convert_halton_transformer
from maskgit.schedulers.scheduling_halton import halton_order
from maskgit.schedulers.scheduling_maskgit_utils import MASKING_SCHEDULES, masking_ratio, most_confident


GOLDEN = Path(__file__).parent / "golden" / "halton"
K = MASK = 32  # codes 0..31
SCHEDULERS = (HaltonScheduler, ConfidenceScheduler, SelfGuidedScheduler)
VARIANTS = [
    (HaltonScheduler, {}),
    (HaltonScheduler, {"randomize": True}),
    (ConfidenceScheduler, {}),
    (ConfidenceScheduler, {"progress": "elapsed", "choice_temperature_annealing": "compound"}),
    (ConfidenceScheduler, {"selection": "random", "choice_temperature_annealing": "none"}),
    (ConfidenceScheduler, {"selection": "warm_up", "top_k": 1}),
    (ConfidenceScheduler, {"progress": "elapsed_plus_one"}),
    (ConfidenceScheduler, {"progress": "elapsed_increments"}),
    (ConfidenceScheduler, {"progress": "elapsed_increments", "schedule_all_tokens": True}),
    (ConfidenceScheduler, {"schedule_all_tokens": True}),
    (SelfGuidedScheduler, {}),
    (SelfGuidedScheduler, {"choice_temperature": 300.0}),  # many tokens are masked again
]


def network(sample):
    """Logits (B, N, K + 1) that depend on all tokens of an image, and would like nothing better than the mask token."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(-8, 8, (sample[0].numel(), K + 1), generator=generator)
    tokens = torch.randint(-8, 8, (K + 1, K + 1), generator=generator)
    logits = (places + tokens[sample.flatten(1)].sum(1, keepdim=True) % 16).float() / 4
    logits[..., MASK] = 50.0
    return logits


def sample_tokens(scheduler, sample, steps, generator=None, with_positions=False, check=lambda before, after: None):
    """Tokens (T, B, ...) after each step. `with_positions`: the network runs at the scheduler's positions only."""
    scheduler.set_timesteps(steps)
    trajectory = []
    for timestep in scheduler.timesteps:
        logits, positions = network(sample), None
        if with_positions:
            positions = scheduler.positions_to_predict(timestep, sample, generator=generator)
            if positions is None:
                masked = sample.flatten(1) == MASK
                positions = masked.int().argsort(dim=-1, descending=True)[:, : masked.sum(-1).max()]
            logits = logits.gather(1, positions[..., None].expand(-1, -1, K + 1))
        after = scheduler.step(logits, timestep, sample, positions=positions, generator=generator).prev_sample
        check(sample, after)
        sample = after
        trajectory.append(sample)
    return torch.stack(trajectory)


def ragged_start(grid=(4, 9)):
    """All masked, a few known, one masked, none masked."""
    sample = torch.randint(0, K, (4, *grid), generator=torch.Generator().manual_seed(1))
    sample[0] = MASK
    sample[1].view(-1)[::3] = MASK
    sample[2, -1, -1] = MASK
    return sample


@contextmanager
def diffusers_warnings():
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("diffusers").removeHandler(handler)


# Orders and counts


def test_halton_order_is_the_published_one():
    for side, expected in json.loads((GOLDEN / "schedule.json").read_text())["order"].items():
        order = halton_order(int(side), int(side)).tolist()
        if isinstance(expected, list):
            assert order == expected
        else:
            assert order[:32] == expected["first_32"] and order[-8:] == expected["last_8"]
            assert hashlib.sha256(json.dumps(order).encode()).hexdigest() == expected["sha256_of_json_list"]


@pytest.mark.parametrize(
    "grids",
    [
        [(height, width) for height in range(1, 13) for width in range(1, 13)],
        [(1, 128), (128, 1), (3, 100), (17, 113), (64, 64), (96, 96), (127, 128), (128, 128)],
    ],
)
def test_halton_order_visits_every_cell_once(grids):
    for height, width in grids:
        assert torch.equal(halton_order(height, width).sort().values, torch.arange(height * width)), (height, width)


def test_halton_reveals_the_published_numbers_in_order():
    for case, expected in json.loads((GOLDEN / "schedule.json").read_text())["halton_revealed"].items():
        side, steps = (int(number.split("x")[0]) for number in case.split("/"))
        scheduler = HaltonScheduler(mask_token_id=MASK)
        scheduler.set_timesteps(steps)
        sample = torch.full((1, side, side), MASK)
        order, revealed = [], []
        for timestep in scheduler.timesteps:
            positions = scheduler.positions_to_predict(timestep, sample)
            sample.view(1, -1).scatter_(1, positions, 0)
            order += positions[0].tolist()
            revealed.append(len(order))
        assert revealed == expected, case
        assert order == halton_order(side, side).tolist()


def test_confidence_keeps_the_published_numbers():
    for case, expected in json.loads((GOLDEN / "schedule.json").read_text())["confidence_known"].items():
        masking_schedule, grid, steps = case.split("/")
        num_tokens = int(grid.split("x")[0]) ** 2
        scheduler = ConfidenceScheduler(mask_token_id=2, masking_schedule=masking_schedule, progress="elapsed")
        scheduler.set_timesteps(int(steps))
        sample, known = torch.full((1, num_tokens), 2), []
        for timestep in scheduler.timesteps:
            sample = scheduler.step(torch.zeros(1, num_tokens, 2), timestep, sample).prev_sample
            known.append(int((sample != 2).sum()))
        assert known == [max(count, i + 1) for i, count in enumerate(expected)], case


def test_confidence_leaves_the_masks_of_maskgit():
    scheduler = ConfidenceScheduler(mask_token_id=MASK)
    trajectory = sample_tokens(scheduler, torch.full((1, 16, 16), MASK), 8)
    left = (trajectory == MASK).flatten(1).sum(-1).tolist()
    assert left == [int(256 * np.cos(np.pi / 2 * np.float32(i / 8))) for i in range(1, 8)] + [0]


@pytest.mark.parametrize("name", [*MASKING_SCHEDULES, "pow2.5", "pow.3", "pow7"])
def test_masking_schedules_fall_from_one_to_zero(name):
    ratio = masking_ratio(torch.linspace(0, 1, 101), name, 256)
    assert ratio[0] == pytest.approx(1.0, abs=1 / 256) and ratio[-1] == pytest.approx(0.0, abs=1e-6)
    assert (ratio.diff() <= 0).all() and (ratio >= 0).all() and (ratio <= 1).all()


def test_powers_have_two_names():
    progress = torch.linspace(0, 1, 11)
    for name, power in (("root", "pow0.5"), ("linear", "pow1"), ("square", "pow2"), ("cubic", "pow3.0")):
        assert torch.equal(masking_ratio(progress, name, 9), masking_ratio(progress, power, 9))
    assert masking_ratio(torch.tensor(0.25), "pow2.5", 9) == 1 - 0.25**2.5


def test_equal_confidences_are_kept_together():
    confidence = torch.tensor([[0.0, -1.0, -1.0, -2.0], [-torch.inf, -torch.inf, 3.0, -torch.inf]])
    for num_kept, expected in (
        (0, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (1, [[1, 0, 0, 0], [0, 0, 1, 0]]),
        (2, [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (4, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ):
        assert most_confident(confidence, torch.full((2, 1), num_kept)).int().tolist() == expected


# What always holds


@pytest.mark.parametrize("masking_schedule", ["cosine", "root", "log", "exp"])
@pytest.mark.parametrize("cls, config", VARIANTS)
def test_any_number_of_steps_decides_every_token_once(cls, config, masking_schedule):
    scheduler = cls(mask_token_id=MASK, masking_schedule=masking_schedule, **config)
    start = ragged_start()
    copy = start.clone()

    def check(before, after):
        known = before != MASK
        if cls is SelfGuidedScheduler:  # masks again what it drew, but not what was given
            assert torch.equal(after[start != MASK], start[start != MASK])
            known &= after != MASK
        assert torch.equal(after[known], before[known])

    for steps, with_positions in ((1, False), (2, True), (7, False), (7, True), (36, True), (50, False)):
        trajectory = sample_tokens(scheduler, start, steps, None, with_positions, check)
        assert trajectory.max() <= MASK and trajectory[-1].max() < K and trajectory.min() >= 0
    assert torch.equal(start, copy)


@pytest.mark.parametrize("cls, config", VARIANTS)
@pytest.mark.parametrize("masking_schedule", ["arccos", "root"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_image_depends_on_its_own_generator_only(cls, config, masking_schedule, with_positions):
    scheduler = cls(mask_token_id=MASK, masking_schedule=masking_schedule, **config)
    start = torch.cat([ragged_start(), torch.full((1, 4, 9), MASK)])

    def images(rows, with_positions):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sample_tokens(scheduler, start[rows], 20, generators, with_positions)[-1]

    batch = images([0, 1, 2, 3, 4], with_positions)
    assert not torch.equal(batch[0], batch[4])
    assert torch.equal(images([4, 3, 1, 0], with_positions), batch[[4, 3, 1, 0]])
    assert torch.equal(images([1], not with_positions), batch[[1]])


@pytest.mark.parametrize("cls, config", VARIANTS)
def test_seed_repeats_and_loops_do_not_disturb_each_other(cls, config):
    scheduler = cls(mask_token_id=MASK, **config)
    start = ragged_start()

    def image(seed):
        return sample_tokens(scheduler, start, 5, torch.Generator().manual_seed(seed))

    first, other = image(0), image(1)
    assert torch.equal(image(0), first)
    assert not torch.equal(first, other)

    # A second image without another set_timesteps.
    generator = torch.Generator().manual_seed(0)
    sample = start
    for timestep in scheduler.timesteps:
        sample = scheduler.step(network(sample), timestep, sample, generator=generator).prev_sample
    assert torch.equal(sample, first[-1])


def test_asking_for_positions_again_changes_nothing():
    scheduler = HaltonScheduler(mask_token_id=MASK, randomize=True)
    scheduler.set_timesteps(4)
    sample, generator = torch.full((3, 8, 8), MASK), torch.Generator().manual_seed(0)
    first = scheduler.positions_to_predict(3, sample, generator=generator)
    state = generator.get_state()
    assert torch.equal(scheduler.positions_to_predict(3, sample, generator=generator), first)
    assert torch.equal(generator.get_state(), state)
    assert len({tuple(row) for row in first.tolist()}) == 3, "each image starts at its own point of the order"
    orders = halton_order(8, 8).tolist() * 2
    for row in first.tolist():
        start = orders.index(row[0])
        assert orders[start : start + len(row)] == row


def test_logits_may_come_in_any_layout():
    start = ragged_start()
    logits = network(start)
    for cls in SCHEDULERS:
        scheduler = cls(mask_token_id=MASK, masking_schedule="root")
        scheduler.set_timesteps(3)

        def step(logits, sample):
            return scheduler.step(logits, 2, sample, generator=torch.Generator().manual_seed(0), return_dict=False)

        prev_sample, pred_original_sample = step(logits, start)
        grid = logits.unflatten(1, (4, 9))
        for other in (
            step(grid, start),
            step(grid.movedim(-1, 1), start),
            step(grid.movedim(-1, 1).contiguous(), start),
        ):
            assert torch.equal(other[0], prev_sample) and torch.equal(other[1], pred_original_sample)
        square = torch.full((2, 36), MASK)
        assert torch.equal(step(network(square), square)[0], step(network(square), square.view(2, 6, 6))[0].flatten(1))
        for wrong in (logits[:, 1:], logits[:2], grid.transpose(1, 2), logits[0]):
            with pytest.raises(ValueError, match="shape"):
                step(wrong, start)
    with pytest.raises(ValueError, match="no square grid"):
        HaltonScheduler._grid(scheduler, start.flatten(1)[:, 1:])


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_predicted_image(cls):
    """Known tokens, what this step drew, and guesses: a whole image after every step."""
    scheduler = cls(mask_token_id=MASK, top_k=1)
    scheduler.set_timesteps(4)
    start = ragged_start()
    output = scheduler.step(network(start), 3, start)
    decided = output.prev_sample != MASK
    assert decided.sum() > (start != MASK).sum()
    assert torch.equal(output.pred_original_sample[decided], output.prev_sample[decided])
    likely = network(start)[..., :K].argmax(-1).view_as(start)
    assert torch.equal(output.pred_original_sample, torch.where(start == MASK, likely, start))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_half_precision_logits_are_sampled_in_float32(cls, dtype):
    start = ragged_start()
    logits = network(start).to(dtype)
    tokens = []
    for logits in (logits, logits.float()):
        scheduler = cls(mask_token_id=MASK, softmax_temperature=(0.7, 1.3), top_p=0.9)
        scheduler.set_timesteps(2)
        tokens.append(scheduler.step(logits, 1, start, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(*tokens)


# Distributions


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, None, None), (0.5, None, None), (2.0, 5, None), (1.0, None, 0.6), (1.5, 8, 0.7), (1.0, 100, 1.0)],
)
def test_tokens_follow_the_softmax(cls, temperature, top_k, top_p):
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    expected = (logits.double() / temperature).softmax(0)
    order = expected.argsort(descending=True)
    kept = torch.zeros(16, dtype=torch.bool)
    kept[order[:top_k]] = True
    expected = expected * kept / expected[kept].sum()
    if top_p is not None:
        before = expected[order].cumsum(0) - expected[order]
        kept[order[before >= top_p]] = False
        expected = expected * kept / expected[kept].sum()

    scheduler = cls(16, softmax_temperature=(temperature, temperature), top_k=top_k, top_p=top_p)
    scheduler.set_timesteps(1)
    generator = torch.Generator().manual_seed(1)
    sample = torch.full((300, 10, 10), 16)
    tokens = scheduler.step(logits.expand(300, 100, 16), 0, sample, generator=generator).prev_sample
    counts = torch.bincount(tokens.flatten(), minlength=16)
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept].numpy(), (30_000 * expected[kept]).numpy()).pvalue > 1e-3


def test_draws_survive_extreme_logits():
    """Almost all the probability on one code, or spread over many: no code of probability 0, and none out of range."""
    scheduler = HaltonScheduler(mask_token_id=20_000)
    scheduler.set_timesteps(1)
    logits = torch.full((64, 4, 20_000), -1e4)
    logits[:, :, 17_123] = 1e4
    logits[:, 2:] = 0.0
    logits[:, 3, 10_000:] = -torch.inf
    generator = torch.Generator().manual_seed(0)
    tokens = scheduler.step(logits, 0, torch.full((64, 2, 2), 20_000), generator=generator).prev_sample.flatten(1)
    assert (tokens[:, :2] == 17_123).all() and (tokens < 20_000).all() and (tokens[:, 3] < 10_000).all()
    assert 8_000 < tokens[:, 2].float().mean() < 12_000 and len(tokens[:, 2].unique()) > 60


def test_choice_noise_is_gumbel():
    """At choice temperature 1, the one token that is kept is any of them with its confidence as odds."""
    confidences = torch.tensor([0.9, 0.7, 0.6, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    logits = torch.full((9, 5), -torch.inf)
    logits[:, 0] = confidences.log()
    logits[:, 1:] = ((1 - confidences) / 4).log()[:, None]
    scheduler = ConfidenceScheduler(
        5, top_k=1, choice_temperature=1.0, choice_temperature_annealing="none", progress="elapsed"
    )
    scheduler.set_timesteps(9)
    sample = torch.full((20_000, 9), 5)
    generator = torch.Generator().manual_seed(0)
    kept = scheduler.step(logits.expand(20_000, 9, 5), 8, sample, generator=generator).prev_sample != 5
    assert (kept.sum(-1) == 1).all()
    assert (
        chisquare(kept.sum(0).numpy(), 20_000 * (confidences.double() / confidences.double().sum()).numpy()).pvalue
        > 1e-3
    )


def test_selection_of_kept_tokens():
    logits = network(torch.full((1, 36), MASK))[..., :K].expand(500, -1, -1)
    confident = logits[0].softmax(-1).max(-1).values.argsort(descending=True)
    sample = torch.full((500, 36), MASK)
    for selection, step_index, by_confidence in (
        ("confidence", 0, True),
        ("random", 4, False),
        ("warm_up", 1, False),
        ("warm_up", 2, True),
    ):
        scheduler = ConfidenceScheduler(MASK, top_k=1, choice_temperature=0.0, selection=selection)
        scheduler.set_timesteps(6)
        timestep = 5 - step_index
        kept = scheduler.step(logits, timestep, sample, generator=torch.Generator().manual_seed(0)).prev_sample != MASK
        shares = kept.float().mean(0)
        if by_confidence:
            assert set(shares.tolist()) == {0.0, 1.0}
            assert set(kept[0].nonzero().flatten().tolist()) == set(confident[: kept[0].sum()].tolist())
        else:
            assert (shares - shares.mean()).abs().max() < 0.1


# Settings


def test_temperatures_of_the_steps():
    scheduler = HaltonScheduler(MASK, softmax_temperature=(1.0, 0.5), temperature_warmup_steps=2)
    scheduler.set_timesteps(5)
    assert scheduler.softmax_temperatures == pytest.approx([2.0, 2 / 1.25, 1 / 1.5, 1 / 1.75, 0.5])
    scheduler.set_timesteps(1)
    assert scheduler.softmax_temperatures == pytest.approx([2.0])

    def choices(temperature=None, **config):
        scheduler = ConfidenceScheduler(MASK, **config)
        scheduler.set_timesteps(4, temperature)
        return scheduler.choice_temperatures

    assert choices() == pytest.approx([4.5 * 3 / 4, 4.5 / 2, 4.5 / 4, 0.0])
    assert choices(2.0) == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert choices((2, 0.5)) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert choices(choice_temperature_annealing="none") == pytest.approx([4.5] * 4)
    compound = choices(choice_temperature_annealing="compound", choice_temperature=1.0)
    assert compound == pytest.approx([3 / 4, 3 / 8, 3 / 32, 0.0])
    for progress in ("elapsed", "elapsed_plus_one", "elapsed_increments"):
        assert choices(progress=progress, choice_temperature=3.0) == pytest.approx([3.0, 2.0, 1.0, 0.0])

    scheduler = SelfGuidedScheduler(MASK)
    for temperature, expected in ((None, [18.75, 9.375, 2.34375, 0.0]), ((2, 0.5), [2.0, 1.5, 1.0, 0.5])):
        scheduler.set_timesteps(4, temperature)
        assert scheduler.choice_temperatures == pytest.approx(expected)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_timesteps(cls):
    scheduler = cls(MASK)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.zeros(1, 4, K), 0, torch.full((1, 4), MASK))
    scheduler.set_timesteps(3, None, "cpu")
    assert scheduler.timesteps.tolist() == [2, 1, 0] and scheduler.order == 1
    for timestep in (3, -1):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(torch.zeros(1, 4, K), timestep, torch.full((1, 4), MASK))
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(0)


@pytest.mark.parametrize(
    "cls, config, named",
    [
        *((cls, {"masking_schedule": "sine"}, "masking_schedule") for cls in SCHEDULERS),
        *((cls, {"masking_schedule": "pow-2"}, "masking_schedule") for cls in SCHEDULERS),
        *((cls, {"masking_schedule": "pow0"}, "masking_schedule") for cls in SCHEDULERS),
        *((cls, {"softmax_temperature": (0.0, 1.0)}, "softmax_temperature") for cls in SCHEDULERS),
        *((cls, {"top_k": 0}, "top_k") for cls in SCHEDULERS),
        *((cls, {"top_p": 0.0}, "top_p") for cls in SCHEDULERS),
        *((cls, {"top_p": 1.5}, "top_p") for cls in SCHEDULERS),
        (ConfidenceScheduler, {"selection": "best"}, "selection"),
        (ConfidenceScheduler, {"choice_temperature_annealing": "cosine"}, "choice_temperature_annealing"),
        (ConfidenceScheduler, {"progress": "half"}, "progress"),
        (ConfidenceScheduler, {"choice_temperature": -1.0}, "choice_temperature"),
        (SelfGuidedScheduler, {"choice_temperature": -1.0}, "choice_temperature"),
    ],
)
def test_impossible_settings_are_refused(cls, config, named):
    with pytest.raises(ValueError, match=named):
        cls(mask_token_id=MASK, **config)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_generators_must_be_one_an_image(cls):
    scheduler = cls(mask_token_id=MASK, randomize=True) if cls is HaltonScheduler else cls(mask_token_id=MASK)
    scheduler.set_timesteps(2)
    sample = torch.full((3, 4), MASK)
    with pytest.raises(ValueError, match="list of 2"):
        scheduler.step(torch.zeros(3, 4, K), 1, sample, generator=[torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("first, second", itertools.permutations(SCHEDULERS, 2))
def test_switching_schedulers_keeps_settings(first, second, tmp_path):
    own = {
        HaltonScheduler: {"randomize": True},
        ConfidenceScheduler: {"choice_temperature": 7.0, "selection": "warm_up"},
        SelfGuidedScheduler: {"choice_temperature": 45.0},
    }[first]
    scheduler = first(mask_token_id=MASK, top_k=7, softmax_temperature=(1.0, 0.8), **own)
    scheduler.save_pretrained(tmp_path)
    with diffusers_warnings() as warnings:
        scheduler = first.from_pretrained(tmp_path)
        other = second.from_config(scheduler.config)
        back = first.from_config(other.config)
    assert not warnings, [record.getMessage() for record in warnings]
    assert other.config.top_k == 7 and tuple(other.config.softmax_temperature) == (1.0, 0.8)
    for name, value in own.items():
        assert back.config[name] == value
    for name, value in scheduler.config.items():
        assert name.startswith("_") or back.config[name] == value
    # What nobody chose is the other class's own default.
    switched, fresh = second.from_config(first(mask_token_id=MASK).config), second(mask_token_id=MASK)
    for name in ("masking_schedule", "choice_temperature"):
        assert switched.config.get(name) == fresh.config.get(name) or second is HaltonScheduler
    assert first in other.compatibles and second in scheduler.compatibles


# Image to image


@pytest.mark.parametrize("masking_schedule", MASKING_SCHEDULES)
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_add_noise_masks_the_ratio_of_the_step(cls, masking_schedule):
    scheduler = cls(mask_token_id=MASK, masking_schedule=masking_schedule)
    scheduler.set_timesteps(5)
    tokens = torch.randint(0, K, (2, 100, 100))
    copy = tokens.clone()
    for timestep in scheduler.timesteps:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        noised = scheduler.add_noise(tokens, timestep, generator=generators)
        expected = float(masking_ratio(torch.tensor((5 - int(timestep)) / 5), masking_schedule, 10_000))
        assert torch.equal(noised[noised != MASK], tokens[noised != MASK])
        assert (noised == MASK).float().mean().item() == pytest.approx(expected, abs=0.02)
        alone = scheduler.add_noise(tokens[1:], int(timestep), generator=torch.Generator().manual_seed(1))
        assert torch.equal(alone[0], noised[1])
    assert torch.equal(tokens, copy)


@pytest.mark.parametrize("cls, config", VARIANTS)
def test_image_to_image_goes_on_where_the_noise_left_off(cls, config):
    scheduler = cls(mask_token_id=MASK, masking_schedule="linear", **config)
    scheduler.set_timesteps(10)
    sample = scheduler.add_noise(
        torch.zeros(1, 40, 40, dtype=torch.long), 5, generator=torch.Generator().manual_seed(0)
    )
    left = [int((sample == MASK).sum())]
    for timestep in scheduler.timesteps[5:]:
        sample = scheduler.step(torch.zeros(1, 1600, K), timestep, sample).prev_sample
        left.append(int((sample == MASK).sum()))
    expected = [1600 * float(scheduler._masking_ratio(step, 1600)) for step in range(4, 9)] + [0]
    assert left == pytest.approx(expected, abs=60) and left[-1] == 0


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_sampling_may_start_in_the_middle(cls):
    """Without noise that the scheduler added, the masked tokens are the whole, and the first step catches up."""
    scheduler = cls(mask_token_id=MASK, masking_schedule="linear")
    start = torch.zeros(1, 1024, dtype=torch.long)
    start[0, :512] = MASK
    left = []
    scheduler.set_timesteps(8)
    sample = start.unflatten(1, (32, 32))
    for timestep in scheduler.timesteps[3:]:
        sample = scheduler.step(torch.zeros(1, 1024, K), timestep, sample).prev_sample
        left.append(int((sample == MASK).sum()))
    assert left == [256, 192, 128, 64, 0]
    # Noise for another step is no reason to take it otherwise.
    scheduler.add_noise(start, 7)
    sample = scheduler.step(torch.zeros(1, 1024, K), 4, start.unflatten(1, (32, 32))).prev_sample
    assert (sample == MASK).sum() == 256


# Parity with the published sampler


@pytest.fixture(scope="module")
def golden_transformer():
    manifest = json.loads((GOLDEN / "transformer_tiny.json").read_text())
    converted = convert_halton_transformer(state_dict(manifest), num_attention_heads=manifest["model"]["heads"])
    model = MaskGitDiTTransformer2DModel(**converted.config)
    model.load_state_dict(converted.state_dict)
    return model.eval()


@pytest.mark.parametrize("case", ["cfg", "nocfg"])
@pytest.mark.parametrize("path", ["full logits", "positions", "pipeline"])
def test_greedy_trajectory_is_the_published_one(golden_transformer, case, path):
    golden = load_file(GOLDEN / f"sampling_greedy_{case}.safetensors")
    labels, steps, w = golden["in.labels"], int(golden["in.steps"]), float(golden.get("in.guidance_w", 0.0))
    scheduler = HaltonScheduler(mask_token_id=128, top_k=1)

    trajectory = []
    if path == "pipeline":
        pipe = MaskGitPipeline(golden_transformer, None, scheduler)
        pipe.set_progress_bar_config(disable=True)

        def callback(pipe, step, timestep, tensors):
            trajectory.append(tensors["latents"])
            return tensors

        pipe(
            labels,
            guidance_scale=1 + w,
            num_inference_steps=steps,
            output_type="latent",
            callback_on_step_end=callback,
        )
    else:
        scheduler.set_timesteps(steps)
        sample = torch.full((len(labels), 8, 8), 128)
        for timestep in scheduler.timesteps:
            positions = scheduler.positions_to_predict(timestep, sample) if path == "positions" else None
            with torch.no_grad():
                conditional = golden_transformer(sample, labels, positions).logits
                unconditional = golden_transformer(sample, torch.full_like(labels, 10), positions).logits
            logits = (1 + w) * conditional - w * unconditional
            sample = scheduler.step(logits, timestep, sample, positions=positions).prev_sample
            trajectory.append(sample)

    expected = torch.full((len(labels), 8, 8), 128)
    for i in range(steps):
        revealed, predicted = golden["out.revealed_per_step"][:, i], golden["out.predicted_tokens_per_step"][:, i]
        expected = torch.where(revealed & (expected == 128), predicted.long(), expected)
        assert torch.equal(trajectory[i], expected), f"step {i}"
    assert torch.equal(trajectory[-1], golden["out.final_tokens"])


# Inside diffusers' aMUSEd pipelines


@pytest.fixture(scope="module")
def amused_components(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<|startoftext|>", "<|endoftext|>", "!", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    return {
        "tokenizer": CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        "text_encoder": CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=8,
                intermediate_size=8,
                projection_dim=8,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=8,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        ).eval(),
        "transformer": UVit2DModel(
            hidden_size=8,
            hidden_dropout=0.0,
            cond_embed_dim=8,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=8,
            vocab_size=K,
            codebook_size=K,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=1,
            block_num_heads=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            attention_dropout=0.0,
            intermediate_size=8,
        ).eval(),
        "vqvae": VQModel(
            block_out_channels=[8],
            latent_channels=8,
            norm_num_groups=8,
            num_vq_embeddings=K,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        ).eval(),
    }


@pytest.mark.parametrize("cls, config", VARIANTS)
@pytest.mark.parametrize("pipeline", [AmusedPipeline, AmusedImg2ImgPipeline, AmusedInpaintPipeline])
def test_amused_pipelines_run_with_our_schedulers(amused_components, pipeline, cls, config, tmp_path):
    # The transformer's last code is its mask token.
    pipe = pipeline(scheduler=cls(mask_token_id=K - 1, **config), **amused_components)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (8, 8, 3), dtype=np.uint8))
    inputs = {"prompt": "a b c", "num_inference_steps": 4, "output_type": "latent"}
    if pipeline is AmusedPipeline:
        inputs |= {"height": 8, "width": 8}
    elif pipeline is AmusedImg2ImgPipeline:
        inputs |= {"image": image, "strength": 0.75}
    else:
        mask = np.zeros((8, 8), dtype=np.uint8)
        mask[2:5, 1:7] = 255
        inputs |= {"image": image, "mask_image": Image.fromarray(mask), "strength": 1.0}

    tokens = pipe(**inputs, generator=torch.Generator().manual_seed(0)).images
    assert tokens.shape == (1, 8, 8) and tokens.max() < K - 1
    if pipeline is AmusedInpaintPipeline:
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            codes = pipe.vqvae.quantize(pipe.vqvae.encode(pixels).latents)[2][2].view(8, 8)
        known = (torch.from_numpy(mask) == 0) & (codes != K - 1)
        assert torch.equal(tokens[0][known], codes[known])
    if pipeline is AmusedPipeline and config == VARIANTS[1][1]:
        assert torch.equal(pipe(**inputs, generator=torch.Generator().manual_seed(0)).images, tokens)
        assert pipe(**inputs | {"output_type": "pil"}).images[0].size == (8, 8)
        pipe.save_pretrained(tmp_path)
        loaded = pipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is cls
        assert torch.equal(loaded(**inputs, generator=torch.Generator().manual_seed(0)).images, tokens)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_switching_to_the_stock_scheduler_and_back(cls):
    stock = AmusedScheduler.from_config(cls(mask_token_id=MASK, top_k=5).config)
    assert stock.config.mask_token_id == MASK and stock.config.masking_schedule == "cosine"
    with diffusers_warnings() as warnings:
        assert cls.from_config(stock.config).config.top_k == 5
    assert not warnings


def test_a_saved_default_schedule_gives_way_to_the_other_schedulers_own(tmp_path):
    HaltonScheduler(mask_token_id=MASK, top_k=3).save_pretrained(tmp_path)
    halton = HaltonScheduler.from_pretrained(tmp_path)
    confidence = ConfidenceScheduler.from_config(halton.config)
    assert confidence.config.masking_schedule == "cosine" and confidence.config.top_k == 3
    assert HaltonScheduler.from_config(confidence.config).config.masking_schedule == "arccos"
    chosen = HaltonScheduler.from_config(halton.config, masking_schedule="square")
    assert ConfidenceScheduler.from_config(chosen.config).config.masking_schedule == "square"


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_overflowed_are_an_error(cls, top_k, value):
    scheduler = cls(mask_token_id=K, top_k=top_k)
    scheduler.set_timesteps(1)
    logits = torch.zeros(1, 4, K)
    logits[0, 2, 5] = value
    with pytest.raises(ValueError, match="not finite.*bfloat16"):
        scheduler.step(logits, 0, torch.full((1, 2, 2), MASK))


def test_switching_to_another_scheduler_and_back_keeps_what_was_set(tmp_path):
    settings = {"masking_schedule": "arccos", "progress": "elapsed_increments", "schedule_all_tokens": True}
    ConfidenceScheduler(mask_token_id=9, choice_temperature=25.0, **settings).save_pretrained(tmp_path)
    loaded = ConfidenceScheduler.from_pretrained(tmp_path)
    for other in (HaltonScheduler, SelfGuidedScheduler):
        back = ConfidenceScheduler.from_config(other.from_config(loaded.config).config)
        assert {name: back.config[name] for name in settings} == settings
        assert back.config.choice_temperature == 25.0
    HaltonScheduler(mask_token_id=9, masking_schedule="cosine").save_pretrained(tmp_path)
    loaded = HaltonScheduler.from_pretrained(tmp_path)
    back = HaltonScheduler.from_config(ConfidenceScheduler.from_config(loaded.config).config)
    assert back.config.masking_schedule == "cosine"


def test_a_mask_token_given_by_position_is_kept_when_switching():
    assert ConfidenceScheduler.from_config(HaltonScheduler(11).config).config.mask_token_id == 11


def test_the_mask_tokens_logit_must_be_there_to_count():
    scheduler = ConfidenceScheduler(mask_token_id=5, mask_logit_counts=True)
    scheduler.set_timesteps(2)
    tokens = torch.full((1, 4), 5)
    for width in (5, 8):
        with pytest.raises(ValueError, match="mask_logit_counts"):
            scheduler.step(torch.zeros(1, 4, width), 1, tokens)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: HaltonScheduler(mask_token_id=5, softmax_temperature=1.0), "two positive numbers"),
        (lambda: ConfidenceScheduler(mask_token_id=5).set_timesteps(3, temperature=-4.0), "negative"),
    ],
)
def test_wrong_temperatures(call, message):
    with pytest.raises(ValueError, match=message):
        call()
