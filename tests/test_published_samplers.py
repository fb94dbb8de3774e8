"""The published samplers as configurations of our schedulers: the same counts, temperatures and tokens."""

import json
import re
from pathlib import Path

import pytest
import torch
from fill import checkpoint, state_dict
from safetensors.torch import load_file

from maskgit import (
    ConfidenceScheduler,
    HaltonScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
    SelfGuidedScheduler,
)
from maskgit.conversion.maskgit_google import convert_flax_transformer
from maskgit.conversion.maskgit_google_files import read_flax
from maskgit.conversion.maskgit_v1 import convert_v1_transformer
from maskgit.conversion.pgm import convert_pgm_transformer
from maskgit.presets import preset_names
from maskgit.schedulers import (
    scheduling_confidence,
    scheduling_halton,
    scheduling_maskgit_utils,
    scheduling_self_guided,
)
from maskgit.schedulers.scheduling_halton import halton_order
from maskgit.schedulers.scheduling_maskgit_utils import most_confident


GOLDEN = Path(__file__).parent / "golden"
V1 = {
    "masking_schedule": "arccos",
    "progress": "elapsed_increments",
    "schedule_all_tokens": True,
    "mask_logit_counts": True,
}
PGM = {"masking_schedule": "arccos", "progress": "elapsed_plus_one", "choice_temperature": 5.0}


def masked_counts(scheduler, num_tokens, num_steps, first_step=0, num_known=0):
    """How many tokens are masked after each step."""
    scheduler.set_timesteps(num_steps)
    sample = torch.full((1, num_known + num_tokens), 2)
    sample[0, :num_known] = 0
    counts = []
    logits = torch.randn(1, sample.shape[1], 2, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps[first_step:]:
        sample = scheduler.step(logits, timestep, sample, generator=torch.Generator().manual_seed(0)).prev_sample
        counts.append(int((sample == 2).sum()))
    return counts


# Counts


@pytest.mark.parametrize("num_steps", [8, 12, 16])
@pytest.mark.parametrize("cls", [ConfidenceScheduler, SelfGuidedScheduler])
def test_google_leaves_masked_what_the_schedule_says(cls, num_steps):
    entries = json.loads((GOLDEN / "maskgit_google/schedule.json").read_text())["entries"]
    for entry in entries:
        if entry["num_steps"] != num_steps:
            continue
        scheduler = cls(2, masking_schedule={"uniform": "linear"}.get(entry["method"], entry["method"]))
        # Partly known images are 24 x 24 here; what is known does not count.
        num_known = 576 - entry["num_tokens"] if entry["start_step"] else 0
        counts = masked_counts(scheduler, entry["num_tokens"], num_steps, entry["start_step"], max(num_known, 0))
        # The last entry of the table is never shown: the tokens are recorded before they are masked.
        for count, single, double in zip(
            counts[:-1], entry["num_masked_after_step"], entry["num_masked_after_step_float64"]
        ):
            assert count in (single, double), entry
        assert counts[-1] == 0


def test_v1_keeps_the_published_numbers():
    tables = json.loads((GOLDEN / "maskgit_v1/schedule.json").read_text())["tables"]
    for side, by_steps in tables.items():
        num_tokens = int(side) ** 2
        for num_steps, by_mode in by_steps.items():
            for mode, expected in by_mode.items():
                scheduler = ConfidenceScheduler(2, **V1 | {"masking_schedule": mode, "mask_logit_counts": False})
                counts = masked_counts(scheduler, num_tokens, int(num_steps))
                kept = [before - after for before, after in zip([num_tokens, *counts], counts)]
                assert kept == expected, (side, num_steps, mode)


def test_v1_steps_beyond_the_schedule_decide_nothing():
    scheduler = ConfidenceScheduler(2, **V1 | {"masking_schedule": "cosine", "mask_logit_counts": False})
    kept = [1, 3, 6, 8, 10, 12, 13, 11]  # of 64 tokens
    # 20 of them are masked, as in the published inpainting: the schedule runs out early.
    assert masked_counts(scheduler, 20, 8, num_known=44) == [19, 16, 10, 2, 0, 0, 0, 0]
    # Or they are shared out.
    scheduler = ConfidenceScheduler(2, masking_schedule="cosine", progress="elapsed_increments")
    assert masked_counts(scheduler, 64, 8, num_known=80) == [64 - sum(kept[: i + 1]) for i in range(8)]
    # More steps than tokens: one each, until none is left.
    assert masked_counts(scheduler, 5, 9) == [4, 3, 2, 1, 0, 0, 0, 0, 0]
    assert masked_counts(scheduler, 5, 1) == [0]


def test_pgm_decides_the_published_numbers():
    tables = json.loads((GOLDEN / "pgm/schedule.json").read_text())
    for side, by_steps in tables["confidence"].items():
        for num_steps, table in by_steps.items():
            counts = masked_counts(ConfidenceScheduler(2, **PGM), int(side) ** 2, int(num_steps))
            assert [int(side) ** 2 - count for count in counts] == table["cumulative"], (side, num_steps)
    for side, order in tables["order"].items():
        assert halton_order(int(side), int(side)).tolist() == order
    for side, by_steps in tables["halton"].items():
        for num_steps, table in by_steps.items():
            counts = masked_counts(HaltonScheduler(2), int(side) ** 2, int(num_steps))
            assert [int(side) ** 2 - count for count in counts] == table["cumulative"], (side, num_steps)


def test_published_self_guided_schedules():
    golden = load_file(GOLDEN / "unlockmgm/sample_tiny.safetensors")
    for size, temperature, num_tokens in ((256, 25.0, 256), (512, 45.0, 1024)):
        scheduler = SelfGuidedScheduler(2, choice_temperature=temperature)
        counts = masked_counts(scheduler, num_tokens, 18)
        assert counts[:-1] == golden[f"out.schedule_{size}.mask_len"][:-1].tolist()
        expected = golden[f"out.schedule_{size}.temperature"]
        assert torch.allclose(torch.tensor(scheduler.choice_temperatures, dtype=torch.float64), expected, rtol=1e-9)


# Steps


def test_positions_of_low_confidence_are_masked_as_published():
    """Ties at the cut, and probabilities that have vanished, mask fewer tokens than asked for."""
    golden = load_file(GOLDEN / "maskgit_google/topk_mask.safetensors")
    confidence = golden["in.probs"].log() + golden["in.temperature"][:, None, None] * golden["in.gumbel"]
    num_kept = confidence.shape[-1] - golden["in.mask_len"]
    for case in range(len(confidence)):
        masked = ~most_confident(confidence[case], num_kept[case][:, None])
        assert torch.equal(masked, golden["out.masking"][case].bool()), case


@pytest.mark.parametrize("case", ["sample_tiny", "sample_tiny_plain", "sample_tiny_cdf"])
def test_self_guided_step_is_the_published_one(case, monkeypatch):
    """Given the published draws and their probabilities: which tokens are kept, and which of them masked again."""
    options = json.loads((GOLDEN / f"unlockmgm/{case}.json").read_text())["case"]
    golden = load_file(GOLDEN / f"unlockmgm/{case}.safetensors")
    num_codes, mask = 1024, 1034
    scheduler = SelfGuidedScheduler(mask, choice_temperature=options["temperature"])
    scheduler.set_timesteps(options["timesteps"])
    assert scheduler.choice_temperatures == pytest.approx(golden["out.temperature"].tolist(), rel=1e-9)

    sample = torch.full_like(golden["out.tokens"], mask)
    num_remasked = []
    for step, timestep in enumerate(scheduler.timesteps):
        known = sample != mask
        drawn, probability = golden["out.sampled_ids"][step], golden["out.selected_probs"][step].clamp(max=1)
        logits = ((1 - probability) / (num_codes - 1)).log()[..., None].repeat(1, 1, num_codes)
        logits.scatter_(2, torch.where(known, 0, drawn)[..., None], probability.log()[..., None])
        monkeypatch.setattr(scheduling_maskgit_utils, "draw_tokens", lambda logits, *_: logits.argmax(-1))
        monkeypatch.setattr(scheduling_self_guided, "gumbel_noise", lambda *_: golden["in.gumbel"][step])
        if case == "sample_tiny_cdf":  # draws of low probability
            positions = torch.arange(sample.shape[1]).expand_as(sample)
            monkeypatch.setattr(scheduling_maskgit_utils, "draw_tokens", lambda *_: torch.where(known, 0, drawn))
            output = scheduler.step(logits, timestep, sample, positions=positions)
        else:
            output = scheduler.step(logits, timestep, sample)
        sample = output.prev_sample
        assert torch.equal(output.pred_original_sample, drawn)
        if step < len(scheduler.timesteps) - 1:
            assert torch.equal(sample, golden["out.input_ids_after"][step]), f"step {step}"
        num_remasked.append((known & (sample == mask)).sum(-1).tolist())
    assert torch.equal(sample, golden["out.tokens"])
    assert num_remasked[:-1] == golden["out.known_tokens_remasked"][:-1].tolist()
    assert (sum(map(sum, num_remasked)) > 0) == (case == "sample_tiny")


def test_self_guided_masks_what_it_drew_but_not_what_was_given():
    scheduler = SelfGuidedScheduler(2, choice_temperature=500.0)
    start = torch.full((4, 100), 2)
    start[:, ::2] = 0
    for first in (0, 1):  # given are the tokens that are known when sampling begins, wherever in the schedule it does
        scheduler.set_timesteps(10)
        sample, remasked = start, 0
        for timestep in scheduler.timesteps[first:]:
            generator = torch.Generator().manual_seed(int(timestep))
            after = scheduler.step(torch.zeros(4, 100, 2), timestep, sample, generator=generator).prev_sample
            assert (after[:, ::2] == 0).all()
            remasked += int(((sample != 2) & (after == 2)).sum())
            sample = after
        assert remasked > 0 and (sample != 2).all()


# Whole trajectories, through the pipeline


def sample_through_pipeline(transformer, scheduler, class_labels, latents=None, **arguments):
    """Tokens (T, B, H, W) after each step."""
    pipe = MaskGitPipeline(transformer.eval(), None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    trajectory = []

    def callback(pipe, step, timestep, tensors):
        trajectory.append(tensors["latents"].clone())
        return tensors

    pipe(
        class_labels,
        latents=latents,
        output_type="latent",
        callback_on_step_end=callback,
        **arguments,
    )
    return torch.stack(trajectory)


@pytest.fixture(scope="module")
def v1_transformer():
    manifest = json.loads((GOLDEN / "maskgit_v1/transformer_tiny.json").read_text())
    model = manifest["model"]
    converted = convert_v1_transformer(state_dict(manifest), model["heads"], model["codebook_size"], model["nclass"])
    transformer = MaskGitViTTransformer2DModel(**converted.config)
    transformer.load_state_dict(converted.state_dict)
    return transformer


@pytest.mark.parametrize("case", ["nocfg", "cfg_noise", "inpaint"])
def test_v1_trajectory_is_the_published_one(v1_transformer, case, monkeypatch):
    settings = json.loads((GOLDEN / f"maskgit_v1/sampling_greedy_{case}.json").read_text())["settings"]
    golden = load_file(GOLDEN / f"maskgit_v1/sampling_greedy_{case}.safetensors")
    mask = v1_transformer.config.codebook_size
    scheduler = ConfidenceScheduler(
        mask,
        **V1 | {"masking_schedule": settings["sched_mode"]},
        softmax_temperature=(1 / settings["sm_temp"], 1 / settings["sm_temp"]),
        choice_temperature=settings["r_temp"],
        top_k=1,
    )
    noise = iter(golden.get("in.gumbel", ()))
    monkeypatch.setattr(scheduling_confidence, "gumbel_noise", lambda *_: next(noise))
    trajectory = sample_through_pipeline(
        v1_transformer,
        scheduler,
        golden["in.labels"],
        golden.get("in.init_code"),
        guidance_scale=1 + settings["w"],
        guidance_schedule="linear",
        num_inference_steps=settings["steps"],
    )
    num_steps = settings["steps_run"]
    expected, unknown = golden["out.tokens_after_step"].movedim(1, 0), golden["out.masked_after_step"].movedim(1, 0)
    # Where the original drew its mask token, it went on as if it knew a token there, and drew another one differently.
    drew_mask = ((expected == mask) & ~unknown).flatten(2).any(-1)
    assert drew_mask[-1].tolist() == [case == "cfg_noise" and i == 2 for i in range(len(golden["in.labels"]))]
    num_different = (trajectory[:num_steps] != expected).flatten(2).sum(-1)
    assert (num_different <= 2 * drew_mask).all(), num_different
    assert torch.equal(trajectory[-1], trajectory[num_steps - 1])
    assert (trajectory[-1] != golden["out.final_tokens"]).sum() <= (2 if case == "cfg_noise" else 0)


@pytest.mark.parametrize("case, first_step", [("flax_decode_tiny", 0), ("flax_edit_tiny", 2)])
def test_google_trajectory_is_the_published_one(case, first_step, tmp_path, monkeypatch):
    manifest = json.loads((GOLDEN / f"maskgit_google/{case}.json").read_text())
    golden = load_file(GOLDEN / f"maskgit_google/{case}.safetensors")
    settings, model = manifest["notes"]["sampler"], manifest["model"]
    weights, _ = read_flax(checkpoint(GOLDEN / f"maskgit_google/{case}.json", tmp_path / "checkpoint"))
    converted = convert_flax_transformer(weights, model["codebook_size"], model["num_classes"])
    transformer = MaskGitBertTransformer2DModel(**converted.config)
    transformer.load_state_dict(converted.state_dict)
    transformer.eval()

    mask = model["codebook_size"]
    scheduler = ConfidenceScheduler(mask, choice_temperature=settings["choice_temperature"])
    scheduler.set_timesteps(settings["num_iter"])
    timesteps = scheduler.timesteps[first_step:]
    choice_temperatures = torch.tensor(scheduler.choice_temperatures[first_step:])
    assert torch.allclose(choice_temperatures, golden["out.temperature"], atol=1e-6)

    class_labels = golden["in.input_ids"][:, 0] - model["codebook_size"]
    sample = torch.where(golden["in.input_ids"] == settings["mask_token_id"], mask, golden["in.input_ids"])[:, 1:]
    for step, timestep in enumerate(timesteps):
        noise = golden["in.sample_gumbel"][step][:, 1:]
        monkeypatch.setattr(
            scheduling_maskgit_utils, "draw_tokens", lambda logits, *_: (logits + noise).argmax(-1), raising=True
        )
        monkeypatch.setattr(scheduling_confidence, "gumbel_noise", lambda *_: golden["in.mask_gumbel"][step][:, 1:])
        with torch.no_grad():
            logits = transformer(sample, class_labels).logits
        positions = torch.arange(sample.shape[1]).expand_as(sample)
        output = scheduler.step(logits, timestep, sample, positions=positions)
        assert torch.equal(output.pred_original_sample, golden["out.final_seqs"][:, step, 1:]), f"step {step}"
        sample = output.prev_sample
        after = golden["out.seqs_after_mask"][:, step, 1:]
        if step < len(timesteps) - 1:
            assert torch.equal(sample, torch.where(after == settings["mask_token_id"], mask, after)), f"step {step}"
    assert torch.equal(sample, golden["out.final_seqs"][:, -1, 1:])


def pgm_case(case, **config):
    manifest = json.loads((GOLDEN / f"pgm/{case}.json").read_text())
    converted = convert_pgm_transformer(state_dict(manifest), sample_size=(manifest["model"]["grid"],) * 2)
    transformer = PartitionTransformer2DModel(**converted.config, **config)
    transformer.load_state_dict(converted.state_dict)
    return manifest["sampler"], load_file(GOLDEN / f"pgm/{case}.safetensors"), transformer.eval()


def pgm_halton(settings, mask_token_id):
    return HaltonScheduler(
        mask_token_id,
        softmax_temperature=(1 / settings["sm_temp_min"], 1 / settings["sm_temp_max"]),
        temperature_warmup_steps=settings["temp_warmup"],
        top_k=1,
    )


@pytest.mark.parametrize("case", ["sample_halton", "sample_confidence"])
def test_pgm_trajectory_is_the_published_one(case, monkeypatch):
    settings, golden, transformer = pgm_case(case)
    mask = transformer.config.codebook_size
    if case == "sample_halton":
        scheduler = pgm_halton(settings, mask)
    else:
        choice_temperature, factor = settings["r_temp"], settings["sm_temp"]
        scheduler = ConfidenceScheduler(
            mask,
            **PGM | {"choice_temperature": choice_temperature},
            softmax_temperature=(1 / factor, 1 / factor),
            top_k=1,
        )
        noise = iter(golden["in.gumbel"])
        monkeypatch.setattr(scheduling_confidence, "gumbel_noise", lambda *_: next(noise))
    trajectory = sample_through_pipeline(
        transformer,
        scheduler,
        golden["in.labels"],
        guidance_scale=1 + settings["w"],
        guidance_schedule="linear",
        num_inference_steps=settings["step"],
    )
    assert torch.equal(trajectory[-1], golden["out.codes_corrected"])


def test_pgm_draws_from_the_published_distributions(monkeypatch):
    """Guidance, temperatures and warm-up of each step; also with the lengths that forget the registers, as published."""
    for variant, config in (("corrected", {}), ("published", {"published_lengths": True})):
        settings, golden, transformer = pgm_case("sample_halton", **config)
        scheduler = pgm_halton(settings, transformer.config.codebook_size)
        scheduler.set_timesteps(settings["step"])
        sample = torch.full_like(golden["out.codes_published"], transformer.config.codebook_size)
        shaped = []
        monkeypatch.setattr(
            scheduling_halton, "draw_tokens", lambda logits, *_: (shaped.append(logits), logits.argmax(-1))[1]
        )
        known_positions = torch.empty(len(sample), 0, dtype=torch.long)  # in the order in which they became known
        for step, timestep in enumerate(scheduler.timesteps):
            positions = scheduler.positions_to_predict(timestep, sample)
            w = settings["w"] * step / (settings["step"] - 1)
            with torch.no_grad():
                conditional, unconditional = (
                    transformer(sample, labels, positions, known_positions=known_positions).logits
                    for labels in (golden["in.labels"], torch.full_like(golden["in.labels"], 10))
                )
            logits = (1 + w) * conditional - w * unconditional
            sample = scheduler.step(logits, timestep, sample, positions=positions).prev_sample
            known_positions = torch.cat([known_positions, positions], dim=1)
        assert torch.equal(sample, golden[f"out.codes_{variant}"])
        probabilities = torch.cat(shaped, dim=1).softmax(-1)
        expected = golden[f"out.probs_{variant}"]
        assert torch.allclose(probabilities, expected[..., : transformer.config.codebook_size], atol=2e-4)
        assert (expected[..., transformer.config.codebook_size :] == 0).all()


def test_docs_name_what_exists():
    """Every scheduler, preset and file that the page for newcomers from other projects tells them to use."""
    docs = GOLDEN.parent.parent / "docs"
    text = (docs / "coming_from.md").read_text()
    calls = re.findall(r"`((?:Halton|Confidence|SelfGuided)Scheduler)\(([^)]*)\)`", text)
    assert len(calls) >= 3
    for name, arguments in calls:
        cls = {cls.__name__: cls for cls in (HaltonScheduler, ConfidenceScheduler, SelfGuidedScheduler)}[name]
        cls(mask_token_id=2, **eval(f"dict({arguments})"))
    for preset in re.findall(r"(?<=--preset )[\w-]*\d[\w-]*", text):
        assert preset in preset_names()
    for file in re.findall(r"`(?:python )?((?:configs|scripts|training|evaluations|tests)/[\w/]+\.(?:py|yaml))", text):
        is_theirs = file in ("training/ft_maskgit_org_toast.py",)
        assert is_theirs or (docs.parent / file).exists(), file
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert anchor in anchors, anchor
