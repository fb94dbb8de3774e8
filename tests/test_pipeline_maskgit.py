import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler, DDIMScheduler
from PIL import Image

from maskgit import ConfidenceScheduler, HaltonScheduler, MaskGitDiTTransformer2DModel, MaskGitPipeline


K = MASK = 32


def load(folder, **kwargs) -> MaskGitPipeline:
    pipe = MaskGitPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load(tiny_pipeline_dir)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def tokens(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **{"generator": seeded(0)} | kwargs).images


def record_batches(pipe):
    """The list that will hold the batch size of every pass of the transformer."""
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    return batches


# Class labels


@pytest.mark.parametrize(
    "class_labels, expected",
    [
        (3, [3]),
        ("dress", [3]),
        (" Ankle Boot ", [9]),
        ("top", [0]),
        ("T-shirt", [0]),
        ("t-shirt, top", [0]),
        ([1, "bag", 1], [1, 8, 1]),
        ((0, 9), [0, 9]),
        (range(3, 6), [3, 4, 5]),
        (np.int64(3), [3]),
        ([np.int32(3), torch.tensor(4), np.str_("bag")], [3, 4, 8]),
        (np.array([3, 4]), [3, 4]),
        (torch.tensor([3, 4]), [3, 4]),
        (torch.tensor(3), [3]),
    ],
)
def test_class_labels(pipe, class_labels, expected):
    ids = pipe.get_label_ids(class_labels)
    assert ids == expected and {type(label) for label in ids} == {int}
    assert torch.equal(tokens(pipe, class_labels), tokens(pipe, expected))


@pytest.mark.parametrize(
    "class_labels, message",
    [
        (10, "no class 10.*0 to 9"),
        (-1, "no class -1"),
        ([], "empty"),
        ([0, 10], "no class 10"),
        ("trousers", "Unknown class name 'trousers'. Did you mean 'trouser'"),
        ("giraffe", "Unknown class name 'giraffe'"),
        ("", "Unknown class name"),
        (True, "id .int. or a name"),
        (1.0, "id .int. or a name"),
        (None, "id .int. or a name"),
        ([[1, 2]], "id .int. or a name"),
        (torch.tensor([1.0]), "id .int. or a name"),
    ],
)
def test_wrong_class_labels(pipe, class_labels, message):
    batches = record_batches(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(class_labels)
    assert not batches


def test_class_names_that_are_ambiguous_or_missing(pipe):
    other = MaskGitPipeline(pipe.transformer, pipe.vqvae, pipe.scheduler, id2label={1: "crane, bird", 2: "crane"})
    assert other.get_label_ids("bird") == [1]
    with pytest.raises(ValueError, match=r"several classes.*\[1, 2\]"):
        other.get_label_ids("crane")
    nameless = MaskGitPipeline(pipe.transformer, pipe.vqvae, pipe.scheduler)
    with pytest.raises(ValueError, match="no class names"):
        nameless.get_label_ids("crane")


def test_images_of_a_label_follow_each_other(pipe):
    seeds = range(6)
    expected = tokens(pipe, [1, 1, 1, 2, 2, 2], generator=seeded(*seeds))
    assert torch.equal(tokens(pipe, [1, 2], num_images_per_label=3, generator=seeded(*seeds)), expected)
    assert not torch.equal(tokens(pipe, [1, 2] * 3, generator=seeded(*seeds)), expected)


# Guidance


def tokens_of_two_passes(pipe, labels, scales, generator):
    """What the pipeline should give, written down plainly: all logits, two separate passes, the scale of each step."""
    scheduler = HaltonScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(len(scales))
    labels = torch.tensor(labels)
    sample = torch.full((len(labels), 8, 8), MASK)
    for timestep, scale in zip(scheduler.timesteps, scales):
        with torch.no_grad():
            conditional = pipe.transformer(sample, labels).logits
            unconditional = pipe.transformer(sample, torch.full_like(labels, 10)).logits
        logits = unconditional + scale * (conditional - unconditional)
        sample = scheduler.step(logits, timestep, sample, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize(
    "arguments, scales",
    [
        ({}, [3.0] * 4),
        ({"guidance_schedule": "linear"}, [1 + 2 * i / 3 for i in range(4)]),
        ({"guidance_schedule": "cosine"}, [1 + 1 - math.cos(math.pi * i / 3) for i in range(4)]),
        ({"guidance_interval": (0.25, 0.75)}, [1.0, 3.0, 3.0, 1.0]),
        ({"guidance_interval": (0.5, 1.0), "guidance_schedule": "linear"}, [1.0, 1.0, 1 + 4 / 3, 3.0]),
        ({"guidance_scale": 0.0}, [0.0] * 4),
        ({"num_inference_steps": 1, "guidance_schedule": "linear"}, [3.0]),
    ],
)
def test_guidance(pipe, arguments, scales):
    arguments = {"guidance_scale": 3.0, "num_inference_steps": 4} | arguments
    expected = tokens_of_two_passes(pipe, [1, 5, 7], scales, seeded(0))
    batches = record_batches(pipe)
    assert torch.equal(tokens(pipe, [1, 5, 7], **arguments), expected)
    # No unconditional half where it would change nothing.
    assert batches == [3 if scale == 1 else 6 for scale in scales]
    assert not torch.equal(tokens(pipe, [1, 5, 7], **arguments | {"guidance_scale": 1.0}), expected)


def test_model_without_null_class(tiny_pipeline_dir):
    pipe = load(tiny_pipeline_dir)
    config = dict(pipe.transformer.config) | {"has_null_class": False}
    pipe = MaskGitPipeline(MaskGitDiTTransformer2DModel.from_config(config), pipe.vqvae, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    assert tokens(pipe, 1, num_inference_steps=2).max() < K
    with pytest.raises(ValueError, match="no class"):
        pipe(1, guidance_scale=2.0)


# Tokens


@pytest.mark.parametrize("cls", [HaltonScheduler, ConfidenceScheduler, AmusedScheduler])
def test_given_tokens_are_kept(pipe, cls):
    pipe.scheduler = cls(mask_token_id=MASK)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randint(0, K, (3, 8, 8), generator=generator)
    known = torch.rand(3, 8, 8, generator=generator) < torch.tensor([0.0, 0.3, 0.9])[:, None, None]
    latents[~known] = MASK
    copy = latents.clone()
    images = tokens(pipe, [1, 2, 3], latents=latents, num_inference_steps=5)
    assert torch.equal(images[known], latents[known]) and images.max() < K
    assert torch.equal(latents, copy)
    assert torch.equal(tokens(pipe, [1, 2, 3], latents=latents.int(), num_inference_steps=5), images)


@pytest.mark.parametrize("cls", [HaltonScheduler, ConfidenceScheduler])
def test_transformer_does_not_run_when_nothing_is_left(pipe, cls):
    pipe.scheduler = cls(mask_token_id=MASK)
    latents = torch.randint(0, K, (2, 8, 8), generator=seeded(0))
    batches = record_batches(pipe)
    assert torch.equal(tokens(pipe, [1, 2], latents=latents), latents)
    assert not batches
    latents[0, 0, :3] = MASK
    assert tokens(pipe, [1, 2], latents=latents, num_inference_steps=50).max() < K
    assert len(batches) == 3 or cls is ConfidenceScheduler


@pytest.mark.parametrize("cls", [HaltonScheduler, ConfidenceScheduler, AmusedScheduler])
def test_more_steps_than_tokens(pipe, cls):
    pipe.scheduler = cls(mask_token_id=MASK)
    batches = record_batches(pipe)
    assert tokens(pipe, 1, num_inference_steps=70, guidance_scale=1.0).max() < K
    assert len(batches) == (64 if cls is HaltonScheduler else 70)


@pytest.mark.parametrize("cls, masking_schedule", [(HaltonScheduler, "root"), (ConfidenceScheduler, "cosine")])
def test_image_depends_on_its_own_generator_only(pipe, cls, masking_schedule):
    pipe.scheduler = cls(mask_token_id=MASK, masking_schedule=masking_schedule)
    labels = [1, 2, 3, 1]
    latents = torch.randint(0, K, (4, 8, 8), generator=seeded(0))
    latents[0] = latents[3] = MASK
    latents[1].view(-1)[::3] = MASK
    latents[2, 3, 3:6] = MASK

    def images(*rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return tokens(
            pipe,
            [labels[row] for row in rows],
            latents=latents[list(rows)],
            num_inference_steps=20,
            generator=generators,
        )

    batch = images(0, 1, 2, 3)
    assert not torch.equal(batch[0], batch[3])
    for rows in ((0,), (1,), (2,), (3, 2, 1)):
        assert torch.equal(images(*rows), batch[list(rows)]), rows


def test_seed_repeats(pipe):
    first = tokens(pipe, [1, 2])
    assert torch.equal(tokens(pipe, [1, 2]), first)
    assert not torch.equal(tokens(pipe, [1, 2], generator=seeded(1)), first)
    assert not torch.equal(first[0], tokens(pipe, [1, 1])[1])


def test_rectangular_grid(pipe):
    transformer = MaskGitDiTTransformer2DModel.from_config(dict(pipe.transformer.config) | {"sample_size": (4, 6)})
    pipe = MaskGitPipeline(transformer, pipe.vqvae, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    for cls in (HaltonScheduler, ConfidenceScheduler, AmusedScheduler):
        pipe.scheduler = cls(mask_token_id=MASK)
        assert pipe([1, 2], num_inference_steps=3, output_type="pt").images.shape == (2, 3, 8, 12)


# Output


def test_output_types(pipe):
    images = {
        output_type: pipe([1, 2], generator=seeded(0), output_type=output_type).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    assert images["latent"].shape == (2, 8, 8) and images["latent"].dtype == torch.long
    assert images["pt"].shape == (2, 3, 16, 16) and 0 <= images["pt"].min() < images["pt"].max() <= 1
    np.testing.assert_allclose(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images["pil"])
    np.testing.assert_allclose(np.stack(images["pil"]) / 255, images["np"], atol=0.5 / 255 + 1e-6)
    with torch.no_grad():
        decoded = pipe.decode_latents(images["latent"])
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images["pt"])

    default = pipe([1, 2], generator=seeded(0))
    assert default.images == images["pil"]
    (images,) = pipe([1, 2], generator=seeded(0), return_dict=False)
    assert images == default.images


def test_callback(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), int((tensors["latents"] == MASK).sum())))
        if step == 1:
            tensors["latents"] = torch.where(tensors["latents"] == MASK, MASK, 7)
        return tensors

    images = tokens(pipe, 1, num_inference_steps=4, callback_on_step_end=callback)
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert [entry[2] for entry in seen] == sorted((entry[2] for entry in seen), reverse=True) and seen[-1][2] == 0
    assert (images == 7).sum() >= 64 - seen[1][2]

    steps = []
    tokens(
        pipe,
        1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: steps.append(step) or tensors,
        callback_on_step_end_tensor_inputs=[],
    )
    assert steps == [0, 1, 2]


# Settings


def test_call_defaults_of_the_checkpoint(pipe):
    batches = record_batches(pipe)
    tokens(pipe, [1, 2])
    assert batches == [4, 4, 4]
    batches.clear()
    tokens(pipe, [1, 2], guidance_scale=1.0, num_inference_steps=np.int64(5))
    assert batches == [2] * 5

    parts = (pipe.transformer, pipe.vqvae, pipe.scheduler)
    other = MaskGitPipeline(*parts, call_defaults={"guidance_schedule": "linear", "guidance_scale": 4.0})
    other.set_progress_bar_config(disable=True)
    batches.clear()
    tokens(other, 1)
    assert batches == [1] + [2] * 31
    with pytest.raises(ValueError, match="guidance_weight"):
        MaskGitPipeline(*parts, call_defaults={"guidance_weight": 1.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": -0.5}, "guidance_scale.*-0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": "3"}, "guidance_scale.*'3'"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_schedule": "quadratic"}, "quadratic.*constant, linear, cosine"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"guidance_interval": (0.5,)}, "guidance_interval"),
        ({"guidance_interval": None}, "guidance_interval"),
        ({"generator": [1]}, "torch.Generator"),
        ({"latents": np.zeros((1, 8, 8), dtype=np.int64)}, "torch.Tensor"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 4.0}, "num_inference_steps.*4.0"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"num_images_per_label": 1.5}, "num_images_per_label"),
        ({"generator": [torch.Generator()]}, "list of 1, but 2 images"),
        ({"latents": torch.zeros(1, 8, 8, dtype=torch.long)}, r"\(2, 8, 8\)"),
        ({"latents": torch.zeros(2, 64, dtype=torch.long)}, r"\(2, 8, 8\)"),
        ({"latents": torch.zeros(2, 8, 8)}, "float32.*integer"),
        ({"latents": torch.full((2, 8, 8), 33)}, "33.*32 is a masked token"),
        ({"latents": torch.full((2, 8, 8), -1)}, "-1"),
        ({"output_type": "jpeg"}, "jpeg"),
        ({"callback_on_step_end_tensor_inputs": ["logits"]}, "logits"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(pipe, arguments, message):
    batches = record_batches(pipe)
    with pytest.raises(ValueError, match=message):
        pipe([1, 2], **arguments)
    assert not batches and pipe.scheduler.timesteps is None


def test_parts_that_do_not_fit_are_refused(pipe):
    parts = (pipe.transformer, pipe.vqvae)
    with pytest.raises(ValueError, match="mask_token_id.*31.*32"):
        MaskGitPipeline(*parts, HaltonScheduler(mask_token_id=31))(1)
    with pytest.raises(ValueError, match="single generator"):
        MaskGitPipeline(*parts, AmusedScheduler(mask_token_id=MASK))([1, 2], generator=seeded(0, 1))


# Saving and loading


@pytest.mark.parametrize("cls", [HaltonScheduler, ConfidenceScheduler, AmusedScheduler])
def test_save_and_load(pipe, cls, tmp_path):
    # The saved arccos is unknown to the stock scheduler.
    schedule = {"masking_schedule": "cosine"} if cls is AmusedScheduler else {}
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **schedule)
    expected = pipe([1, "bag"], generator=seeded(0), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.scheduler) is cls
    assert loaded.id2label == pipe.id2label and loaded.config.call_defaults == pipe.config.call_defaults
    assert torch.equal(loaded([1, "bag"], generator=seeded(0), output_type="pt").images, expected)
    # And back, from what was loaded.
    loaded.scheduler = HaltonScheduler.from_config(loaded.scheduler.config)
    loaded.save_pretrained(tmp_path / "again")
    assert type(load(tmp_path / "again").scheduler) is HaltonScheduler


def test_saved_folder_loads_without_this_package(pipe, tmp_path):
    """As published: the class files beside the weights, and schedulers that users can switch."""
    for name, cls in (("halton", HaltonScheduler), ("amused", AmusedScheduler)):
        pipe.scheduler = cls(mask_token_id=MASK)
        pipe.save_pretrained(tmp_path / name)
        np.save(tmp_path / f"{name}.npy", tokens(pipe, [1, "bag"]).numpy())
    pipe.scheduler = ConfidenceScheduler(mask_token_id=MASK)
    np.save(tmp_path / "confidence.npy", tokens(pipe, [1, "bag"]).numpy())
    script = """
import sys
sys.modules["maskgit"] = None
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import get_class_from_dynamic_module

def check(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe([1, "bag"], generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert (tokens.numpy() == np.load(f"{name}.npy")).all(), name

pipe = DiffusionPipeline.from_pretrained("halton", trust_remote_code=True)
check(pipe, "halton")
pipe.save_pretrained("again")
check(DiffusionPipeline.from_pretrained("again", trust_remote_code=True), "halton")
confidence = get_class_from_dynamic_module(
    "halton", "scheduling_confidence.py", subfolder="scheduler", class_name="ConfidenceScheduler", trust_remote_code=True
)
pipe.scheduler = confidence(mask_token_id=32)
check(pipe, "confidence")
check(DiffusionPipeline.from_pretrained("amused", trust_remote_code=True), "amused")
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_pipeline_without_tokenizer(pipe, tmp_path):
    expected = tokens(pipe, [1, 2])
    pipe.save_pretrained(tmp_path / "whole")
    bare = MaskGitPipeline(pipe.transformer, None, pipe.scheduler)
    bare.set_progress_bar_config(disable=True)
    bare.save_pretrained(tmp_path / "bare")
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
    for other in (bare, load(tmp_path / "bare"), load(tmp_path / "whole", vqvae=None)):
        assert torch.equal(tokens(other, [1, 2], **arguments), expected)
        with pytest.raises(ValueError, match="output_type='latent'"):
            other(1)


def test_from_pipe(pipe):
    expected = tokens(pipe, [1, "bag"])
    other = MaskGitPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer and other.vqvae is pipe.vqvae
    assert torch.equal(tokens(other, [1, "bag"]), expected)
    other = MaskGitPipeline.from_pipe(pipe, scheduler=ConfidenceScheduler(mask_token_id=MASK))
    assert type(other.scheduler) is ConfidenceScheduler and type(pipe.scheduler) is HaltonScheduler


# Precision, devices and compilation


def test_precisions_of_the_parts(tiny_pipeline_dir):
    pipe = load(tiny_pipeline_dir, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vqvae.dtype == torch.float32
    images = pipe([1, 2], output_type="pt").images
    assert images.dtype == torch.float32 and images.isfinite().all()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pipe.to("cpu", dtype)
        assert pipe.dtype == pipe.transformer.dtype == pipe.vqvae.dtype == dtype
        for cls in (HaltonScheduler, ConfidenceScheduler, AmusedScheduler):
            pipe.scheduler = cls(mask_token_id=MASK)
            assert pipe([1, 2], output_type="np").images.shape == (2, 16, 16, 3)


def test_offloading_and_device_maps(tiny_pipeline_dir):
    expected = tokens(load(tiny_pipeline_dir), [1, 2])
    pipe = load(tiny_pipeline_dir)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tokens(pipe, [1, 2]), expected)
    pipe([1, 2])
    pipe = load(tiny_pipeline_dir, device_map="cpu")
    assert torch.equal(tokens(pipe, [1, 2]), expected)
    transformer = MaskGitDiTTransformer2DModel.from_pretrained(
        tiny_pipeline_dir, subfolder="transformer", device_map="auto"
    )
    assert torch.equal(tokens(load(tiny_pipeline_dir, transformer=transformer), [1, 2]), expected)


def test_compiled_transformer(pipe, tmp_path):
    expected = tokens(pipe, [1, 2])
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    assert torch.equal(tokens(pipe, [1, 2]), expected)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(tokens(load(tmp_path), [1, 2]), expected)


def test_a_scheduler_of_another_kind_is_refused(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler does not sample masked tokens.*HaltonScheduler"):
        pipe(1)


def test_classes_are_listed_when_no_name_is_near(pipe):
    with pytest.raises(ValueError, match="'xylophone'. The classes are .*ankle boot"):
        pipe("xylophone")
