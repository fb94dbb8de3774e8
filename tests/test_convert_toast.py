"""UnlockMGM's folders through the command line: a transformer and its self-guidance adapter."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fill import checkpoint, state_dict
from safetensors.torch import load_file

from maskgit import MaskGitBertTransformer2DModel, MaskGitPipeline, MaskGitVQModel, SelfGuidedScheduler, ToastAdapter
from maskgit.conversion.checkpoints import ConversionError
from maskgit.conversion.maskgit_google import split_toast
from maskgit.conversion.unlockmgm import call_defaults, convert_toast, describe_toast, make_scheduler


GOLDEN = Path(__file__).parent / "golden" / "unlockmgm"
SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_to_diffusers.py"

spec = importlib.util.spec_from_file_location("convert_to_diffusers", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def convert(*arguments):
    """Runs the command in this process; its exit code."""
    try:
        script.main(["unlockmgm", *map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    assert convert(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The golden checkpoint, the transformer of it alone, another one's, and a tokenizer of so many codes."""
    folder = tmp_path_factory.mktemp("unlockmgm")
    # As the archive has it: below other folders, beside the weights that were not averaged.
    nested = folder / "archive" / "results" / "checkpoint-50000"
    toast = checkpoint(GOLDEN / "forward_tiny.json", nested / "ema_model")
    checkpoint(GOLDEN / "train_tiny.json", nested / "unwrapped_model")
    weights = torch.load(toast / "pytorch_model.bin")
    base = folder / "base"
    base.mkdir()
    torch.save(split_toast(weights)[0], base / "pytorch_model.bin")
    (base / "config.json").write_text((toast / "config.json").read_text())
    tokenizer = MaskGitVQModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=1024,
        norm_num_groups=32,
    )
    return {
        "archive": folder / "archive",
        "toast": toast,
        "base": base,
        "other": checkpoint(GOLDEN / "base_tiny.json", folder / "other"),
        "tokenizer": tokenizer,
    }


def check_published_numbers(transformer, toast):
    golden = load_file(GOLDEN / "forward_tiny.safetensors")
    sequence = golden["in.input_ids"]
    input_ids, labels = sequence[:, 1:].clamp(max=1024), sequence[:, 0] - 1024
    pipe = MaskGitPipeline(transformer, None, SelfGuidedScheduler(1024), toast)
    with torch.no_grad():
        guided = pipe._predict(input_ids.view(2, 4, 4), labels, None, 1.0, 1.0)
    torch.testing.assert_close(guided, golden["out.guided_logits_1.0"][:, 1:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("arguments", [["--toast", "archive"], ["--toast", "toast", "--transformer", "base"]])
def test_adapter_with_its_transformer(files, tmp_path, capsys, arguments):
    output = tmp_path / "out"
    assert convert(*(files.get(argument, argument) for argument in arguments), "--output_dir", output) == 0
    printed = capsys.readouterr().out
    assert "dropped: nothing" in printed and "toast = ToastAdapter.from_pretrained" in printed
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "toast", "transformer"]
    assert (output / "toast" / "adapter_toast.py").is_file()
    card = (output / "README.md").read_text()
    assert "toast = ToastAdapter.from_pretrained" in card and "2305.15542" in card and "has no licence file" in card
    toast = ToastAdapter.from_pretrained(output, subfolder="toast")
    assert dict(toast.config) == dict(toast.config) | {
        "hidden_size": 32,
        "num_layers": 3,
        "num_classes": 10,
        "anchor_factor": 4,
        "use_blank_second": True,
    }
    transformer = MaskGitBertTransformer2DModel.from_pretrained(output, subfolder="transformer")
    check_published_numbers(transformer, toast)


def test_whole_pipeline(files, tmp_path):
    output = tmp_path / "out"
    tokenizer = tmp_path / "tokenizer"
    muse_tokenizer(files["tokenizer"], tokenizer)
    assert convert("--toast", files["toast"], "--tokenizer", tokenizer, "--output_dir", output) == 0
    pipe = MaskGitPipeline.from_pretrained(output)
    assert type(pipe.scheduler) is SelfGuidedScheduler and pipe.scheduler.config.choice_temperature == 25
    assert pipe.config.call_defaults == {"num_inference_steps": 18, "self_guidance_scale": 1.0}
    assert type(pipe.toast) is ToastAdapter
    check_published_numbers(pipe.transformer, pipe.toast)
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def muse_tokenizer(model: MaskGitVQModel, folder: Path):
    """Writes a tokenizer under open-muse's names."""
    folder.mkdir()
    names = {}
    for name in model.state_dict():
        new = name
        for part, outer, side in (("encoder", "down", "down_blocks"), ("decoder", "up", "up_blocks")):
            new = new.replace(f"{part}.mid_block.resnets.", f"{part}.mid.").replace(
                f"{part}.{side}.", f"{part}.{outer}."
            )
            new = new.replace(f"{part}.conv_norm_out", f"{part}.norm_out")
        if new.startswith("decoder.up."):  # open-muse counts the decoder's levels from the image
            index = int(new.split(".")[2])
            new = new.replace(f"decoder.up.{index}.", f"decoder.up.{1 - index}.")
        new = new.replace(".resnets.", ".block.").replace(".upsamplers.0.conv.", ".upsample_conv.")
        names[name] = new.replace("conv_shortcut", "nin_shortcut")
    torch.save({names[name]: tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")


def test_published_settings():
    for size, temperature in ((16, 25.0), (32, 45.0), (8, 25.0)):
        transformer = {"codebook_size": 1024, "sample_size": size}
        assert make_scheduler(transformer).config.choice_temperature == temperature
        assert call_defaults(transformer) == {"num_inference_steps": 18, "self_guidance_scale": 1.0}


def test_what_does_not_belong_together_is_refused(files, tmp_path, capsys):
    output = tmp_path / "out"
    message = refused(capsys, "--toast", files["toast"], "--transformer", files["other"], "--output_dir", output)
    assert "trained on another transformer" in message and "token_embed.weight" in message
    assert "--transformer PATH, --toast PATH" in refused(capsys, "--output_dir", output)
    message = refused(capsys, "--toast", files["base"], "--output_dir", output)
    assert "holds no self-guidance adapter" in message and "ema_model" in message
    message = refused(capsys, "--transformer", files["toast"], "--output_dir", output)
    assert "holds a self-guidance adapter besides the transformer" in message
    assert not output.exists() and not list(tmp_path.iterdir())


def test_adapter_of_other_sizes_is_refused(files, tmp_path, capsys):
    manifest = json.loads((GOLDEN / "forward_tiny.json").read_text())
    weights = state_dict(manifest)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("decoders.2.")}
    folder = tmp_path / "toast"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(manifest["config"]))
    message = refused(capsys, "--toast", folder, "--output_dir", tmp_path / "out")
    assert "num_layers is 2, the transformer's 3" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("decoders.1.linear2.weight"), "missing: decoders.1.linear2.weight"),
        (lambda weights: weights.update({"cls_anchor_gen.more": torch.ones(3)}), "unknown: cls_anchor_gen.more"),
        (
            lambda weights: weights.update(top_down_transform=torch.ones(32, 31)),
            "top_down_transform .32 x 31 instead of",
        ),
        (lambda weights: weights.update({"cls_anchor_gen.mlp_f.weight": torch.ones(1, 5)}), "instead of"),
    ],
)
def test_damaged_adapters_are_named(change, message):
    manifest = json.loads((GOLDEN / "forward_tiny.json").read_text())
    weights = split_toast(state_dict(manifest))[1]
    change(weights)
    with pytest.raises(ConversionError, match=message):
        convert_toast(weights, manifest["config"])


def test_second_pass_as_the_config_says():
    manifest = json.loads((GOLDEN / "forward_tiny.json").read_text())
    weights = split_toast(state_dict(manifest))[1]
    for config, expected in (
        ({}, True),
        ({"use_toast": True}, False),  # what open-muse takes where the key is absent
        ({"use_blank_second": True}, True),
    ):
        assert convert_toast(weights, config).config["use_blank_second"] is expected
    with pytest.raises(ConversionError, match="use_blank_second"):
        convert_toast(weights, {"use_blank_second": "yes"})


def test_published_sizes():
    """The 56 tensors of the released adapters."""
    with torch.device("meta"):
        toast = ToastAdapter()
    assert len(toast.state_dict()) == 56
    assert "50,000 steps of batch 256" in describe_toast(toast.config).training
    assert not describe_toast(dict(toast.config) | {"num_layers": 3}).training
