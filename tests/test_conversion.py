import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from fill import checkpoint, state_dict
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from maskgit import HaltonScheduler, MaskGitDiTTransformer2DModel, MaskGitPipeline
from maskgit.conversion import convert_halton_transformer, convert_llamagen_tokenizer
from maskgit.conversion.folders import imagenet_labels, new_folder
from maskgit.conversion.halton import PGM_BASELINE, call_defaults, check_fit, describe_transformer, make_scheduler
from maskgit.pipelines.pipeline_maskgit import CALL_DEFAULTS
from maskgit.presets import load_preset


GOLDEN = Path(__file__).parent / "golden"
SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_to_diffusers.py"
TRANSFORMERS = {"transformer_tiny": 4, "transformer_odd_heads": 6, "transformer_noreg": 2}  # heads
TOKENIZERS = ("vq16", "vq8")

spec = importlib.util.spec_from_file_location("convert_to_diffusers", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def manifest_of(name):
    folder = "halton" if name.startswith("transformer") else "llamagen_vq"
    return json.loads((GOLDEN / folder / f"{name}.json").read_text())


def convert(*arguments):
    """Runs the command in this process; its exit code."""
    try:
        script.main(["halton", *map(str, arguments)])
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


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The golden checkpoints, rebuilt."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name in (*TRANSFORMERS, *TOKENIZERS):
        kind = "halton" if name in TRANSFORMERS else "llamagen_vq"
        paths[name] = checkpoint(GOLDEN / kind / f"{name}.json", folder / f"{name}.pth")
    # A tokenizer of 128 codes, which the tiny transformer predicts.
    manifest = manifest_of("vq8")
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [128, 8]
    paths["vq_128"] = folder / "vq_128.pt"
    torch.save({"ema": state_dict(manifest), "model": {}, "optimizer": {"step": 3}}, paths["vq_128"])
    return paths


@pytest.fixture(scope="session")
def pipeline_dir(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    parts = ["--transformer", files["transformer_tiny"], "--tokenizer", files["vq_128"]]
    assert convert(*parts, "--num_attention_heads", 4, "--output_dir", folder) == 0
    return folder


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_computes_the_published_logits(name, files, tmp_path):
    heads = TRANSFORMERS[name]
    output = tmp_path / "out"
    assert convert("--transformer", files[name], "--num_attention_heads", heads, "--output_dir", output) == 0
    assert {path.name for path in (output / "transformer").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "transformer_dit.py",
    }
    model = MaskGitDiTTransformer2DModel.from_pretrained(output, subfolder="transformer")

    published = manifest_of(name)["model"]
    assert model.config.codebook_size == published["codebook_size"]
    assert model.config.num_classes == published["nclass"]
    assert model.config.sample_size == published["input_size"]
    assert model.config.num_register_tokens == published["register"]

    case = load_file(GOLDEN / "halton" / f"{name}.safetensors")
    labels = torch.where(case["in.drop_label"], published["nclass"], case["in.labels"])
    with torch.no_grad():
        logits = model(case["in.tokens"], labels).logits
    torch.testing.assert_close(logits, case["out.logits"][..., :-1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_computes_the_published_codes_and_images(name, files, tmp_path):
    assert convert("--tokenizer", files[name], "--output_dir", tmp_path / "out") == 0
    model = VQModel.from_pretrained(tmp_path / "out", subfolder="vqvae")
    case = load_file(GOLDEN / "llamagen_vq" / f"{name}.safetensors")
    batch, height, width = case["out.indices"].shape
    assert height != width

    def decode(tokens):
        return model.decode(tokens, force_not_quantize=True, shape=(batch, height, width, 8)).sample

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
    assert {path.name for path in (pipeline_dir / "scheduler").iterdir()} >= {
        "scheduling_halton.py",
        "scheduling_confidence.py",
    }
    pipe = MaskGitPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.mask_token_id == 128
    assert pipe.config.call_defaults is None and pipe.config.id2label is None
    images = pipe([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    assert not list(pipeline_dir.parent.glob(".*")), "the folder it was written in is still there"


@pytest.mark.parametrize("case", ["sampling_greedy_cfg", "sampling_greedy_nocfg"])
def test_pipeline_samples_the_published_tokens(case, pipeline_dir):
    case = load_file(GOLDEN / "halton" / f"{case}.safetensors")
    pipe = MaskGitPipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = HaltonScheduler.from_config(pipe.scheduler.config, top_k=1)
    tokens = pipe(
        case["in.labels"].tolist(),
        guidance_scale=1 + case["in.guidance_w"].item(),
        num_inference_steps=case["in.steps"].item(),
        output_type="latent",
    ).images
    assert torch.equal(tokens, case["out.final_tokens"])


def test_model_card(pipeline_dir):
    text = (pipeline_dir / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert card.data.to_dict() == ModelCard(str(card)).data.to_dict()
    assert "MaskGitPipeline.from_pretrained" in text and "trust_remote_code=True" in text
    assert "besnier2025halton" in text and "sun2024autoregressive" in text
    assert "FID" not in text, "a result of another model"


@pytest.mark.parametrize(
    "hidden_size, num_layers, sample_size, guidance_scale",
    [
        (384, 6, 16, 2.5),
        (512, 12, 16, 2.0),
        (768, 12, 16, 1.7),
        (512, 12, 24, 2.0),
        (768, 12, 24, 1.7),
        (1024, 24, 24, 1.5),
    ],
)
def test_published_settings(hidden_size, num_layers, sample_size, guidance_scale):
    config = {"hidden_size": hidden_size, "num_layers": num_layers, "sample_size": sample_size}
    config |= {"codebook_size": 16384, "num_classes": 1000}
    assert call_defaults(config) == {"guidance_scale": guidance_scale, "num_inference_steps": 32}
    assert call_defaults(config | {"num_classes": 10}) is None
    assert call_defaults(config | {"sample_size": 48}) is None
    assert make_scheduler(config).config.temperature_warmup_steps == 0


def test_baseline_of_partition_generative_modeling():
    config = {"hidden_size": 1024, "num_layers": 24, "sample_size": 32, "codebook_size": 16384, "num_classes": 1000}
    preset = load_preset("pgm-maskgit-halton-32")
    assert CALL_DEFAULTS | call_defaults(config) == CALL_DEFAULTS | preset.call
    assert type(make_scheduler(config)).__name__ == preset.scheduler
    expected = HaltonScheduler(mask_token_id=16384, **preset.scheduler_config).config
    assert {name: value for name, value in make_scheduler(config).config.items() if name[0] != "_"} == {
        name: value for name, value in expected.items() if name[0] != "_"
    }
    metrics = preset.published["metrics"]
    assert (metrics["fid"], metrics["inception_score"]) == (PGM_BASELINE.fid, PGM_BASELINE.inception_score)
    card = describe_transformer(config)
    assert card.title == "Halton-MaskGIT baseline of Partition Generative Modeling, 256 px"
    assert "| 32 | 2.0 | 5.35 | 267.5 |" in card.results and "deschenaux2026partition" in card.citation
    assert "announced as MIT" in card.licence and card.base_model == "jdeschena/pgm"
    check_fit(config, {"block_out_channels": [1] * 4})
    with pytest.raises(ValueError, match="vq_ds8_c2i.pt.*16 x 16"):
        check_fit(config, {"block_out_channels": [1] * 5})


@pytest.fixture(scope="session")
def published_size(tmp_path_factory):
    """A checkpoint that has the tiny model's published sizes."""
    hidden, intermediate = 384, 1024
    layer = {"mlp.1.weight": (2304, hidden), "mlp.1.bias": (2304,), "ln1.weight": (hidden,), "ln2.weight": (hidden,)}
    layer |= {f"attn.{w}.weight": (hidden, hidden) for w in ("wq", "wk", "wv", "wo")}
    layer |= {"ff.w1.weight": (intermediate, hidden), "ff.w3.weight": (intermediate, hidden)}
    layer |= {"ff.w2.weight": (hidden, intermediate)}
    shapes = {"tok_emb.weight": (16385, hidden), "pos_emb.weight": (256, hidden), "cls_emb.weight": (1001, hidden)}
    shapes |= {"reg_tokens.weight": (1, hidden), "head.weight": (16385, hidden), "head.bias": (16385,)}
    shapes |= {"last_norm.norm_final.weight": (hidden,), "last_norm.norm_final.bias": (hidden,)}
    shapes |= {"last_norm.mlp.1.weight": (768, hidden), "last_norm.mlp.1.bias": (768,)}
    shapes |= {f"transformer.layers.{i}.{name}": shape for i in range(6) for name, shape in layer.items()}
    path = tmp_path_factory.mktemp("published") / "tiny.pth"
    torch.save({"model_state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}}, path)
    return path


def test_published_model_gets_its_settings_and_names(published_size, files, tmp_path, capsys):
    manifest = manifest_of("vq16")
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [16384, 8]
    torch.save({"model": state_dict(manifest)}, tmp_path / "vq16.pt")
    output = tmp_path / "out"
    assert convert("--transformer", published_size, "--tokenizer", tmp_path / "vq16.pt", "--output_dir", output) == 0
    pipe = MaskGitPipeline.from_pretrained(output)
    assert sum(p.numel() for p in pipe.transformer.parameters()) / 1e6 == pytest.approx(23.0, abs=0.05)
    assert pipe.config.call_defaults == {"guidance_scale": 2.5, "num_inference_steps": 32}
    assert pipe.get_label_ids(["tench", "golden retriever", "toilet tissue"]) == [0, 207, 999]
    text = (output / "README.md").read_text()
    assert "| 32 | 2.5 | 10.2 | 185 |" in text and "Published by the authors" in text
    assert ModelCard(text).data.base_model == ["llvictorll/Halton-Maskgit", "FoundationVision/LlamaGen"]

    # Its tokenizer makes a token of 16 x 16 pixels, not of 8 x 8.
    manifest = manifest_of("vq8")
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [16384, 8]
    torch.save({"model": state_dict(manifest)}, tmp_path / "vq8.pt")
    capsys.readouterr()
    arguments = ["--transformer", published_size, "--tokenizer", tmp_path / "vq8.pt", "--output_dir", tmp_path / "no"]
    assert "8 x 8" in refused(capsys, *arguments)


def test_imagenet_names_are_unique():
    labels = imagenet_labels()
    assert len(labels) == len(set(labels.values())) == 1000


def test_prefixes_of_wrappers_and_safetensors(files, tmp_path):
    weights = state_dict(manifest_of("transformer_tiny"))
    plain = convert_halton_transformer(weights, num_attention_heads=4)
    prefixes = {"module.": ".pth", "_orig_mod.module.": ".pth", "module._orig_mod.": ".safetensors"}
    for i, (prefix, suffix) in enumerate(prefixes.items()):
        path = tmp_path / f"{i}{suffix}"
        wrapped = {prefix + name: tensor for name, tensor in weights.items()}
        save_file(wrapped, path) if suffix == ".safetensors" else torch.save({"model_state_dict": wrapped}, path)
        output = tmp_path / str(i)
        assert convert("--transformer", path, "--num_attention_heads", 4, "--output_dir", output) == 0
        written = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
        assert written.keys() == plain.state_dict.keys()
        assert all(torch.equal(written[name], plain.state_dict[name]) for name in written)


def test_half_precision_and_old_files_become_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in state_dict(manifest_of("transformer_noreg")).items()}
    path = tmp_path / "old.pth"
    torch.save({"model_state_dict": weights}, path, _use_new_zipfile_serialization=False)
    assert convert("--transformer", path, "--num_attention_heads", 2, "--output_dir", tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["class_embed.weight"], weights["cls_emb.weight"].float())


def test_codes_have_length_one():
    weights = state_dict(manifest_of("vq8"))
    converted = convert_llamagen_tokenizer(weights)
    codes = weights["quantize.embedding.weight"]
    expected = codes / codes.norm(dim=1, keepdim=True)
    torch.testing.assert_close(converted.state_dict["quantize.embedding.weight"], expected)
    assert converted.dropped == ["quantize.codebook_used"]
    assert "quantize.codebook_used" in weights, "the caller's dict was changed"


def test_rectangular_grid(files, tmp_path, capsys):
    weights = state_dict(manifest_of("transformer_noreg"))
    weights["pos_emb.weight"] = torch.randn(24, 64)
    path = tmp_path / "rectangle.pth"
    torch.save({"model_state_dict": weights}, path)
    arguments = ["--transformer", path, "--num_attention_heads", 2, "--output_dir", tmp_path / "out"]
    assert "24 positions" in refused(capsys, *arguments)
    for height, width in ((5, 6), (-4, -6)):
        assert "no grid of the 24" in refused(capsys, *arguments, "--sample_size", height, width)
    assert convert(*arguments, "--sample_size", 4, 6) == 0
    model = MaskGitDiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert tuple(model.config.sample_size) == (4, 6)


def test_heads(files, tmp_path, capsys):
    output = ["--output_dir", tmp_path / "out"]
    assert "--num_attention_heads" in refused(capsys, "--transformer", files["transformer_tiny"], *output)
    message = refused(capsys, "--transformer", files["transformer_odd_heads"], "--num_attention_heads", 4, *output)
    assert "4 attention heads do not fit" in message and "60 rows" in message and "6, 10" in message
    assert not (tmp_path / "out").exists()


def break_transformer(tmp_path, change):
    weights = state_dict(manifest_of("transformer_tiny"))
    change(weights)
    torch.save({"model_state_dict": weights}, tmp_path / "broken.pth")
    return tmp_path / "broken.pth"


def refusal(convert_weights, weights):
    with pytest.raises(ValueError) as error:
        convert_weights(weights)
    return str(error.value)


@pytest.mark.parametrize("name, step", [("transformer_odd_heads", 1), ("vq8", 80)])
def test_each_tensor_is_checked(name, step):
    published = state_dict(manifest_of(name))
    published.pop("quantize.codebook_used", None)

    def convert_weights(weights):
        return convert_llamagen_tokenizer(weights) if name == "vq8" else convert_halton_transformer(weights, 6)

    for key in list(published)[::step]:
        tensor = published[key]
        message = refusal(convert_weights, {n if n != key else n + "_": t for n, t in published.items()})
        assert f"unknown: {key}_." in message
        if key != "reg_tokens.weight":  # a model may be without
            assert f"missing: {key};" in message
        for wrong in (tensor[..., :-1], tensor[None], torch.full_like(tensor, torch.nan), tensor.long()):
            assert f"wrong: {key} (" in refusal(convert_weights, published | {key: wrong})


def test_what_is_missing_and_odd_is_named():
    published = state_dict(manifest_of("transformer_tiny"))

    def convert_weights(weights):
        return convert_halton_transformer(weights, 4)

    no_layers = {name: tensor for name, tensor in published.items() if not name.startswith("transformer.layers.")}
    message = refusal(convert_weights, no_layers)
    assert "missing: transformer.layers.0.mlp.1.weight" in message and "unknown" not in message
    one = {"tok_emb.weight": published["tok_emb.weight"][:1], "head.weight": published["head.weight"][:1]}
    one["head.bias"] = published["head.bias"][:1]
    assert "tok_emb.weight has a single row" in refusal(convert_weights, published | one)
    one = {"cls_emb.weight": published["cls_emb.weight"][:1]}
    assert "cls_emb.weight has a single row" in refusal(convert_weights, published | one)
    for name, change, expected in (
        ("head.bias", lambda tensor: tensor[0], "a single number instead of 129"),
        ("pos_emb.weight", torch.Tensor.to_sparse, "torch.sparse_coo instead of a dense tensor"),
        ("pos_emb.weight", lambda tensor: tensor.to("meta"), "without values instead of a dense tensor"),
    ):
        assert f"wrong: {name} ({expected})" in refusal(convert_weights, published | {name: change(published[name])})


def test_parameters_are_tensors(tmp_path):
    weights = {name: torch.nn.Parameter(value) for name, value in state_dict(manifest_of("transformer_noreg")).items()}
    torch.save({"model_state_dict": weights}, tmp_path / "file.pth")
    arguments = ["--transformer", tmp_path / "file.pth", "--num_attention_heads", 2]
    assert convert(*arguments, "--output_dir", tmp_path / "out") == 0


def test_written_files_have_the_usual_mode(files, tmp_path):
    arguments = ["--transformer", files["transformer_noreg"], "--num_attention_heads", 2]
    old = os.umask(0o027)
    try:
        assert convert(*arguments, "--output_dir", tmp_path / "out") == 0
    finally:
        os.umask(old)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o640, path


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_conversions_leave_nothing(ctrl_c, number, code, files, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(script, "write_card", lambda *_: signal.raise_signal(number))
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    arguments = ["--transformer", files["transformer_noreg"], "--num_attention_heads", 2, "--overwrite"]
    assert convert(*arguments, "--output_dir", output) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "stopped; nothing was written" in line] == lines[-1:]
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_old_folder_survives_a_stop_while_it_is_replaced(tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    rename = Path.rename

    def stopped(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), new_folder(output, overwrite=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_wrong_options_are_one_line(tmp_path, capsys):
    for wrong in (["--nonsense", "1"], ["--num_attention_heads", "many"]):
        assert wrong[0] in refused(capsys, *wrong, "--transformer", "x", "--output_dir", tmp_path / "out")
    assert "--output_dir" in refused(capsys, "--transformer", "x")


def test_untied_head_is_refused(tmp_path, capsys):
    path = break_transformer(tmp_path, lambda weights: weights["head.weight"].mul_(2))
    arguments = ["--transformer", path, "--num_attention_heads", 4, "--output_dir", tmp_path / "out"]
    assert "head.weight differs" in refused(capsys, *arguments)


def test_parts_that_do_not_belong_together(files, tmp_path, capsys):
    parts = ["--transformer", files["transformer_tiny"], "--num_attention_heads", 4, "--tokenizer", files["vq16"]]
    message = refused(capsys, *parts, "--output_dir", tmp_path / "out")
    assert "128 codes" in message and "4096" in message


def damaged_files(folder):
    """Files that are no checkpoint, with what the message must say."""
    good = folder / "good.pth"
    torch.save({"model_state_dict": state_dict(manifest_of("transformer_tiny"))}, good)
    content = good.read_bytes()
    middle = len(content) // 2
    files = {
        "missing.pth": (None, "not there"),
        "empty.pth": (b"", "no checkpoint"),
        "text.pth": (b"# not weights\n" * 50, "no checkpoint"),
        "truncated.pth": (content[:middle], "no checkpoint"),
        "damaged.pth": (content[:middle] + bytes(64) + content[middle + 64 :], "checksum"),
        "text.safetensors": (b"# not weights\n" * 50, "no checkpoint"),
    }
    for name, (data, _) in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    np.savez(folder / "array.npz", a=np.zeros(3))
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"epoch": 3}, folder / "no_weights.pth")
    foreign = {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.zeros(4, 4) for i in range(30)}
    torch.save({"state_dict": foreign, "global_step": 1}, folder / "foreign.ckpt")
    return {folder / name: message for name, (_, message) in files.items()} | {
        folder / "array.npz": "no checkpoint",
        folder / "tensor.pth": "no weights",
        folder / "no_weights.pth": "epoch",
        folder / "foreign.ckpt": "unknown: model.diffusion_model.input_blocks.0.0.weight",
        folder: "a folder",
    }


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    files = damaged_files(tmp_path)
    for path, expected in files.items():
        for option in ("--transformer", "--tokenizer"):
            message = refused(capsys, option, path, "--output_dir", tmp_path / "out")
            assert expected in message and str(path) in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_pickles_are_opened_only_when_trusted(tmp_path, capsys):
    contents = {"model_state_dict": state_dict(manifest_of("transformer_noreg")), "args": argparse.Namespace(lr=1)}
    path = tmp_path / "pickle.pth"
    torch.save(contents, path)
    arguments = ["--transformer", path, "--num_attention_heads", 2, "--output_dir", tmp_path / "out"]
    message = refused(capsys, *arguments)
    assert "--trust_pickle" in message and "argparse.Namespace" in message
    assert convert(*arguments, "--trust_pickle") == 0


def test_output_folder(files, tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    arguments = ["--transformer", files["transformer_noreg"], "--num_attention_heads", 2, "--output_dir", output]
    output.mkdir(parents=True)
    assert convert(*arguments) == 0  # an empty folder is no obstacle
    (output / "mine.txt").write_text("keep")
    assert "--overwrite" in refused(capsys, *arguments)
    arguments[3] = 3
    assert "do not fit" in refused(capsys, *arguments, "--overwrite")
    assert (output / "mine.txt").exists(), "a failed conversion deleted the old folder"
    arguments[3] = 2
    assert convert(*arguments, "--overwrite") == 0
    assert not (output / "mine.txt").exists() and (output / "transformer" / "config.json").exists()
    assert not list(output.parent.glob(".*"))

    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, *arguments[:-1], tmp_path / "file")
    assert "cannot be made" in refused(capsys, *arguments[:-1], tmp_path / "file" / "below")
    inside = tmp_path / "checkpoints"
    inside.mkdir()
    copy = inside / "model.pth"
    copy.write_bytes(files["transformer_noreg"].read_bytes())
    arguments[1], arguments[-1] = copy, inside
    assert "would delete" in refused(capsys, *arguments, "--overwrite")
    assert copy.exists()


def test_sources_and_parts(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["nonsense", "--output_dir", str(tmp_path / "out")])
    assert error.value.code == 2 and "halton" in capsys.readouterr().err
    assert "--transformer" in refused(capsys, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_command_line(files, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, "halton", *map(str, arguments)], capture_output=True, text=True)

    arguments = ["--transformer", files["transformer_tiny"], "--tokenizer", files["vq_128"]]
    arguments += ["--output_dir", tmp_path / "out"]
    failed = run(*arguments)
    assert failed.returncode == 2 and "--num_attention_heads" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    done = run(*arguments, "--num_attention_heads", 4)
    assert done.returncode == 0, done.stderr
    assert "dropped: head.weight (the same as tok_emb.weight), iter, global_epoch, optimizer_state_dict" in done.stdout
    assert f'MaskGitPipeline.from_pretrained("{tmp_path / "out"}")' in done.stdout
