"""The transformer's training script, launched as a user would: killed, resumed, on two processes, on wrong input."""

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
import train_maskgit
from accelerate.state import AcceleratorState
from diffusers import VQModel
from fill import state_dict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit import MaskGitDiTTransformer2DModel, MaskGitPipeline
from maskgit.conversion.halton import convert_halton_transformer
from maskgit.options import load_options
from maskgit.tokenization import load_tokenizer, tokenizer_checksum


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "halton"
SCRIPT = ROOT / "training" / "train_maskgit.py"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=128,
        lookup_from_codebook=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def token_data(tmp_path_factory, tokenizer):
    """200 training and 24 validation images of 10 classes, whose tokens depend on the class and the place."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "data").mkdir()
    names = [f"class {i}" for i in range(10)]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("uint16"), length=64), "label": datasets.ClassLabel(names=names)}
    )
    random = np.random.RandomState(0)
    info = {"grid_height": 8, "grid_width": 8, "codebook_size": 128, "tokenizer": str(tokenizer), "splits": {}}
    info["tokenizer_checksum"] = tokenizer_checksum(load_tokenizer(str(tokenizer)))
    for split, count in (("train", 200), ("test", 24)):
        labels = np.arange(count) % 10
        tokens = (labels[:, None] * 7 + np.arange(64) // 4 + random.randint(0, 2, (count, 64))) % 128
        rows = {"tokens": tokens.tolist(), "label": labels.tolist()}
        part = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(part)
        info["splits"][split] = {"num_parts": 1}
    (folder / "token_dataset.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, token_data):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(f"""
data: {token_data}
output_dir: unset
model: {{hidden_size: 32, num_layers: 2, num_attention_heads: 4, intermediate_size: 64}}
train_batch_size: 8
max_train_steps: 9
learning_rate: 1.0e-2
lr_scheduler: constant_with_cosine_tail
lr_warmup_steps: 3
ema_decay: 0.99
log_every: 1
validation_steps: null
checkpointing_steps: 3
num_inference_steps: 4
""")
    return path


def run_here(config, output_dir, *overrides):
    """Train in this process; the losses by step."""
    options = load_options(
        train_maskgit.MaskGitOptions, ["--config", str(config), f"output_dir={output_dir}", *overrides]
    )
    train_maskgit.Trainer(options).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return losses(output_dir)


def launch(config, output_dir, *overrides, processes=None):
    launcher = (
        [] if processes is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    command = [sys.executable, *launcher, str(SCRIPT), "--config", str(config), f"output_dir={output_dir}", *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def losses(output_dir):
    """Every loss that was logged, by step: a list, since steps after a checkpoint are trained again after a kill."""
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


def test_published_training_steps(tmp_path, token_data):
    golden = load_file(GOLDEN / "train_steps.safetensors")
    manifest = json.loads((GOLDEN / "transformer_tiny.json").read_text())
    converted = convert_halton_transformer(state_dict(manifest), num_attention_heads=4)
    transformer = MaskGitDiTTransformer2DModel(**converted.config)
    transformer.load_state_dict(converted.state_dict)
    transformer.save_pretrained(tmp_path / "pretrained" / "transformer")

    options = train_maskgit.MaskGitOptions(
        output_dir=str(tmp_path / "run"),
        data=str(token_data),
        pretrained_model=str(tmp_path / "pretrained"),
        train_batch_size=6,
        max_train_steps=int(golden["in.max_iter"]),
        learning_rate=float(golden["in.lr"]),
        lr_scheduler="constant_with_cosine_tail",
        lr_warmup_steps=int(golden["in.warm_up"]),
        max_grad_norm=float(golden["in.grad_clip"]),
        adam_weight_decay=float(golden["in.weight_decay"]),
        report_to="none",
    )
    trainer = train_maskgit.Trainer(options)
    for i, tokens in enumerate(golden["in.tokens"]):
        batch = {"input_ids": tokens, "label": golden["in.labels"][i]}
        batch |= {"mask": golden["in.mask"][i].flatten(1), "drop_label": golden["in.drop_label"][i]}
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(float(golden["out.lr"][i]), abs=1e-9)
        sums = trainer.train_step([batch])
        torch.testing.assert_close(sums["loss"], golden["out.loss"][i], atol=2e-5, rtol=0)
        torch.testing.assert_close(sums["grad_norm"], golden["out.grad_norm_before_clip"][i], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sums["correct"] / sums["masked"], golden["out.masked_accuracy"][i])
    transformer = trainer.transformer
    torch.testing.assert_close(transformer.token_embed.weight, golden["out.tok_emb_after"], atol=2e-5, rtol=0)
    torch.testing.assert_close(transformer.output_bias, golden["out.head_bias_after"], atol=2e-5, rtol=0)
    query = transformer.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(query, golden["out.wq0_after"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        ("bert", ["loss_on=masked", "label_smoothing=0.1", "label_drop=0", "guidance_scale=1"]),
        ("vit", ["label_smoothing=0.1"]),
        ("partition", ["model.num_decoder_layers=2"]),
    ],
)
def test_every_architecture_trains_and_samples(architecture, overrides, config, tmp_path):
    steps = ["max_train_steps=6", "learning_rate=2e-3", "lr_warmup_steps=1", "ema_decay=null"]
    logged = run_here(config, tmp_path, f"architecture={architecture}", *overrides, *steps)
    assert logged[6][0] < logged[1][0]
    pipeline = MaskGitPipeline.from_pretrained(tmp_path / "pipeline")
    expected_class, expected_scheduler = train_maskgit.ARCHITECTURES[architecture]
    assert type(pipeline.transformer) is expected_class and type(pipeline.scheduler) is expected_scheduler
    tokens = pipeline(3, output_type="latent").images
    assert tokens.shape == (1, 8, 8) and tokens.max() < 128


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["architecture=bert", "guidance_scale=1"], "give label_drop=0 and guidance_scale=1"),
        (["architecture=partition", "loss_on=masked"], "give loss_on=all"),
        (["architecture=vit", "model.num_register_tokens=1"], "unknown option in model"),
        (["architecture=gan"], "expected one of dit, bert, vit, partition"),
    ],
)
def test_options_that_an_architecture_does_not_have(overrides, message, config, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run_here(config, tmp_path / "out", *overrides)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fine_tuning_takes_the_architecture_of_what_it_starts_from(uninterrupted, config, tmp_path, capsys):
    arguments = [f"pretrained_model={uninterrupted[0] / 'pipeline'}", "architecture=vit", "model={}"]
    with pytest.raises(SystemExit):
        run_here(config, tmp_path / "out", *arguments)
    assert "holds a MaskGitDiTTransformer2DModel, but architecture=vit" in capsys.readouterr().err


def test_training_learns_and_saves_a_pipeline(uninterrupted):
    output_dir, logged = uninterrupted
    assert sorted(logged) == list(range(1, 10))
    assert logged[9][0] < logged[1][0] - 0.3
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    assert (output_dir / "samples" / "step-0000009.png").is_file()
    pipeline = MaskGitPipeline.from_pretrained(output_dir / "pipeline")
    assert pipeline.config.call_defaults == {"guidance_scale": 2.0, "num_inference_steps": 4}
    assert pipeline("class 3", output_type="latent").images.shape == (1, 8, 8)
    # What is saved are the averaged weights: others than the last checkpoint's.
    trained = load_file(output_dir / "checkpoint-9" / "model.safetensors")
    assert not torch.equal(trained["output_bias"], pipeline.transformer.output_bias)


@pytest.mark.slow
def test_killed_runs_go_on_with_the_same_losses(tmp_path, config, uninterrupted):
    reference_dir, reference = uninterrupted
    deadline = time.time() + 300

    # Killed in the middle of writing the first checkpoint: nothing of it may be taken for a checkpoint.
    process = launch(config, tmp_path)
    while not list(tmp_path.glob(".checkpoint-3.tmp/*")) and process.poll() is None and time.time() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "checkpoint-3").exists()

    # Started again, and killed after the second checkpoint.
    process = launch(config, tmp_path, "resume_from_checkpoint=latest")
    while not (tmp_path / "checkpoint-6").exists() and process.poll() is None and time.time() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "pipeline").exists()

    process = launch(config, tmp_path, "resume_from_checkpoint=latest")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert not list(tmp_path.glob(".checkpoint*"))

    logged = losses(tmp_path)
    assert sorted(logged) == sorted(reference)
    for step, values in logged.items():
        assert values == pytest.approx([reference[step][0]] * len(values), abs=1e-5), f"step {step}"
    resumed, whole = (load_file(f / "checkpoint-9" / "model.safetensors") for f in (tmp_path, reference_dir))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss_on", ["all", "masked"])
def test_two_processes_and_accumulation_equal_one_large_batch(tmp_path, config, loss_on):
    common = [f"loss_on={loss_on}", "max_train_steps=5", "checkpointing_steps=null"]
    process = launch(config, tmp_path / "two", *common, "train_batch_size=4", processes=2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Num processes: 2" in output
    two = losses(tmp_path / "two")
    one = run_here(config, tmp_path / "one", *common)
    accumulated = run_here(
        config, tmp_path / "accumulated", *common, "train_batch_size=4", "gradient_accumulation_steps=2"
    )
    for other in (two, accumulated):
        assert {step: values[0] for step, values in other.items()} == pytest.approx(
            {step: values[0] for step, values in one.items()}, abs=2e-5
        )


def test_gradient_checkpointing_changes_nothing(tmp_path, config, uninterrupted):
    logged = run_here(config, tmp_path, "gradient_checkpointing=true", "max_train_steps=9")
    assert logged[8] == pytest.approx(uninterrupted[1][8], abs=1e-5)


def test_trains_on_images_and_from_a_pretrained_model_with_other_classes(
    tmp_path, config, tokenizer, uninterrupted, capsys
):
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.random.RandomState(i).randint(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = [f"data={tmp_path / 'images'}", f"tokenizer={tokenizer}", "image_size=16", "random_flip=true"]
    arguments += [f"pretrained_model={uninterrupted[0] / 'pipeline'}", "model={}", "max_train_steps=2"]
    logged = run_here(config, tmp_path / "run", *arguments, "learning_rate=0")
    assert sorted(logged) == [1, 2] and all(np.isfinite(values).all() for values in logged.values())
    pipeline = MaskGitPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.id2label == {0: "cat", 1: "dog"}
    assert pipeline.transformer.config.num_classes == 2
    pretrained = MaskGitPipeline.from_pretrained(uninterrupted[0] / "pipeline").transformer.state_dict()
    for name, weight in pipeline.transformer.state_dict().items():
        if name == "class_embed.weight":
            assert weight.shape == (3, 32) and 0.01 < weight.std() < 0.03
        else:
            assert torch.equal(weight, pretrained[name]), name


def test_checkpoints_are_the_same_with_and_without_compile(tmp_path, config, uninterrupted):
    with torch.compiler.set_stance("force_eager"):  # what is tested are the names of the weights
        run_here(config, tmp_path, "compile=true", "max_train_steps=4", "lr_scheduler=constant")
    assert (tmp_path / "checkpoint-4").is_dir()  # the last step has a checkpoint, though it is no multiple of 3
    compiled, plain = (
        load_file(f / "model.safetensors") for f in (tmp_path / "checkpoint-4", uninterrupted[0] / "checkpoint-9")
    )
    assert compiled.keys() == plain.keys()
    arguments = ["resume_from_checkpoint=latest", "max_train_steps=5", "lr_scheduler=constant"]
    assert len(run_here(config, tmp_path, *arguments)) == 5


def test_a_retrained_tokenizer_is_refused(tmp_path, config, tokenizer, capsys):
    vqvae = VQModel.from_pretrained(tokenizer)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.save_pretrained(tmp_path / "vqvae")
    with pytest.raises(SystemExit):
        run_here(config, tmp_path / "run", f"tokenizer={tmp_path / 'vqvae'}")
    assert "were made with other weights than those of" in capsys.readouterr().err


def test_debug_run_of_a_pretrained_model_has_its_sizes(tmp_path, config, uninterrupted):
    arguments = [f"pretrained_model={uninterrupted[0] / 'pipeline'}", "model={}", "debug=true", "max_train_steps=1"]
    logged = run_here(config, tmp_path, *arguments)
    assert logged[1][0] < uninterrupted[1][1][0] - 0.3
    card = (tmp_path / "pipeline" / "README.md").read_text()  # it may be published: no paths of this disk
    assert "pretrained_model: pipeline\n" in card and str(tmp_path.parents[1]) not in card


def test_debug_run_on_the_shipped_config(tmp_path, token_data):
    shipped = ROOT / "configs" / "maskgit_fashion_mnist.yaml"
    logged = run_here(shipped, tmp_path, f"data={token_data}", "debug=true", "mixed_precision=no")
    assert len(logged) == 20


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("maskgit_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, monkeypatch):
    options = load_options(train_maskgit.MaskGitOptions, ["--config", str(path), "compile=false"])
    with torch.device("meta"):
        options.transformer_class(**options.model)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["learning_rat=1"], "learning_rate"),
        (["model.hidden_sizes=8"], "hidden_size"),
        (["loss_on=hidden"], "masked"),
        (["masking_schedule=cosin"], "cosine"),
        (["label_drop=1.5"], "from 0 to 1"),
        (["label_drop=0"], "label_drop"),
        (["model.has_null_class=false"], "label_drop=0"),
        (["data=nowhere/at/all"], "nowhere"),
        (["validation_split=val"], "no split 'val'"),
        (["train_batch_size=500"], "200 images"),
        (["pretrained_model=./nowhere"], "./nowhere"),
        (["pretrained_model={uninterrupted}/pipeline", "model.hidden_size=16"], "has 32: leave it out"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(config, tmp_path, capsys, uninterrupted, overrides, message):
    overrides = [text.replace("{uninterrupted}", str(uninterrupted[0])) for text in overrides]
    with pytest.raises(SystemExit) as error:
        run_here(config, tmp_path / "run", *overrides)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "samples").exists()


def test_a_folder_with_another_run_is_refused(config, uninterrupted, capsys):
    with pytest.raises(SystemExit):
        run_here(config, uninterrupted[0])
    assert "resume_from_checkpoint=latest" in capsys.readouterr().err
