import argparse
import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import VQModel
from fill import checkpoint, state_dict
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from maskgit import ConfidenceScheduler, MaskGitPipeline, MaskGitViTTransformer2DModel
from maskgit.conversion import convert_taming_tokenizer, convert_v1_transformer, maskgit_v1, taming


GOLDEN = Path(__file__).parent / "golden"
SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_to_diffusers.py"
TRANSFORMERS = ("transformer_tiny", "transformer_wide")
TOKENIZERS = ("vqgan_f16", "vqgan_f4_narrow_code")

spec = importlib.util.spec_from_file_location("convert_to_diffusers", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def manifest_of(name):
    folder = "maskgit_v1" if name in TRANSFORMERS else "taming_vqgan"
    return json.loads((GOLDEN / folder / f"{name}.json").read_text())


def convert(*arguments):
    """Runs the command in this process; its exit code."""
    try:
        script.main(["maskgit-v1", *map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    assert convert(*arguments) == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line]
    assert len(lines) == 1 and "error: " in lines[0], output.err
    return lines[0]


def refusal(function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


def model_yaml(name, path, **changes):
    """The model.yaml that lies beside a published tokenizer, with `changes` of its values."""
    params = copy.deepcopy(manifest_of(name)["model"]) | {"lossconfig": {"params": {"disc_start": 0}}}
    for key, value in changes.items():
        (params["ddconfig"] if key in params["ddconfig"] or key == "resamp_with_conv" else params)[key] = value
    target = {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params}
    path.write_text(yaml.safe_dump({"model": target}))
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The golden checkpoints, rebuilt, and a tokenizer of 64 codes, which the tiny transformer predicts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {name: checkpoint(GOLDEN / "maskgit_v1" / f"{name}.json", folder / f"{name}.pth") for name in TRANSFORMERS}
    for name in TOKENIZERS:
        paths[name] = checkpoint(GOLDEN / "taming_vqgan" / f"{name}.json", folder / f"{name}.ckpt")
    manifest = manifest_of("vqgan_f4_narrow_code")
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [64, 16]
    paths["vqgan_64"] = folder / "vqgan_64.ckpt"
    torch.save({"state_dict": state_dict(manifest), "epoch": 3}, paths["vqgan_64"])
    return paths


@pytest.fixture(scope="session")
def pipeline_dir(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    parts = ["--transformer", files["transformer_tiny"], "--tokenizer", files["vqgan_64"]]
    assert convert(*parts, "--num_attention_heads", 4, "--output_dir", folder) == 0
    return folder


# What was published


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_computes_the_published_logits(name, files, tmp_path):
    published = manifest_of(name)["model"]
    options = ["--num_attention_heads", published["heads"], "--codebook_size", published["codebook_size"]]
    assert convert("--transformer", files[name], *options, "--output_dir", tmp_path / "out") == 0
    model = MaskGitViTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert {
        name: model.config[name] for name in ("num_classes", "sample_size", "num_layers", "intermediate_size")
    } == {
        "num_classes": published["nclass"],
        "sample_size": published["grid"],
        "num_layers": published["depth"],
        "intermediate_size": published["mlp_dim"],
    }

    case = load_file(GOLDEN / "maskgit_v1" / f"{name}.safetensors")
    labels = torch.where(case["in.drop_label"], published["nclass"], case["in.labels"])
    with torch.no_grad():
        logits = model(case["in.tokens"], labels, full_vocabulary=True).logits
        assert torch.equal(model(case["in.tokens"], labels).logits, logits[..., :-1])
    # Closer than usual: one epsilon for all the norms would be 4e-5 off.
    torch.testing.assert_close(logits, case["out.logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name, with_config", [("vqgan_f16", False), ("vqgan_f4_narrow_code", True)])
def test_tokenizer_computes_the_published_codes_and_images(name, with_config, files, tmp_path, capsys):
    config = ["--tokenizer_config", model_yaml(name, tmp_path / "model.yaml")] if with_config else []
    assert convert("--tokenizer", files[name], *config, "--output_dir", tmp_path / "out") == 0
    num_loss = sum(key.startswith("loss.") for key in manifest_of(name)["weights"])
    assert f"dropped: loss.* ({num_loss} tensors), epoch, global_step" in capsys.readouterr().out
    model = VQModel.from_pretrained(tmp_path / "out", subfolder="vqvae")
    published = manifest_of(name)["model"]
    assert model.config.sample_size == (published["ddconfig"]["resolution"] if with_config else 256)

    case = load_file(GOLDEN / "taming_vqgan" / f"{name}.safetensors")
    batch, height, width = case["out.indices"].shape

    def decode(tokens):
        shape = (batch, height, width, published["embed_dim"])
        return model.decode(tokens, force_not_quantize=True, shape=shape).sample

    with torch.no_grad():
        latents = model.encode(case["in.image"]).latents
        indices = model.quantize(latents)[2][2].view(batch, height, width)
        reconstruction = decode(case["out.indices"])
        decoded = decode(case["in.decode_indices"])
    torch.testing.assert_close(latents, case["out.latents_before_quantisation"], atol=5e-5, rtol=0)
    assert torch.equal(indices[case["in.unambiguous"]], case["out.indices"][case["in.unambiguous"]])
    torch.testing.assert_close(reconstruction, case["out.reconstruction"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, case["out.decoded_from_indices"], atol=1e-4, rtol=0)


def test_both_parts_make_a_pipeline(pipeline_dir):
    pipe = MaskGitPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    # The number of codes is the tokenizer's.
    assert (pipe.transformer.config.codebook_size, pipe.transformer.config.num_classes) == (64, 10)
    assert isinstance(pipe.scheduler, ConfidenceScheduler) and pipe.scheduler.config.mask_token_id == 64
    assert pipe.config.call_defaults is None and pipe.config.id2label is None
    images = pipe([1, 2], guidance_scale=4, guidance_schedule="linear", num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    text = (pipeline_dir / "README.md").read_text()
    assert ModelCard(text).data.license == "mit"
    assert "besnier2023pytorch" in text and "esser2021taming" in text and "FID" not in text


def test_pipeline_samples_the_published_tokens(pipeline_dir):
    """With the converted scheduler, but for the noise: the most likely token and the highest confidence."""
    settings = json.loads((GOLDEN / "maskgit_v1" / "sampling_greedy_nocfg.json").read_text())["settings"]
    case = load_file(GOLDEN / "maskgit_v1" / "sampling_greedy_nocfg.safetensors")
    assert settings["sched_mode"] == "arccos" and settings["r_temp"] == 0
    pipe = MaskGitPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ConfidenceScheduler.from_config(pipe.scheduler.config, top_k=1, choice_temperature=0.0)
    tokens = pipe(
        case["in.labels"].tolist(),
        guidance_scale=1 + settings["w"],
        guidance_schedule="linear",
        num_inference_steps=settings["steps"],
        output_type="latent",
    ).images
    assert torch.equal(tokens, case["out.final_tokens"])


@pytest.mark.parametrize(
    "sample_size, guidance_scale, num_inference_steps, choice_temperature, fid",
    [(16, 4.0, 8, 4.5, "6.80"), (32, 3.8, 15, 7.0, "7.26")],
)
def test_published_settings(sample_size, guidance_scale, num_inference_steps, choice_temperature, fid):
    config = {"hidden_size": 768, "num_layers": 24, "sample_size": sample_size}
    config |= {"codebook_size": 1024, "num_classes": 1000}
    assert maskgit_v1.call_defaults(config) == {
        "guidance_scale": guidance_scale,
        "guidance_schedule": "linear",
        "num_inference_steps": num_inference_steps,
    }
    scheduler = maskgit_v1.make_scheduler(config)
    assert scheduler.config.choice_temperature == choice_temperature
    assert scheduler.config.masking_schedule == "arccos" and scheduler.config.mask_token_id == 1024
    assert maskgit_v1.describe_transformer(config).results.count(f"| {fid} |") == 1
    for other in ({"num_classes": 10}, {"sample_size": 24}, {"num_layers": 32}):
        assert maskgit_v1.call_defaults(config | other) is None
        assert maskgit_v1.describe_transformer(config | other).results == ""


def test_noise_falls_to_zero_and_the_first_step_decides_one_token():
    config = {"codebook_size": 1024, "num_classes": 1000, "hidden_size": 768, "num_layers": 24, "sample_size": 16}
    scheduler = maskgit_v1.make_scheduler(config)
    scheduler.set_timesteps(8)
    tokens = torch.full((1, 256), 1024)
    decided = []
    for timestep in scheduler.timesteps:
        known = (tokens != 1024).sum()
        tokens = scheduler.step(torch.zeros(1, 256, 1025), timestep, tokens).prev_sample
        decided.append(int((tokens != 1024).sum() - known))
    published = json.loads((GOLDEN / "maskgit_v1" / "schedule.json").read_text())["tables"]["16"]["8"]["arccos"]
    assert decided == published
    assert scheduler.choice_temperatures == pytest.approx([4.5 * (1 - i / 7) for i in range(8)])


def test_published_512_px_transformer(tmp_path):
    """1025 positions; heads and the vocabulary's division are the published ones. One thin layer, to save time."""
    d, v = 768, 2026
    shapes = {"tok_emb.weight": (v, d), "pos_emb": (1, 1025, d), "bias": (1025, v)}
    for head, linears in {"first": (2, 6), "last": (2,)}.items():
        shapes |= {f"{head}_layer.{i}.weight": (d, d) for i in linears}
        shapes |= {f"{head}_layer.{i}.weight": (d,) for i in (0, 4)}
        shapes |= {f"{head}_layer.{i}.bias": (d,) for i in (0, *linears, 4)}
    layer = {f"{i}.norm.{kind}": (d,) for i in (0, 1) for kind in ("weight", "bias")}
    layer |= {"0.fn.mha.in_proj_weight": (3 * d, d), "0.fn.mha.in_proj_bias": (3 * d,)}
    layer |= {"0.fn.mha.out_proj.weight": (d, d), "0.fn.mha.out_proj.bias": (d,)}
    layer |= {"1.fn.net.0.weight": (64, d), "1.fn.net.0.bias": (64,)}
    layer |= {"1.fn.net.3.weight": (d, 64), "1.fn.net.3.bias": (d,)}
    shapes |= {f"transformer.layers.0.{name}": shape for name, shape in layer.items()}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"model_state_dict": weights, "optimizer_state_dict": {"state": {}}}, tmp_path / "512.pth")
    assert convert("--transformer", tmp_path / "512.pth", "--output_dir", tmp_path / "out") == 0
    model = MaskGitViTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert model.config.sample_size == 32 and model.config.num_attention_heads == 16
    assert (model.config.codebook_size, model.config.num_classes) == (1024, 1000)
    with torch.no_grad():
        assert model(torch.full((1, 32, 32), 1024), torch.tensor([1000])).logits.shape == (1, 1024, 1024)


def test_published_tokenizer():
    config = convert_taming_tokenizer(state_dict(manifest_of("vqgan_f16"))).config
    assert not taming.is_published(config)
    # The golden case is the published network at a quarter of its width.
    config["block_out_channels"] = [4 * channels for channels in config["block_out_channels"]]
    config |= {"latent_channels": 256, "vq_embed_dim": 256}
    assert taming.is_published(config)
    assert taming.describe_tokenizer(config).base_model == "llvictorll/Maskgit-pytorch"
    with torch.device("meta"):
        assert VQModel.from_config(config).num_parameters() == 72_141_699


# Other tokenizers of the family


def to_taming(name, num_levels):
    """The name that taming transformers gives to a tensor of diffusers' VQModel."""
    name = re.sub(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)", r"down.\1.\2", name)
    name = re.sub(
        r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)",
        lambda match: f"up.{num_levels - 1 - int(match[1])}.{match[2]}",
        name,
    )
    for old, new in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "samplers.0.": "sample.",
        "resnets": "block",
        "attentions": "attn",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    "channels, attention, layers, latents, codes, image_channels",
    [
        ([32], [0], 2, 8, 16, (3, 3)),
        ([32, 32, 64, 96], [1, 3], 1, 16, 4, (3, 3)),
        ([64, 32, 64], [], 3, 5, 7, (3, 3)),
        ([32, 64], [0, 1], 1, 8, 8, (1, 2)),
    ],
)
def test_any_size(channels, attention, layers, latents, codes, image_channels, tmp_path):
    def kinds(plain, with_attention, levels):
        return [with_attention if level in attention else plain for level in levels]

    levels = range(len(channels))
    model = VQModel(
        *image_channels,
        down_block_types=kinds("DownEncoderBlock2D", "AttnDownEncoderBlock2D", levels),
        up_block_types=kinds("UpDecoderBlock2D", "AttnUpDecoderBlock2D", reversed(levels)),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=latents,
        vq_embed_dim=codes,
        num_vq_embeddings=50,
        lookup_from_codebook=True,
        sample_size=48,
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        is_projection = re.search(r"attentions\.\d+\.to_.*weight", name)
        weights[to_taming(name, len(channels))] = tensor[..., None, None] if is_projection else tensor
    resolution = 48
    ddconfig = {"double_z": False, "z_channels": latents, "resolution": resolution, "dropout": 0.0}
    ddconfig |= {"in_channels": image_channels[0], "out_ch": image_channels[1], "num_res_blocks": layers}
    ddconfig |= {"ch": channels[0], "ch_mult": [size // channels[0] for size in channels]}
    ddconfig |= {"attn_resolutions": [1, *(resolution // 2**level for level in attention)]}
    params = {"embed_dim": codes, "n_embed": 50, "ddconfig": ddconfig}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    converted = convert_taming_tokenizer(weights, tmp_path / "model.yaml")
    assert all(model.config[key] == value for key, value in converted.config.items())
    assert converted.state_dict.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict[name], tensor), name


# What is not given, or wrong


def test_heads(files, tmp_path, capsys):
    arguments = ["--transformer", files["transformer_wide"], "--codebook_size", 100, "--output_dir", tmp_path / "out"]
    assert "--num_attention_heads" in refused(capsys, *arguments)
    for wrong in (7, 0):
        assert f"{wrong} attention heads do not fit" in refused(capsys, *arguments, "--num_attention_heads", wrong)
    assert not (tmp_path / "out").exists()


def test_division_of_the_vocabulary(files):
    weights = state_dict(manifest_of("transformer_tiny"))  # 64 codes and 10 classes
    message = refusal(convert_v1_transformer, weights, 4)
    assert all(word in message for word in ("76 rows", "2026", "--codebook_size", "--num_classes", "--tokenizer"))
    for sizes in ({"codebook_size": 64}, {"num_classes": 10}, {"codebook_size": 64, "num_classes": 10}):
        config = convert_v1_transformer(weights, 4, **sizes).config
        assert (config["codebook_size"], config["num_classes"]) == (64, 10)
    for codebook_size, num_classes in ((64, 11), (74, None), (1024, None), (None, 74), (None, -1), (0, None)):
        message = refusal(convert_v1_transformer, weights, 4, codebook_size, num_classes)
        assert "do not fit" in message and "76 rows" in message
        assert all(str(number) in message for number in (codebook_size, num_classes) if number is not None)


def test_parts_that_do_not_belong_together(files, tmp_path, capsys):
    parts = ["--transformer", files["transformer_tiny"], "--num_attention_heads", 4, "--output_dir", tmp_path / "out"]
    assert "1024 codes do not fit" in refused(capsys, *parts, "--tokenizer", files["vqgan_f16"])
    options = ["--tokenizer", files["vqgan_f16"], "--codebook_size", 64]
    message = refused(capsys, *parts, *options)
    assert "64 codes" in message and "1024" in message
    published = {"codebook_size": 1024, "num_classes": 1000, "hidden_size": 768, "num_layers": 24, "sample_size": 32}
    maskgit_v1.check_fit(published, {"block_out_channels": [1] * 5})
    assert "8 x 8" in refusal(maskgit_v1.check_fit, published, {"block_out_channels": [1] * 4})


def test_options_of_a_part_that_is_not_given(files, tmp_path, capsys):
    output = ["--output_dir", tmp_path / "out"]
    config = model_yaml("vqgan_f16", tmp_path / "model.yaml")
    options = ["--num_attention_heads", 4, "--codebook_size", 64, "--tokenizer_config", config]
    message = refused(capsys, "--transformer", files["transformer_tiny"], *options, *output)
    assert "--tokenizer_config" in message and "--tokenizer PATH" in message
    message = refused(capsys, "--tokenizer", files["vqgan_f16"], "--num_attention_heads", 4, *output)
    assert "--num_attention_heads" in message and "--transformer PATH" in message


@pytest.mark.parametrize("name, step", [("transformer_tiny", 1), ("vqgan_f4_narrow_code", 70)])
def test_each_tensor_is_checked(name, step):
    published = {key: tensor for key, tensor in state_dict(manifest_of(name)).items() if not key.startswith("loss.")}

    def convert_weights(weights):
        if name in TOKENIZERS:
            return convert_taming_tokenizer(weights)
        return convert_v1_transformer(weights, 4, 64)

    for key in list(published)[::step]:
        tensor = published[key]
        message = refusal(convert_weights, {n if n != key else n + "_": t for n, t in published.items()})
        assert f"unknown: {key}_." in message and f"missing: {key};" in message
        for wrong in (tensor[None], torch.full_like(tensor, torch.nan), tensor.long()):
            assert f"wrong: {key} (" in refusal(convert_weights, published | {key: wrong})
        for axis in range(tensor.ndim):
            if (name in TOKENIZERS and key == "quantize.embedding.weight" and axis == 0) or tensor.shape[axis] == 1:
                continue
            message = refusal(convert_weights, published | {key: tensor.narrow(axis, 0, tensor.shape[axis] - 1)})
            assert key in message, f"{key} {axis}: {message}"


def test_grids_that_are_not_square():
    weights = state_dict(manifest_of("transformer_tiny"))
    weights |= {"pos_emb": weights["pos_emb"][:, :-1], "bias": weights["bias"][:-1]}
    assert "64 positions" in refusal(convert_v1_transformer, weights, 4, 64)


def test_callers_weights_stay_as_they_are():
    for name, function in {"transformer_tiny": lambda w: convert_v1_transformer(w, 4, 64)}.items():
        weights = state_dict(manifest_of(name))
        before = {key: tensor.clone() for key, tensor in weights.items()}
        function(weights)
        assert weights.keys() == before.keys()
        assert all(torch.equal(weights[key], before[key]) for key in weights)
    weights = state_dict(manifest_of("vqgan_f4_narrow_code"))
    names = list(weights)
    converted = convert_taming_tokenizer(weights)
    assert list(weights) == names
    assert len(converted.dropped) == 1
    without_loss = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
    assert convert_taming_tokenizer(without_loss).dropped == []


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"embed_dim": 9}, "embed_dim 9, but by the tensors it is 64"),
        ({"n_embed": 16384}, "n_embed 16384, but by the tensors it is 1024"),
        ({"z_channels": 256}, "z_channels 256"),
        ({"ch": 128}, "ch 128, but by the tensors it is 32"),
        ({"ch_mult": [1, 2, 2, 4]}, "by the tensors it is [1, 1, 2, 2, 4]"),
        ({"num_res_blocks": 3}, "num_res_blocks 3"),
        ({"attn_resolutions": [32, 16]}, "attn_resolutions [32, 16], but by the tensors it is [16]"),
        ({"attn_resolutions": None}, "attn_resolutions None"),
        ({"double_z": True}, "double_z True, which diffusers.VQModel cannot do"),
        ({"resamp_with_conv": False}, "resamp_with_conv False, which diffusers.VQModel cannot do"),
        ({"remap": "remap.npy"}, "remap remap.npy, which diffusers.VQModel cannot do"),
        ({"in_channels": 4}, "encoder.conv_in.weight (32 x 3 x 3 x 3 instead of 32 x 4 x 3 x 3)"),
        ({"resolution": "256x256"}, "resolution '256x256'"),
    ],
)
def test_model_yaml_of_another_tokenizer(changes, expected, tmp_path):
    weights = state_dict(manifest_of("vqgan_f16"))
    path = model_yaml("vqgan_f16", tmp_path / "model.yaml", **changes)
    assert expected in refusal(convert_taming_tokenizer, weights, path)


def test_files_that_are_no_model_yaml(files, tmp_path, capsys):
    contents = {
        "missing.yaml": (None, "cannot be read"),
        "text.yaml": (b"hello", "no model.params.ddconfig"),
        "other.yaml": (b"model:\n  params: 3\n", "no model.params.ddconfig"),
        "broken.yaml": (b"model: [1, 2\nx", "not valid YAML"),
        "binary.yaml": (b"\xff\x00\xfe", "not valid YAML"),
        "code.yaml": (b"model: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
        "": (None, "cannot be read"),
    }
    for name, (data, expected) in contents.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        arguments = ["--tokenizer", files["vqgan_f4_narrow_code"], "--tokenizer_config", path]
        message = refused(capsys, *arguments, "--output_dir", tmp_path / "out")
        assert expected in message and str(path) in message
    assert not (tmp_path / "out").exists() and not Path("pwned").exists()


def test_overwriting_keeps_model_yaml(files, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    config = model_yaml("vqgan_f4_narrow_code", output / "model.yaml")
    arguments = ["--tokenizer", files["vqgan_f4_narrow_code"], "--tokenizer_config", config, "--output_dir", output]
    assert "would delete" in refused(capsys, *arguments, "--overwrite")
    assert config.exists()


def test_networks_that_vqmodel_has_not():
    weights = state_dict(manifest_of("vqgan_f4_narrow_code"))
    gumbel = weights | {"quantize.embed.weight": torch.zeros(4, 4)}
    assert "Gumbel" in refusal(convert_taming_tokenizer, gumbel)
    shortcut = weights | {"encoder.down.0.block.0.nin_shortcut.weight": torch.zeros(4, 4, 1, 1)}
    assert "ch_mult" in refusal(convert_taming_tokenizer, shortcut)


def test_lightning_checkpoints_with_more_than_tensors(tmp_path, capsys):
    contents = {"state_dict": state_dict(manifest_of("vqgan_f4_narrow_code"))}
    contents["callbacks"] = {"checkpoint": argparse.Namespace(best_model_path="x")}
    path = tmp_path / "last.ckpt"
    torch.save(contents, path)
    arguments = ["--tokenizer", path, "--output_dir", tmp_path / "out"]
    message = refused(capsys, *arguments)
    assert "--trust_pickle" in message and "argparse.Namespace" in message
    assert convert(*arguments, "--trust_pickle") == 0


def test_foreign_files(files, tmp_path, capsys):
    """Each part given as the other, and a checkpoint of another project."""
    output = ["--output_dir", tmp_path / "out"]
    message = refused(capsys, "--tokenizer", files["transformer_tiny"], *output)
    assert "not the tensors of a taming transformers VQGAN" in message and "unknown: " in message
    message = refused(capsys, "--transformer", files["vqgan_f4_narrow_code"], *output)
    assert "not the tensors of a MaskGIT-pytorch v1 transformer" in message and "unknown: " in message
    foreign = {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.zeros(4, 4) for i in range(30)}
    torch.save({"state_dict": foreign, "global_step": 1}, tmp_path / "foreign.ckpt")
    for option in ("--transformer", "--tokenizer"):
        message = refused(capsys, option, tmp_path / "foreign.ckpt", *output)
        assert "unknown: model.diffusion_model.input_blocks.0.0.weight" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
