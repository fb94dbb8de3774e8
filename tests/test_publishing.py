import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fill import checkpoint, state_dict
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from test_conversion import GOLDEN, convert, manifest_of

from maskgit import MaskGitPipeline
from maskgit.model_card import MODEL_ID, write_model_card
from maskgit.publishing import prepare_folder


SCRIPTS = Path(__file__).parents[1] / "scripts"

spec = importlib.util.spec_from_file_location("push_to_hub", SCRIPTS / "push_to_hub.py")
push_to_hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(push_to_hub)

SAMPLE = """
tokens = pipe([3], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent").images
print(json.dumps(tokens.flatten().tolist()))
"""
WITHOUT_PACKAGE = f"""
import json, sys, torch
sys.modules["maskgit"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)
{SAMPLE}
"""
WITH_PACKAGE = f"""
import json, torch
from maskgit import MaskGitPipeline
pipe = MaskGitPipeline.from_pretrained("me/tiny")
assert type(pipe.transformer).__module__ == "maskgit.models.transformer_dit"
{SAMPLE}
"""


@pytest.fixture
def hub():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python with a Hub of its own and an empty cache."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_MODULES_CACHE": str(tmp_path / "hf_modules"),
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "0",
    }

    def run(*arguments):
        arguments = [sys.executable, *map(str, arguments)]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path)

    return run


@pytest.fixture
def checkpoints(tmp_path):
    manifest = manifest_of("vq8")
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [128, 8]
    torch.save({"model": state_dict(manifest)}, tmp_path / "tokenizer.pt")
    transformer = checkpoint(GOLDEN / "halton" / "transformer_tiny.json", tmp_path / "transformer.pth")
    return ["--transformer", transformer, "--tokenizer", tmp_path / "tokenizer.pt", "--num_attention_heads", 4]


@pytest.mark.slow
def test_published_model_loads_with_and_without_the_package(checkpoints, hub, run, tmp_path):
    folder = tmp_path / "model"
    assert convert(*checkpoints, "--output_dir", folder) == 0
    pushed = run(SCRIPTS / "push_to_hub.py", folder, "me/tiny", "--private", "--commit_message", "First model")
    assert pushed.returncode == 0, pushed.stderr
    assert hub.commits == ["First model"] and hub.private == {"me/tiny": True}
    assert hub.endpoint + "/me/tiny/commit/" in pushed.stdout
    published = hub.repositories["me/tiny"]
    assert {name for name in published if name.endswith(".py")} >= {
        "pipeline_maskgit.py",
        "transformer/transformer_dit.py",
        "scheduler/scheduling_halton.py",
        "scheduler/scheduling_confidence.py",
    }
    assert 'from_pretrained("me/tiny")' in published["README.md"].decode()
    assert not any(str(tmp_path).encode() in content for content in published.values())

    tokens = []
    for program in (WITHOUT_PACKAGE, WITH_PACKAGE):
        loaded = run("-c", program)
        assert loaded.returncode == 0, loaded.stderr
        tokens.append(json.loads(loaded.stdout.splitlines()[-1]))
    pipe = MaskGitPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    expected = pipe([3], num_inference_steps=4, generator=generator, output_type="latent").images.flatten().tolist()
    assert tokens == [expected, expected]


@pytest.mark.slow
def test_converter_uploads_what_it_wrote(checkpoints, hub, run, tmp_path):
    script, arguments = SCRIPTS / "convert_to_diffusers.py", ["halton", *checkpoints[:2], *checkpoints[4:]]
    done = run(script, *arguments, "--output_dir", tmp_path / "model", "--push_to_hub", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.repositories["me/tiny"]
    assert 'from_pretrained("me/tiny", subfolder="transformer")' in hub.repositories["me/tiny"]["README.md"].decode()


@pytest.mark.parametrize(
    "folder, repo_id, message",
    [("empty", "me/tiny", "no saved model"), ("missing", "me/tiny", "no saved model"), ("empty", "a b", "'a b'")],
)
def test_what_cannot_be_uploaded_is_one_line(folder, repo_id, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as error:
        push_to_hub.main([str(tmp_path / folder), repo_id])
    output = capsys.readouterr().err
    assert error.value.code == 2 and message in output and len(output.splitlines()) == 1


def test_no_connection_is_one_line(tiny_pipeline_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    nobody = functools.partial(HfApi, endpoint="http://127.0.0.1:1", token="hf_x")
    monkeypatch.setattr("maskgit.publishing.HfApi", nobody)
    with pytest.raises(SystemExit) as error:
        push_to_hub.main([str(tmp_path / "model"), "me/tiny"])
    output = capsys.readouterr().err
    assert error.value.code == 2 and "could not be uploaded to me/tiny" in output and len(output.splitlines()) == 1


def test_folders_are_cleaned_and_described(tiny_pipeline_dir, tmp_path):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    assert "_name_or_path" in (tmp_path / "transformer" / "config.json").read_text()
    prepare_folder(tmp_path, "me/my-model")
    assert "_name_or_path" not in (tmp_path / "transformer" / "config.json").read_text()
    text = (tmp_path / "README.md").read_text()
    assert "# my-model" in text and "me/my-model" in text and MODEL_ID not in text
    before = (tmp_path / "README.md").read_text()
    prepare_folder(tmp_path, "me/other")
    assert (tmp_path / "README.md").read_text() == before


def test_card_of_a_trained_model(tiny_pipeline_dir, tmp_path):
    for path in tiny_pipeline_dir.rglob("*.json"):
        copy = tmp_path / path.relative_to(tiny_pipeline_dir)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "grid.png").write_bytes(b"")
    path = write_model_card(
        tmp_path, "Clothes", "Draws clothes.", sections={"Training": "On 60,000 images."}, datasets=["me/clothes"]
    )
    card = ModelCard.load(path)
    assert card.data.datasets == ["me/clothes"] and card.data.license is None
    text = card.text
    assert "![samples](grid.png)" in text and "## Training\n\nOn 60,000 images." in text
    assert "guidance_scale=2.0" in text and "num_inference_steps=3" in text
    assert 'pipe("t-shirt, top")' in text and "8 x 8 tokens of 32 codes" in text
