import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from PIL import Image
from safetensors.torch import load_file

from maskgit import (
    ConfidenceScheduler,
    HaltonScheduler,
    MaskGitDiTTransformer2DModel,
    MaskGitInpaintPipeline,
    MaskGitPipeline,
    SelfGuidedScheduler,
    ToastAdapter,
)
from maskgit.pipelines import pipeline_maskgit, pipeline_maskgit_inpaint
from maskgit.pipelines.pipeline_maskgit_inpaint import blurred_token_mask, box_token_mask


GOLDEN = Path(__file__).parent / "golden" / "maskgit_google"
SCHEDULERS = [HaltonScheduler, ConfidenceScheduler, SelfGuidedScheduler, AmusedScheduler]
K = MASK = 32


def load(folder, cls=MaskGitInpaintPipeline, **kwargs):
    pipe = cls.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load(tiny_pipeline_dir)


@pytest.fixture(scope="module")
def array():
    """A picture of the tiny model's size with a little of everything, uint8 (16, 16, 3)."""
    return np.random.RandomState(0).randint(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


@pytest.fixture(scope="module")
def image(array):
    return Image.fromarray(array)


def white(rows, columns, size=(16, 16)):
    """A black mask with a white box."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[rows, columns] = 255
    return Image.fromarray(mask)


BOX = white(slice(4, 9), slice(6, 10))  # cells 2 to 4 and 3 to 4


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def tokens(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **{"generator": seeded(0)} | kwargs).images


def record_inputs(pipe):
    """The list that will hold the tokens of every pass of the transformer."""
    inputs = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    return inputs


# Golden data: the published editing in a box


def test_box_masks_of_the_published_code():
    golden = load_file(GOLDEN / "edit_bbox.safetensors")
    notes = json.loads((GOLDEN / "edit_bbox.json").read_text())["notes"]
    ids = [1024 + int(golden["in.label"]), *golden["in.image_tokens"].flatten().tolist()]
    for i, box in enumerate(golden["in.boxes"].tolist()):
        mask = box_token_mask(*box, grid_size=notes["image_size"] // 16)
        assert torch.equal(mask, golden["out.latent_mask"][i].bool())
        first, end, left, right = notes["token_rows_cols"][i]
        assert mask.sum() == mask[first:end, left:right].sum() == (end - first) * (right - left)
        expected = [2024 if masked else token for token, masked in zip(ids, [False, *mask.flatten().tolist()])]
        assert golden["out.input_ids"][i].tolist() == expected
        weights = blurred_token_mask(mask)
        assert torch.equal((255 * weights).round().to(torch.uint8), golden["out.composite_mask_uint8"][i])
    assert blurred_token_mask(torch.ones(32, 32, dtype=torch.bool)).min() == 1.0  # 512 pixels


def test_box_masks_reach_the_transformer():
    """A mask of the token grid's size is taken as it is."""
    golden = load_file(GOLDEN / "edit_bbox.safetensors")
    transformer = MaskGitDiTTransformer2DModel(1024, 1000, 16, hidden_size=8, num_layers=1, num_attention_heads=1)
    pipe = MaskGitInpaintPipeline(transformer, None, HaltonScheduler(mask_token_id=1024))
    pipe.set_progress_bar_config(disable=True)
    inputs = record_inputs(pipe)
    masks = [box_token_mask(*box, grid_size=16) for box in golden["in.boxes"].tolist()]
    latents = golden["in.image_tokens"].expand(4, 16, 16)
    tokens(
        pipe, np.zeros((256, 256, 3), np.uint8), masks, int(golden["in.label"]), latents=latents, num_inference_steps=2
    )
    expected = golden["out.input_ids"][:, 1:].masked_fill(golden["out.latent_mask"].flatten(1).bool(), 1024)
    assert torch.equal(inputs[0].flatten(1), expected)


# What is painted


@pytest.mark.parametrize(
    "rows, columns, size, cells",
    [
        (slice(4, 9), slice(6, 10), (16, 16), (slice(2, 5), slice(3, 5))),
        (5, 11, (16, 16), (2, 5)),  # a single pixel
        (slice(None), slice(None), (16, 16), (slice(None), slice(None))),
        (0, 0, (16, 16), (0, 0)),
        (15, 15, (16, 16), (7, 7)),
        (67, slice(None), (160, 160), (3, slice(None))),  # a line that shrinking would lose
        (
            slice(0, 3),
            slice(0, 3),
            (20, 20),
            (slice(0, 2), slice(0, 2)),
        ),  # 2.5 pixels a cell: pixel 2 is in two of them
        (slice(5, 10), slice(1, 2), (40, 16), (slice(1, 2), slice(0, 1))),
        (3, 4, (8, 8), (3, 4)),
    ],
)
def test_tokens_with_any_pixel_in_the_mask_are_painted(pipe, rows, columns, size, cells):
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[0][cells] = True
    images, token_mask = pipe.prepare_inputs(Image.new("RGB", size[::-1]), white(rows, columns, size))
    assert torch.equal(token_mask, expected)
    assert images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "mask_dilation, cells", [(0, (2, 5)), (1, (slice(1, 4), slice(4, 7))), (3, (slice(0, 6), slice(2, 8)))]
)
def test_mask_dilation(pipe, image, mask_dilation, cells):
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[0][cells] = True
    assert torch.equal(pipe.prepare_inputs(image, white(4, 10), mask_dilation)[1], expected)
    inputs = record_inputs(pipe)
    tokens(pipe, image, white(4, 10), 1, mask_dilation=mask_dilation)
    assert torch.equal(inputs[0] == MASK, expected.repeat(2, 1, 1))  # twice, for the guidance


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_known_tokens_are_kept(pipe, image, cls):
    pipe.scheduler = cls(mask_token_id=MASK)
    images, painted = pipe.prepare_inputs(image, BOX)
    with torch.no_grad():  # codes that are near the picture, so that its tokens differ
        vectors = pipe.vqvae.encode(images).latents[0].flatten(1).T
        pipe.vqvae.quantize.embedding.weight.copy_(vectors[torch.randperm(64, generator=seeded(0))[:K]])
    known = pipe.encode_images(images)
    assert known.unique().numel() > 10
    inputs = record_inputs(pipe)
    result = tokens(pipe, image, BOX, 1, num_inference_steps=4)
    assert torch.equal(inputs[0][:1], known.masked_fill(painted, MASK))
    assert torch.equal(result[~painted], known[~painted])
    assert result.max() < K
    assert not torch.equal(result, tokens(pipe, image, BOX, 1, num_inference_steps=4, generator=seeded(1)))


def test_steps_share_the_masked_tokens_with_the_stock_scheduler_too(pipe, image):
    pipe.scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule="linear")
    masked = []

    def callback(pipe, step, timestep, tensors):
        masked.append(int((tensors["latents"] == MASK).sum()))
        return tensors

    tokens(pipe, image, white(slice(0, 16), slice(0, 4)), 1, num_inference_steps=4, callback_on_step_end=callback)
    assert masked == [12, 8, 4, 0]


@pytest.mark.parametrize("cls", [HaltonScheduler, AmusedScheduler])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0, "num_inference_steps": 5},
        {
            "guidance_scale": 3.0,
            "guidance_schedule": "linear",
            "guidance_interval": (0.25, 0.75),
            "num_inference_steps": 8,
        },
        {"self_guidance_scale": 1.0, "guidance_scale": 2.0},
        {"num_images_per_label": 2, "generator": "list"},
    ],
)
def test_a_full_mask_is_plain_generation(pipe, tiny_pipeline_dir, image, cls, arguments):
    arguments = dict(arguments)
    if arguments.pop("generator", None):
        if cls is AmusedScheduler:
            pytest.skip("takes a single generator")
        seeds = range(4)
    else:
        seeds = [0]
    plain = load(tiny_pipeline_dir, MaskGitPipeline)
    toast = ToastAdapter(32, 2, 10, anchor_factor=4).eval()
    for parameter in toast.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded(0))
    for each in (plain, pipe):
        each.register_modules(scheduler=cls(mask_token_id=MASK), toast=toast)
    expected = plain([1, "bag"], generator=seeded(*seeds), output_type="pt", **arguments).images
    full = Image.new("1", (16, 16), 1)
    assert torch.equal(
        pipe(image, full, [1, "bag"], generator=seeded(*seeds), output_type="pt", **arguments).images, expected
    )


def test_composite(pipe, image, array):
    arguments = {"generator": seeded(0), "output_type": "np"}
    decoded = pipe(image, BOX, 1, composite=False, **arguments).images[0]
    arguments["generator"] = seeded(0)
    result = pipe(image, BOX, 1, **arguments).images[0]
    # Rows 4 to 9 and columns 6 to 9 are painted, and two pixels more to all sides are a blend.
    assert np.array_equal(result[4:10, 6:10], decoded[4:10, 6:10])
    original = array / np.float32(255)
    outside = np.ones((16, 16), dtype=bool)
    outside[2:12, 4:12] = False
    np.testing.assert_allclose(result[outside], original[outside], atol=1e-6)
    assert np.abs(decoded - original)[outside].max() > 0.1  # the tokenizer alone would have changed it
    np.testing.assert_allclose(result[6, 10], (2 * decoded[6, 10] + original[6, 10]) / 3, atol=1e-6)
    np.testing.assert_allclose(result[6, 11], (decoded[6, 11] + 2 * original[6, 11]) / 3, atol=1e-6)
    # To the bit as a picture.
    picture = np.asarray(pipe(image, BOX, 1, generator=seeded(0)).images[0])
    assert np.array_equal(picture[outside], array[outside])


def test_given_tokens_stand_in_for_the_image(pipe, image):
    latents = torch.randint(0, K, (2, 8, 8), generator=seeded(0))
    latents[1, 7] = MASK
    copy = latents.clone()
    pipe.vqvae.encoder.register_forward_pre_hook(lambda module, args: pytest.fail("encoded"))
    _, painted = pipe.prepare_inputs(image, BOX)
    inputs = record_inputs(pipe)
    result = pipe(image, BOX, [1, 2], latents=latents, generator=seeded(0), output_type="pt").images
    assert torch.equal(inputs[0][:2], latents.masked_fill(painted, MASK))
    assert torch.equal(latents, copy)
    # What was masked is painted as what is under the mask, and no original comes back there.
    original = pipe(image, BOX, 1, latents=latents[:1], generator=seeded(0), output_type="pt").images[0]
    assert torch.equal(result[0, :, 12:], original[:, 12:])
    assert not torch.equal(result[1, :, 14:], original[:, 14:])


def test_rectangular_grid(pipe, image):
    transformer = MaskGitDiTTransformer2DModel.from_config(dict(pipe.transformer.config) | {"sample_size": (4, 6)})
    pipe = MaskGitInpaintPipeline(transformer, pipe.vqvae, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    inputs = record_inputs(pipe)
    result = pipe(image, white(slice(0, 4), slice(0, 1)), 1, num_inference_steps=2, output_type="pt").images
    assert result.shape == (1, 3, 8, 12)
    assert (inputs[0] == MASK).nonzero().tolist() == [[0, 0, 0]]


# Inputs


def test_every_kind_of_image(pipe, image, array):
    expected = torch.from_numpy(array).movedim(-1, 0)[None] / 127.5 - 1
    floats = torch.from_numpy(array).movedim(-1, 0) / 255
    for given in (
        image,
        [image],
        (image,),
        image.convert("RGBA"),
        array,
        array[None],
        np.concatenate([array, array[..., :1]], -1),
        array / 255,
        floats,
        floats[None],
        [floats.double()],
        2 * floats - 1,
        torch.cat([floats, torch.rand(1, 16, 16)]),
        torch.from_numpy(array).movedim(-1, 0),
        array[:, ::-1][:, ::-1],
    ):
        torch.testing.assert_close(pipe.prepare_inputs(given, BOX)[0], expected)
    grey = np.array(image.convert("L"))
    expected = (torch.from_numpy(grey) / 127.5 - 1).expand(1, 3, 16, 16)
    for given in (
        Image.fromarray(grey),
        grey,
        grey[..., None],
        grey / 255,
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
    ):
        torch.testing.assert_close(pipe.prepare_inputs(given, BOX)[0], expected)
    black_and_white = image.convert("1")
    expected = (torch.from_numpy(np.array(black_and_white)) * 2.0 - 1).expand(1, 3, 16, 16)
    for given in (black_and_white, np.array(black_and_white), torch.from_numpy(np.array(black_and_white))):
        torch.testing.assert_close(pipe.prepare_inputs(given, BOX)[0], expected)
    torch.testing.assert_close(
        pipe.prepare_inputs(image.convert("P"), BOX)[0], pipe.prepare_inputs(image.convert("P").convert("RGB"), BOX)[0]
    )
    assert len(pipe.prepare_inputs([image, array, floats], BOX)[0]) == 3
    assert len(pipe.prepare_inputs([array, np.stack([array, array])], BOX)[0]) == 3


def test_every_kind_of_mask(pipe, image):
    _, expected = pipe.prepare_inputs(image, BOX)
    array = np.array(BOX)
    ones = torch.from_numpy(array) / 255
    for given in (
        BOX,
        [BOX],
        BOX.convert("1"),
        BOX.convert("RGB"),
        BOX.convert("RGBA"),
        array,
        array[..., None],
        array[None],
        array[None, ..., None],
        array > 0,
        (array > 0).astype(np.uint8),
        (array > 0).astype(np.int64),
        array / 255,
        array // 2 + 30,  # greys: 157 and 30
        ones,
        ones[None],
        ones[None, None],
        ones > 0.5,
        expected,
        expected[0].numpy(),
    ):
        assert torch.equal(pipe.prepare_inputs(image, given)[1], expected)
    several = np.stack([array, array.T])
    for given in (
        several,
        several[..., None],
        torch.from_numpy(several),
        torch.from_numpy(several)[:, None],
        list(several),
    ):
        assert torch.equal(pipe.prepare_inputs(image, given)[1], torch.cat([expected, expected.mT]))
    for given in (np.stack([array] * 3, axis=-1), torch.from_numpy(np.stack([array] * 3))):
        with pytest.raises(ValueError, match="a mask in colour or several masks"):
            pipe.prepare_inputs(image, given)


def test_images_of_another_size_are_resized(pipe, array):
    large = np.kron(array, np.ones((3, 2, 1), dtype=np.uint8))
    images, token_mask = pipe.prepare_inputs(Image.fromarray(large), white(slice(12, 27), slice(12, 20), (48, 32)))
    resized = Image.fromarray(large).resize((16, 16), Image.Resampling.BICUBIC)
    torch.testing.assert_close(
        images[0], torch.from_numpy(np.array(resized)).movedim(-1, 0) / 127.5 - 1, atol=2 / 127.5, rtol=0
    )
    assert torch.equal(token_mask, pipe.prepare_inputs(array, BOX)[1])
    assert pipe(large, white(5, 5, (48, 32)), 1).images[0].size == (16, 16)
    mixed, _ = pipe.prepare_inputs([large, array], [white(5, 5, (48, 32)), BOX])
    assert torch.equal(mixed[0], images[0])


def test_images_masks_and_labels_go_together(pipe, image, array):
    other = Image.fromarray(255 - array)
    mask = white(slice(0, 3), slice(None))

    def paint(*args, seeds, **kwargs):
        return pipe(*args, generator=[seeded(seed) for seed in seeds], output_type="pt", **kwargs).images

    single = [
        paint(image, BOX, 1, seeds=[0]),
        paint(other, BOX, 1, seeds=[1]),
        paint(other, mask, 2, seeds=[2]),
        paint(image, mask, 1, seeds=[3]),
    ]
    for expected, result in (
        ((0, 1), paint([image, other], BOX, 1, seeds=[0, 1])),
        ((0, 1), paint([image, other], [BOX, BOX], [1, 1], seeds=[0, 1])),
        ((0, 2), paint([image, other], [BOX, mask], [1, 2], seeds=[0, 2])),
        ((0, 3), paint(image, [BOX, mask], 1, seeds=[0, 3])),
    ):
        torch.testing.assert_close(result, torch.cat([single[i] for i in expected]))
    batch = paint([image, other], BOX, [1, 2], seeds=range(4), num_images_per_label=2)
    each = [paint(image, BOX, 1, seeds=[i]) for i in (0, 1)] + [paint(other, BOX, 2, seeds=[i]) for i in (2, 3)]
    torch.testing.assert_close(batch, torch.cat(each))


# Wrong inputs


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask_image": Image.new("L", (16, 16))}, "nothing to paint in image 0.*black.*white is what is painted"),
        ({"mask_image": [BOX, Image.new("L", (16, 16), 127)]}, "nothing to paint in image 1"),
        (
            {"mask_image": white(0, 0, (16, 8))},
            "16 x 8 .height x width.*image's size, 16 x 16, or .*each of the 8 x 8 tokens",
        ),
        ({"mask_image": "mask.png"}, "`mask_image` is of type str.*load_image"),
        ({"mask_image": None}, "`mask_image` is of type NoneType"),
        ({"mask_image": []}, "`mask_image` is empty"),
        ({"mask_image": np.zeros((16, 16, 3), np.uint8)}, r"`mask_image`"),
        ({"mask_image": torch.zeros(1, 3, 16, 16)}, r"shape \(1, 3, 16, 16\).*one channel"),
        (
            {"mask_image": np.full((16, 16), 255.0)},
            "`mask_image` has values from 255 to 255, .*floats must be in .0, 1.",
        ),
        ({"mask_image": -torch.ones(16, 16)}, "`mask_image` has values from -1"),
        ({"mask_image": np.full((16, 16), np.nan)}, "`mask_image` has values from nan"),
        ({"mask_image": np.full((16, 16), 256)}, "`mask_image` has values from 256"),
        ({"image": "photo.png"}, "`image` is of type str.*load_image"),
        ({"image": []}, "`image` is empty"),
        ({"image": np.zeros((0, 16, 3))}, r"shape \(0, 16, 3\)"),
        ({"image": np.zeros(16)}, r"shape \(16,\)"),
        ({"image": np.zeros((16, 16, 2))}, r"shape \(16, 16, 2\).*\(height, width, channels\) with 1, 3 or 4"),
        ({"image": torch.zeros(16, 16, 3)}, r"shape \(16, 16, 3\).*\(channels, height, width\)"),
        ({"image": torch.full((3, 16, 16), 255.0)}, "`image` has values from 255 to 255.*integers from 0 to 255"),
        ({"image": np.full((16, 16), 60000, np.uint16)}, "`image` has values from 6e.04"),
        ({"image": torch.full((3, 16, 16), -1)}, "`image` has values from -1 to -1"),
        ({"image": torch.full((3, 16, 16), math.nan)}, "`image` has values from nan"),
        ({"image": Image.new("I;16", (16, 16))}, "mode I;16: convert it to 8 bits"),
        ({"image": Image.new("F", (16, 16))}, "mode F: convert it to 8 bits"),
        ({"image": [Image.new("RGB", (16, 16))] * 3, "class_labels": [1, 2]}, "are 3, 1 and 2, but must be as many"),
        ({"class_labels": 10}, "no class 10"),
        ({"class_labels": "giraffe"}, "Unknown class name"),
        ({"mask_dilation": -1}, "mask_dilation.*-1.*at least 0"),
        ({"mask_dilation": 1.0}, "mask_dilation.*1.0"),
        ({"mask_dilation": True}, "mask_dilation.*True"),
        ({"num_images_per_label": 0}, "num_images_per_label"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"self_guidance_scale": 1.0}, "toast"),
        ({"latents": torch.zeros(2, 8, 8, dtype=torch.long)}, r"\(1, 8, 8\)"),
        ({"latents": torch.zeros(1, 8, 8, dtype=torch.long), "mask_image": np.zeros((16, 16))}, "nothing to paint"),
        ({"generator": [torch.Generator()] * 2}, "list of 2, but 1 images"),
        ({"output_type": "jpeg"}, "jpeg"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(pipe, image, arguments, message):
    inputs = record_inputs(pipe)
    pipe.vqvae.encoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": image, "mask_image": BOX, "class_labels": 1} | arguments)
    assert not inputs and pipe.scheduler.timesteps is None


def test_pipeline_without_tokenizer(pipe, image):
    bare = MaskGitInpaintPipeline(pipe.transformer, None, pipe.scheduler)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no `vqvae` to encode with: give the image's tokens as `latents`"):
        bare(image, BOX, 1, output_type="latent")
    latents = torch.zeros(1, 8, 8, dtype=torch.long)
    expected = tokens(pipe, image, BOX, 1, latents=latents, num_inference_steps=3, guidance_scale=2.0)
    assert torch.equal(
        tokens(bare, image, BOX, 1, latents=latents, num_inference_steps=3, guidance_scale=2.0), expected
    )


# Output, precision and devices


def test_output_types_and_callback(pipe, image):
    images = {
        output_type: pipe(image, BOX, 1, generator=seeded(0), output_type=output_type).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    assert images["latent"].shape == (1, 8, 8) and images["latent"].dtype == torch.long
    assert images["pt"].shape == (1, 3, 16, 16)
    np.testing.assert_allclose(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(images["pil"][0]) / 255, images["np"][0], atol=0.5 / 255 + 1e-6)
    assert pipe(image, BOX, 1, generator=seeded(0), return_dict=False)[0] == images["pil"]

    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": tensors["latents"].clamp(max=3)}

    painted = pipe.prepare_inputs(image, BOX)[1]
    result = tokens(pipe, image, BOX, 1, callback_on_step_end=callback)
    assert seen == [(0, 2), (1, 1), (2, 0)]
    assert result[painted].max() <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_pipeline_dir, image, dtype):
    pipe = load(tiny_pipeline_dir, dtype=dtype)
    known = pipe.encode_images(pipe.prepare_inputs(image, BOX)[0])
    assert pipe.vqvae.dtype == dtype
    rounded = load(tiny_pipeline_dir)
    rounded.vqvae.load_state_dict(pipe.vqvae.state_dict())
    assert torch.equal(known, rounded.encode_images(rounded.prepare_inputs(image, BOX)[0]))
    result = np.asarray(pipe(image, BOX, 1).images[0])
    assert np.array_equal(result[14:], np.asarray(image)[14:])


def test_offloading(tiny_pipeline_dir, pipe, image):
    expected = pipe(image, BOX, 1, generator=seeded(0)).images
    offloaded = load(tiny_pipeline_dir)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert offloaded(image, BOX, 1, generator=seeded(0)).images == expected


# Saving, loading, and the copied parts


def test_save_and_load(pipe, image, tmp_path):
    expected = pipe(image, BOX, "bag", generator=seeded(0)).images
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded(image, BOX, "bag", generator=seeded(0)).images == expected
    assert loaded.config.call_defaults == pipe.config.call_defaults
    plain = load(tmp_path, MaskGitPipeline)
    assert plain("bag", generator=seeded(0)).images[0].size == (16, 16)


def test_from_pipe_shares_the_models(tiny_pipeline_dir, image, pipe):
    plain = load(tiny_pipeline_dir, MaskGitPipeline)
    other = MaskGitInpaintPipeline.from_pipe(plain)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is plain.transformer and other.vqvae is plain.vqvae
    assert other(image, BOX, "bag", generator=seeded(0)).images == pipe(image, BOX, "bag", generator=seeded(0)).images
    assert MaskGitPipeline.from_pipe(other).get_label_ids("bag") == [8]


def test_saved_folder_loads_without_this_package(pipe, image, array, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "data.npz", image=array, mask=np.array(BOX), expected=tokens(pipe, image, BOX, "bag").numpy())
    script = """
import sys
sys.modules["maskgit"] = None
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
data = np.load("data.npz")
generator = torch.Generator().manual_seed(0)
tokens = pipe(data["image"], data["mask"], "bag", generator=generator, output_type="latent").images
assert (tokens.numpy() == data["expected"]).all()
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_copied_parts_agree():
    """The two pipeline files stand alone: a change to what both have belongs into both."""
    marked = [
        line.partition("# Copied from pipeline_maskgit.MaskGitPipeline.")[2]
        for line in inspect.getsource(MaskGitInpaintPipeline).splitlines()
        if "# Copied from" in line
    ]
    own = {"__call__", "prepare_inputs", "encode_images", "composite"}
    for cls in (MaskGitPipeline, MaskGitInpaintPipeline):
        methods = {name for name, value in vars(cls).items() if inspect.isroutine(value)}
        assert methods - own == set(marked), cls.__name__
    for name in marked:
        sources = [inspect.getsource(getattr(cls, name)) for cls in (MaskGitPipeline, MaskGitInpaintPipeline)]
        assert sources[0] == sources[1], (
            f"{name} differs: copy it from pipeline_maskgit.py to pipeline_maskgit_inpaint.py"
        )
    for name in (
        "model_cpu_offload_seq",
        "_exclude_from_cpu_offload",
        "_optional_components",
        "_callback_tensor_inputs",
    ):
        assert getattr(MaskGitPipeline, name) == getattr(MaskGitInpaintPipeline, name)
    for name in ("GUIDANCE_SCHEDULES", "CALL_DEFAULTS"):
        assert getattr(pipeline_maskgit, name) == getattr(pipeline_maskgit_inpaint, name)
    assert inspect.getsource(pipeline_maskgit._is_count) == inspect.getsource(pipeline_maskgit_inpaint._is_count)
    parameters = [
        list(inspect.signature(cls.__call__).parameters) for cls in (MaskGitPipeline, MaskGitInpaintPipeline)
    ]
    assert parameters[1] == ["self", "image", "mask_image", *parameters[0][1:], "mask_dilation", "composite"]
