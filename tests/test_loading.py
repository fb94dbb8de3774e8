import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgit
from maskgit import ConfidenceScheduler, HaltonScheduler, MaskGitPipeline
from maskgit.loading import BUILTIN_MODELS, load_pipeline


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied_dir(tiny_pipeline_dir, tmp_path):
    """A copy of the tiny pipeline, for damage."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "model")


def test_builtin_models_are_found_by_name(tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit.loading.BUILTIN_MODELS", tmp_path)
    with pytest.raises(ValueError, match="no built-in model 'fashion-mnist': there are none"):
        maskgit.builtin()
    for name in ("fashion-mnist", "other-one"):
        shutil.copytree(tiny_pipeline_dir, tmp_path / name)
    assert maskgit.builtin() == tmp_path / "fashion-mnist"
    assert maskgit.builtin("other-one") == tmp_path / "other-one"
    assert isinstance(load_pipeline("builtin"), MaskGitPipeline)
    shutil.rmtree(tmp_path / "fashion-mnist")
    assert isinstance(load_pipeline("builtin-other-one"), MaskGitPipeline)
    with pytest.raises(ValueError, match="no built-in model 'celebs': there are other-one"):
        load_pipeline("builtin-celebs")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/model_index.json")))
def test_builtin_model_samples(name):
    pipe = load_pipeline(f"builtin-{name}")
    image = pipe(pipe.id2label[0], num_inference_steps=2).images[0]
    assert image.size == (pipe.transformer.config.sample_size * pipe.vae_scale_factor,) * 2


def test_arguments(tiny_pipeline_dir):
    pipe = load_pipeline(str(tiny_pipeline_dir), dtype="bfloat16", device="cpu")
    assert {pipe.transformer.dtype, pipe.vqvae.dtype} == {torch.bfloat16}
    assert pipe.device == torch.device("cpu")
    with pytest.raises(ValueError, match="dtype is 'int8', but must be one of float32, bfloat16, float16"):
        load_pipeline(str(tiny_pipeline_dir), dtype="int8")
    with pytest.raises(ValueError, match="scheduler is 'ddim', but must be one of halton, confidence"):
        load_pipeline(str(tiny_pipeline_dir), scheduler="ddim")
    with pytest.raises(ValueError, match="no device 'abacus' on this machine: there are cpu"):
        load_pipeline(str(tiny_pipeline_dir), device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(tiny_pipeline_dir):
    with pytest.raises(ValueError, match="no device 'cuda' on this machine"):
        load_pipeline(str(tiny_pipeline_dir), device="cuda")


def test_scheduler(copied_dir):
    config_path = copied_dir / "scheduler" / "scheduler_config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"top_k": 7}))
    assert load_pipeline(str(copied_dir)).scheduler.config.top_k == 7
    kept = load_pipeline(str(copied_dir), scheduler="halton").scheduler
    assert isinstance(kept, HaltonScheduler)
    assert kept.config.top_k == 7
    other = load_pipeline(str(copied_dir), scheduler="confidence").scheduler
    assert isinstance(other, ConfidenceScheduler)
    assert other.config.mask_token_id == 32
    assert other.config.top_k is None


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "../up/there", "a/b/c"])
def test_no_such_folder(model):
    with pytest.raises(OSError, match=f"no folder '{model}': give a folder, user/name on the Hub"):
        load_pipeline(model)


def test_model_on_the_hub(tiny_pipeline_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(MaskGitPipeline, "download", lambda name: asked.append(name) or str(tiny_pipeline_dir))
    assert isinstance(load_pipeline("some-user/model.v1"), MaskGitPipeline)
    assert asked == ["some-user/model.v1"]

    def fail(name):
        raise OSError("Cannot load model\nsee above") from OSError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr(MaskGitPipeline, "download", fail)
    with pytest.raises(OSError, match="no folder 'a/b', and the Hub gives no model of this name: 404 Client Error.$"):
        load_pipeline("a/b")


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "transformer", "vqvae", "scheduler", f"transformer/{WEIGHTS}", "vqvae/config.json"],
)
def test_missing_part_is_named(copied_dir, name):
    path = copied_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(OSError, match=f"holds no complete pipeline: it lacks {name.replace(WEIGHTS, '')}"):
        load_pipeline(str(copied_dir))


@pytest.mark.parametrize("kept_bytes", [0, 1000, -1])
def test_damaged_file_is_named(copied_dir, kept_bytes):
    path = copied_dir / "vqvae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(OSError, match=f"The file '{path}' is damaged or cut short"):
        load_pipeline(str(copied_dir))


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_of_another_model(copied_dir, change, capfd):
    path = copied_dir / "transformer" / WEIGHTS
    weights = load_file(path)
    if change == "missing":
        del weights["norm_out.weight"]
    else:
        weights["norm_out.scale"] = torch.zeros(3)
    save_file(weights, path)
    with pytest.raises(OSError, match="transformer' are not those of a MaskGitDiT.*such as norm_out."):
        load_pipeline(str(copied_dir))
    assert capfd.readouterr() == ("", "")


def test_saved_folder_samples_the_same_where_the_package_is_not_installed(tiny_pipeline_dir, tmp_path):
    script = """if True:
        import json, sys
        sys.modules["maskgit"] = None
        import torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        print(json.dumps(pipe(["bag", 3], generator=generators, output_type="latent").images.tolist()))
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", script, str(tiny_pipeline_dir)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    tokens = load_pipeline(str(tiny_pipeline_dir))(["bag", 3], generator=generators, output_type="latent").images
    assert json.loads(result.stdout) == tokens.tolist()
