"""The training script of the self-guidance adapter, launched as a user would, and its published numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_toast
from accelerate.state import AcceleratorState
from diffusers import VQModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from fill import state_dict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit import (
    HaltonScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
    ToastAdapter,
)
from maskgit.conversion.maskgit_google import convert_muse_transformer, split_toast
from maskgit.conversion.unlockmgm import convert_toast
from maskgit.options import load_options
from maskgit.tokenization import load_tokenizer, tokenizer_checksum


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "unlockmgm"
SCRIPT = ROOT / "training" / "train_toast.py"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write_pipeline(folder, transformer, **arguments):
    """A pipeline with a tokenizer of the transformer's codes, random."""
    tokenizer = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=transformer.config.codebook_size,
        lookup_from_codebook=True,
    )
    scheduler = HaltonScheduler(transformer.config.codebook_size)
    MaskGitPipeline(transformer, tokenizer, scheduler, **arguments).save_pretrained(folder)


def write_tokens(folder, pipeline, side, codes):
    """200 training and 24 validation images of 10 classes, whose tokens depend on the class and the place."""
    (folder / "data").mkdir(parents=True)
    names = [f"class {i}" for i in range(10)]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("uint16"), length=side**2), "label": datasets.ClassLabel(names=names)}
    )
    random = np.random.RandomState(0)
    info = {"grid_height": side, "grid_width": side, "codebook_size": codes, "tokenizer": str(pipeline), "splits": {}}
    info["tokenizer_checksum"] = tokenizer_checksum(load_tokenizer(str(pipeline)))
    for split, count in (("train", 200), ("test", 24)):
        labels = np.arange(count) % 10
        tokens = (labels[:, None] * 7 + np.arange(side**2) // 4 + random.randint(0, 2, (count, side**2))) % codes
        rows = {"tokens": tokens.tolist(), "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
        info["splits"][split] = {"num_parts": 1}
    (folder / "token_dataset.json").write_text(json.dumps(info))


def make_transformer(cls=MaskGitDiTTransformer2DModel, codes=128, side=8, **config):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "intermediate_size": 64} | config
    transformer = cls(codebook_size=codes, num_classes=10, sample_size=side, **config)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline to train an adapter for, and tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pipeline(folder / "pipeline", make_transformer(), call_defaults={"guidance_scale": 2.0})
    write_tokens(folder / "tokens", folder / "pipeline", 8, 128)
    return folder


@pytest.fixture(scope="module")
def config(inputs):
    path = inputs / "tiny.yaml"
    path.write_text(f"""
pretrained_model: {inputs / "pipeline"}
data: {inputs / "tokens"}
output_dir: unset
anchor_factor: 4
train_batch_size: 8
max_train_steps: 9
learning_rate: 1.0e-2
lr_scheduler: cosine
lr_warmup_steps: 2
ema_start_step: 2
log_every: 1
validation_steps: null
checkpointing_steps: 3
num_inference_steps: 3
""")
    return path


def make_options(config, output_dir, *overrides):
    return load_options(train_toast.ToastOptions, ["--config", str(config), f"output_dir={output_dir}", *overrides])


def run_here(config, output_dir, *overrides):
    """Train in this process; the losses by step."""
    train_toast.Trainer(make_options(config, output_dir, *overrides)).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses(output_dir)


def losses(output_dir):
    """Every loss that was logged, by step."""
    logged = {}
    for folder in {path.parent for path in Path(output_dir, "logs").rglob("events*")}:
        accumulator = EventAccumulator(str(folder)).Reload()
        if "loss" in accumulator.Tags()["scalars"]:
            for event in accumulator.Scalars("loss"):
                logged.setdefault(event.step, []).append(event.value)
    return logged


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, config):
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    return output_dir, run_here(config, output_dir)


# Published numbers


@pytest.fixture
def golden():
    """The published model in training, its batch, and what comes of it."""
    manifest = json.loads((GOLDEN / "train_tiny.json").read_text())
    base, adapter = split_toast(state_dict(manifest))
    converted = convert_muse_transformer(base, manifest["config"])
    transformer = MaskGitBertTransformer2DModel(**converted.config | {"dropout": 0.0})  # as the numbers were made
    transformer.load_state_dict(converted.state_dict)
    converted = convert_toast(adapter, manifest["config"])
    toast = ToastAdapter(**converted.config)
    toast.load_state_dict(converted.state_dict)
    numbers = load_file(GOLDEN / "train_tiny.safetensors")
    tokens = numbers["in.input_ids"][:, 1:]
    mask = tokens > 1023
    chosen = [train_toast.choose_substitutes(*pair, 0.3) for pair in zip(mask, numbers["in.uniform"], strict=True)]
    batch = {
        "input_ids": tokens.clamp(max=1023),
        "label": numbers["in.input_ids"][:, 0] - 1024,
        "mask": mask,
        "substituted": torch.stack(chosen),
        "substitutes": numbers["in.sampled_ids"],
    }
    return transformer, toast, batch, numbers


def test_published_losses_and_gradients(golden):
    transformer, toast, batch, numbers = golden
    assert torch.equal(batch["substituted"], numbers["out.substitute_mask"].bool())
    assert batch["substituted"].sum(-1).tolist() == numbers["out.num_substitute"].tolist()
    model = train_toast.TrainableToast(toast, transformer.requires_grad_(False), label_smoothing=0.1)
    correction, variational, _ = model(*batch.values())
    correction = correction / batch["substituted"].sum()
    torch.testing.assert_close(correction, numbers["out.correction_loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(0.1 * variational, numbers["out.variational_loss"][0], rtol=1e-5, atol=0)
    (correction + 0.1 * variational).backward()
    # The key map renames and flattens only, so that it takes gradients as it takes weights.
    stored = {name.removeprefix("out.grad."): tensor for name, tensor in numbers.items() if "out.grad." in name}
    expected = convert_toast(stored, {}).state_dict
    for name, parameter in toast.named_parameters():
        limit = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=limit, msg=name)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_published_steps(golden, tmp_path):
    transformer, toast, batch, numbers = golden
    write_pipeline(tmp_path / "pipeline", transformer)
    write_tokens(tmp_path / "tokens", tmp_path / "pipeline", 4, 1024)
    options = train_toast.ToastOptions(
        output_dir=str(tmp_path / "run"),
        pretrained_model=str(tmp_path / "pipeline"),
        data=str(tmp_path / "tokens"),
        anchor_factor=4,
        learning_rate=1e-3,
        max_grad_norm=None,
        report_to="none",
    )
    trainer = train_toast.Trainer(options)
    trainer.toast.load_state_dict(toast.state_dict())
    for correction, variational in numbers["out.step_losses"]:
        sums = trainer.train_step([batch])
        torch.testing.assert_close(sums["correction"], correction, rtol=1e-5, atol=0)
        torch.testing.assert_close(sums["variational"], variational, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["toast_imagenet256", "toast_imagenet512"])
def test_published_recipe(name, golden):
    numbers = golden[-1]
    options = make_options(ROOT / "configs" / f"{name}.yaml", "unused", "mixed_precision=no")
    ema = EMAModel([], decay=options.ema_decay, update_after_step=options.ema_start_step)
    decays = [ema.get_decay(int(step)) for step in numbers["in.ema_steps"]]
    assert decays == pytest.approx(numbers["out.ema_decay"].tolist(), abs=1e-12)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    schedule = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    rates = [options.learning_rate * schedule.lr_lambdas[0](int(step)) for step in numbers["in.lr_steps"]]
    assert rates == pytest.approx(numbers["out.learning_rate"].tolist(), abs=1e-15)


def test_only_the_adapter_is_trained_at_the_published_size():
    with torch.device("meta"):
        transformer = MaskGitBertTransformer2DModel().requires_grad_(False)
        model = train_toast.TrainableToast(ToastAdapter(), transformer, 0.1)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 41_793_808
    assert all(name.startswith("toast.") for name in model.state_dict())


# What is hidden and replaced


def test_substitutes_are_known_tokens_and_at_least_one():
    draws = torch.rand(64)
    for num_masked, count in ((0, 19), (63, 1), (62, 1), (64, 0), (59, 2), (49, 4)):  # 4.5 and 1.5 round to even
        mask = torch.arange(64) < num_masked
        chosen = train_toast.choose_substitutes(mask, draws, 0.3)
        assert chosen.sum() == count and not (chosen & mask).any()
        assert count == 0 or draws[chosen].max() <= draws[~mask & ~chosen].min() if count < 64 - num_masked else True


def test_corrupted_images_depend_on_seed_epoch_and_image(config, tmp_path):
    images = [{"label": i} for i in range(300)]
    options = make_options(config, tmp_path)
    dataset, again = (train_toast.CorruptedDataset(images, 64, 128, options) for _ in range(2))
    first = [dataset[i] for i in range(300)]
    assert all(torch.equal(first[i]["mask"], again[i]["mask"]) for i in reversed(range(300)))
    assert all(torch.equal(first[i]["substitutes"], again[i]["substitutes"]) for i in range(300))
    again.set_epoch(1)
    assert not torch.equal(first[3]["substitutes"], again[3]["substitutes"])
    masks = torch.stack([item["mask"] for item in first])
    assert masks.sum(-1).min() >= 1
    assert abs(masks.float().mean() - 2 / np.pi) < 0.05  # the mean of cos(pi u / 2)
    substituted = torch.stack([item["substituted"] for item in first])
    known = (~masks).sum(-1).clamp(min=1)
    many = known > 20
    assert (substituted.sum(-1)[many] / known[many]).mean() == pytest.approx(0.3, abs=0.01)
    substitutes = torch.stack([item["substitutes"] for item in first])
    assert substitutes.min() == 0 and substitutes.max() == 127


def test_fully_masked_images_have_no_target():
    model = train_toast.TrainableToast(ToastAdapter(32, 2, 10, 4), make_transformer(), 0.1)
    tokens, labels = torch.randint(0, 128, (2, 64)), torch.tensor([1, 2])
    mask = torch.ones(2, 64, dtype=torch.bool)
    correction, variational, num_correct = model(tokens, labels, mask, torch.zeros_like(mask), tokens)
    assert correction == 0 and num_correct == 0 and variational > 0


# The losses under what training does to modules


@pytest.mark.parametrize(
    "cls", [MaskGitDiTTransformer2DModel, MaskGitViTTransformer2DModel, MaskGitBertTransformer2DModel]
)
def test_checkpointing_and_compiling_change_no_loss_and_no_gradient(cls):
    tokens, labels = torch.randint(0, 128, (4, 64)), torch.tensor([1, 2, 7, 9])
    mask, substituted = torch.rand(4, 64) < 0.5, torch.rand(4, 64) < 0.2
    batch = (tokens, labels, mask, substituted & ~mask, tokens.flip(0))
    results = []
    for variant in ("plain", "checkpointed", "compiled"):
        transformer = make_transformer(cls, dropout=0.0).requires_grad_(False).train()
        torch.manual_seed(1)
        model = train_toast.TrainableToast(ToastAdapter(32, 2, 10, 4), transformer, 0.1).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        if variant == "checkpointed":
            transformer.enable_gradient_checkpointing()
        if variant == "compiled":
            torch._dynamo.reset()
            model.compile(backend="aot_eager")
        for _ in range(2):  # again: nothing of the first pass may be left over
            model.zero_grad()
            correction, variational, num_correct = model(*batch)
            (correction + variational).backward()
        gradients = {name: parameter.grad for name, parameter in model.toast.named_parameters()}
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
        results.append((correction, variational, num_correct, gradients))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


# Runs


def test_training_saves_a_pipeline(uninterrupted, inputs):
    output_dir, logged = uninterrupted
    assert sorted(logged) == list(range(1, 10))
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    pipeline = MaskGitPipeline.from_pretrained(output_dir / "pipeline")
    assert pipeline.config.call_defaults == {"guidance_scale": 2.0, "self_guidance_scale": 1.0}
    # The transformer is as it was; checkpoints hold the adapter alone; what is saved are the averaged weights.
    before = MaskGitPipeline.from_pretrained(inputs / "pipeline").transformer.state_dict()
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, before[name]), name
    trained = load_file(output_dir / "checkpoint-9" / "model.safetensors")
    saved = pipeline.toast.state_dict()
    assert {name.removeprefix("toast.") for name in trained} == set(saved)
    assert not torch.equal(trained["toast.top_down_transform"], saved["top_down_transform"])
    assert not torch.equal(saved["top_down_transform"], torch.eye(32))


def test_samples_with_and_without_stand_side_by_side(uninterrupted):
    output_dir, _ = uninterrupted
    pipeline = MaskGitPipeline.from_pretrained(output_dir / "pipeline")
    pictures = np.asarray(Image.open(output_dir / "samples" / "step-0000009.png")).astype(int)
    height, width = pictures.shape[:2]
    half = (width - height // 8) // 2
    assert (pictures[:, half : half + height // 8] == 255).all()
    for left, scale in ((0, 0.0), (half + height // 8, 1.0)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        images = pipeline(
            list(range(10)),
            num_images_per_label=2,
            self_guidance_scale=scale,
            num_inference_steps=3,
            generator=generators,
        ).images
        tile = half // 10
        shown = pictures[tile : 2 * tile, left : left + tile][
            1:-1, 1:-1
        ]  # the second image of class 0, without border
        factor = len(shown) // images[1].height
        np.testing.assert_allclose(shown[::factor, ::factor], np.asarray(images[1]), atol=1)


@pytest.mark.parametrize("cls", [MaskGitBertTransformer2DModel, MaskGitViTTransformer2DModel])
def test_other_transformers(cls, inputs, config, tmp_path):
    write_pipeline(tmp_path / "pipeline", make_transformer(cls, dropout=0.1))
    write_tokens(tmp_path / "tokens", tmp_path / "pipeline", 8, 128)
    arguments = [f"pretrained_model={tmp_path / 'pipeline'}", f"data={tmp_path / 'tokens'}", "max_train_steps=2"]
    logged = run_here(config, tmp_path / "run", *arguments, "use_blank_second=false", "validation_split=test")
    assert all(np.isfinite(values).all() for values in logged.values())
    pipeline = MaskGitPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.toast.config.use_blank_second is False
    assert pipeline(1, output_type="latent").images.max() < 128


@pytest.mark.slow
def test_resumed_run_has_the_same_losses(tmp_path, config, uninterrupted):
    for arguments in (["max_train_steps=9"], ["resume_from_checkpoint=latest"]):
        process = launch(config, tmp_path, *arguments)
        deadline = time.time() + 300
        while not (tmp_path / "checkpoint-6").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        if "resume_from_checkpoint=latest" not in arguments:
            process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    for step, values in losses(tmp_path).items():
        assert values == pytest.approx([uninterrupted[1][step][0]] * len(values), abs=1e-5), f"step {step}"
    resumed, whole = (
        load_file(f / "pipeline/toast/diffusion_pytorch_model.safetensors") for f in (tmp_path, uninterrupted[0])
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-4)


def launch(config, output_dir, *overrides, processes=None):
    launcher = (
        [] if processes is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    command = [sys.executable, *launcher, str(SCRIPT), "--config", str(config), f"output_dir={output_dir}", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
def test_two_processes_and_accumulation_equal_one_large_batch(tmp_path, config):
    common = ["max_train_steps=5", "checkpointing_steps=null"]
    process = launch(config, tmp_path / "two", *common, "train_batch_size=4", processes=2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Num processes: 2" in output
    one = run_here(config, tmp_path / "one", *common)
    accumulated = run_here(
        config, tmp_path / "accumulated", *common, "train_batch_size=4", "gradient_accumulation_steps=2"
    )
    for other in (losses(tmp_path / "two"), accumulated):
        assert {step: values[0] for step, values in other.items()} == pytest.approx(
            {step: values[0] for step, values in one.items()}, abs=2e-5
        )
    weights = [
        load_file(tmp_path / name / "pipeline/toast/diffusion_pytorch_model.safetensors")
        for name in ("one", "two", "accumulated")
    ]
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-3)


def test_trains_on_images(tmp_path, config):
    for i in range(20):
        folder = tmp_path / "images" / f"class {i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(i).randint(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = [f"data={tmp_path / 'images'}", "image_size=16", "random_crop=true", "max_train_steps=2"]
    logged = run_here(config, tmp_path / "run", *arguments, "mixed_precision=bf16", "gradient_checkpointing=true")
    assert sorted(logged) == [1, 2] and all(np.isfinite(values).all() for values in logged.values())


def test_debug_run_on_the_shipped_config(tmp_path, inputs):
    shipped = ROOT / "configs" / "toast_fashion_mnist.yaml"
    arguments = [f"data={inputs / 'tokens'}", f"pretrained_model={inputs / 'pipeline'}", "debug=true"]
    logged = run_here(shipped, tmp_path, *arguments)
    assert len(logged) == 10
    card = (tmp_path / "pipeline" / "README.md").read_text()  # it may be published: no paths of this disk
    assert "pretrained_model: pipeline\n" in card and str(tmp_path.parents[1]) not in card


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("toast_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    make_options(path, "unused")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["variational_wight=1"], "variational_weight"),
        (["masking_schedule=cosin"], "cosine"),
        (["substitution_rate=1.5"], "from 0 to 1"),
        (["ema_start_step=-1"], "0 or more"),
        (["pretrained_model=./nowhere"], "./nowhere"),
        (["data=nowhere/at/all"], "give image_size"),
        (
            ["pretrained_model=builtin"],
            "of 128 codes, but the tokenizer of the model has 512: encode the images with its tokenizer",
        ),
        (["pretrained_model={inputs}/partition"], "partition transformer"),
        (["pretrained_model={inputs}/without"], "give use_blank_second=false"),
        (["pretrained_model={inputs}/classes"], "has 10 classes"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(config, tmp_path, capsys, inputs, overrides, message):
    name = overrides[0].rpartition("/")[2]
    if "{inputs}" in overrides[0] and not (inputs / name).exists():
        if name == "partition":
            transformer = PartitionTransformer2DModel(128, 10, 8, hidden_size=32, num_attention_heads=2)
        elif name == "without":
            transformer = make_transformer(has_null_class=False)
        else:
            transformer = make_transformer()
            transformer.resize_class_embeddings(7)
        pipeline = MaskGitPipeline.from_pretrained(inputs / "pipeline", transformer=transformer)
        pipeline.save_pretrained(inputs / name)
    with pytest.raises(SystemExit) as error:
        run_here(config, tmp_path / "run", *(text.replace("{inputs}", str(inputs)) for text in overrides))
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()
