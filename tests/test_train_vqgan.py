import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import VQModel
from PIL import Image
from safetensors.torch import load_file

from maskgit.tokenization import decode_tokens, encode_images, load_tokenizer


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "training" / "train_vqgan.py"


def load_script():
    spec = importlib.util.spec_from_file_location("train_vqgan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_vqgan"] = module
    spec.loader.exec_module(module)
    return module


train_vqgan = load_script()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config over 24 generated images in three classes, all options not given here being those of debug=true."""
    folder = tmp_path_factory.mktemp("vqgan")
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("a", "b", "c"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
                image.save(folder / "images" / split / name / f"{i}.png")
    text = {"data": str(folder / "images"), "debug": True, "report_to": "none", "image_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(text))
    return folder / "config.yaml"


def arguments(config, output_dir, *overrides):
    return ["--config", str(config), f"output_dir={output_dir}", *overrides]


def train(config, output_dir, *overrides):
    """Runs the script in this process; returns the saved tensors."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_vqgan.main(train_vqgan.load_options(train_vqgan.TokenizerOptions, arguments(config, output_dir, *overrides)))
    return load_file(Path(output_dir) / "vqvae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("loss", ["taming", "llamagen"])
def test_run_saves_a_tokenizer_that_works(config, tmp_path, loss):
    train(config, tmp_path / "out", f"quantizer_loss={loss}", "mixed_precision=bf16", "report_to=tensorboard")
    tokenizer = load_tokenizer(str(tmp_path / "out" / "vqvae"))
    assert type(tokenizer) is VQModel and tokenizer.config.lookup_from_codebook
    tokens = encode_images(tokenizer, torch.rand(2, 3, 32, 32) * 2 - 1)
    assert tokens.shape == (2, 8, 8) and tokens.dtype == torch.long
    assert decode_tokens(tokenizer, tokens).shape == (2, 3, 32, 32)
    lengths = tokenizer.quantize.embedding.weight.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(64)) == (loss == "llamagen")
    for name in ("grid.png", "results.json", "samples/step-2.png", "checkpoint-4", "logs"):
        assert (tmp_path / "out" / name).exists(), name


def test_killed_run_resumes_to_the_same_weights(config, tmp_path):
    overrides = ["max_train_steps=30", "lr_scheduler=cosine", "checkpoints_total_limit=1", "validation_steps=null"]
    straight = train(config, tmp_path / "straight", *overrides)
    command = [sys.executable, str(SCRIPT), *arguments(config, tmp_path / "out", *overrides)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "checkpoint-6").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "vqvae").exists()
    resumed = train(config, tmp_path / "out", *overrides, "resume_from_checkpoint=latest")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_two_processes_train_as_one_with_their_batch(config, tmp_path):
    overrides = ["discriminator_start=null", "restart_steps=null", "learning_rate=1e-3", "random_flip=true"]
    overrides += ["validation_steps=null", "checkpointing_steps=null"]
    one = train(config, tmp_path / "one", *overrides, "train_batch_size=8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += arguments(config, tmp_path / "two", *overrides, "train_batch_size=4")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    if not torch.accelerator.is_available():
        assert "Num processes: 2" in done.stderr
    two = load_file(tmp_path / "two" / "vqvae" / "diffusion_pytorch_model.safetensors")
    start = train(config, tmp_path / "start", *overrides, "learning_rate=0")
    # Not weight by weight: where a gradient is nothing but rounding, Adam still makes a full step.
    changes = {name: two[name] - start[name] for name in one}
    expected = {name: one[name] - start[name] for name in one}
    apart = sum((changes[name] - expected[name]).square().sum() for name in one).sqrt()
    size = sum(change.square().sum() for change in expected.values()).sqrt()
    assert size > 0.01 and apart < 0.02 * size, (apart, size)


def test_unused_codes_restart_everywhere():
    tokenizer = train_vqgan.TrainableTokenizer(VQModel(num_vq_embeddings=6, vq_embed_dim=2), unit_codes=False)
    codebook = tokenizer.vqvae.quantize.embedding.weight
    optimizer = torch.optim.Adam([codebook])
    codebook.grad = torch.ones(6, 2)
    optimizer.step()
    before, average = codebook.detach().clone(), torch.zeros(6, 2)
    tokenizer.code_counts += torch.tensor([1, 0, 2, 0, 0, 1])
    latents = torch.rand(8, 2) + 3
    count = train_vqgan.restart_unused_codes(tokenizer, average, optimizer, latents, seed=0)
    assert count == 3 and tokenizer.code_counts.sum() == 0
    for i in range(6):
        restarted = i in (1, 3, 4)
        assert torch.equal(codebook[i], before[i]) != restarted
        assert (latents == codebook[i]).all(-1).any() == restarted
        assert torch.equal(average[i], codebook[i] if restarted else torch.zeros(2))
        assert (optimizer.state[codebook]["exp_avg"][i] == 0).all() == restarted


def test_quantiser_loss_is_that_of_taming_transformers():
    golden = load_file(Path(__file__).parent / "golden" / "taming_vqgan" / "quantiser_losses.safetensors")
    vqvae = VQModel(latent_channels=16, num_vq_embeddings=32, norm_num_groups=32)
    vqvae.quantize.embedding.weight.data.copy_(golden["in.codebook"])
    latents = golden["in.z"].requires_grad_()
    codes, loss, (_, _, indices) = vqvae.quantize(latents)
    (loss + 0 * codes.sum()).backward()
    assert torch.equal(indices.view(2, 4, 4), golden["out.indices"])
    torch.testing.assert_close(loss, golden["out.loss"])
    torch.testing.assert_close(vqvae.quantize.embedding.weight.grad, golden["out.grad_codebook"])
    torch.testing.assert_close(latents.grad, golden["out.grad_z"])


def test_discriminator_has_the_published_size():
    discriminator = train_vqgan.PatchDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.vq_embed_dims=4", "did you mean 'vq_embed_dim'?"),
        ("image_size=30", "image_size=30: the model downsamples 4 times, give a multiple of 4"),
        ("train_split=test", "test"),
        ("data=./nothing", "there is no folder './nothing'"),
        ("perceptual_weight=1", "pip install lpips"),
    ],
)
def test_mistakes_end_with_one_line(config, tmp_path, capsys, override, message):
    if "lpips" in message and importlib.util.find_spec("lpips"):
        pytest.skip("lpips is installed")
    with pytest.raises(SystemExit) as stop:
        train(config, tmp_path / "out", override)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_fp16_with_accumulation_and_a_discriminator_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    values = {"output_dir": "x", "data": "y", "mixed_precision": "fp16", "gradient_accumulation_steps": 2}
    train_vqgan.TokenizerOptions(**values)
    with pytest.raises(ValueError, match="fp16.*discriminator needs gradient_accumulation_steps=1"):
        train_vqgan.TokenizerOptions(**values, discriminator_start=0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("vqgan_*.yaml")), ids=lambda path: path.stem)
def test_configs_are_valid(path):
    options = train_vqgan.load_options(train_vqgan.TokenizerOptions, ["--config", str(path), "perceptual_weight=0"])
    with torch.device("meta"):
        VQModel(**options.model)
