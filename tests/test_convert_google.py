import importlib.util
import json
import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fill import arrays, checkpoint, state_dict
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from maskgit import (
    ConfidenceScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitPipeline,
    MaskGitVQModel,
    SelfGuidedScheduler,
)
from maskgit.conversion.maskgit_google import (
    convert_flax_tokenizer,
    convert_flax_transformer,
    convert_muse_tokenizer,
    convert_muse_transformer,
    convert_torch_tokenizer,
    convert_torch_transformer,
    split_toast,
)
from maskgit.conversion.maskgit_google_cards import describe_tokenizer, describe_transformer
from maskgit.conversion.maskgit_google_files import read_flax, read_muse_folder


msgpack = pytest.importorskip("msgpack")

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_to_diffusers.py"
PREFIXES = {"maskgit-jax": "maskgit_google/flax", "maskgit-torch": "maskgit_google/hmori"}

spec = importlib.util.spec_from_file_location("convert_to_diffusers", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def golden(name, suffix="json"):
    path = GOLDEN / f"{name}.{suffix}"
    return load_file(path) if suffix == "safetensors" else json.loads(path.read_text())


def convert(*arguments):
    """Runs the command in this process; its exit code."""
    try:
        script.main([*map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


def refused(capsys, *arguments):
    """The one line that the command ends with."""
    assert convert(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


def refusal(function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The golden checkpoints, rebuilt."""
    folder = tmp_path_factory.mktemp("google")
    paths = {
        (source, kind): checkpoint(GOLDEN / f"{prefix}_{kind}_tiny.json", folder / f"{source}-{kind}")
        for source, prefix in PREFIXES.items()
        for kind in ("transformer", "tokenizer")
    }
    for name in ("base", "forward"):
        paths["unlockmgm", name] = checkpoint(GOLDEN / f"unlockmgm/{name}_tiny.json", folder / name)
    return paths


@pytest.fixture(scope="session")
def pipelines(files, tmp_path_factory):
    """A pipeline of each project that has goldens of both parts."""
    folder = tmp_path_factory.mktemp("google_converted")
    for source in PREFIXES:
        # The number of codes, hence of classes, is the tokenizer's.
        parts = ["--transformer", files[source, "transformer"], "--tokenizer", files[source, "tokenizer"]]
        heads = ["--num_attention_heads", 4] if source == "maskgit-torch" else []
        assert convert(source, *parts, *heads, "--output_dir", folder / source) == 0
    return folder


# Published numbers, through the command line


def check_logits(model, case, codes, mask):
    source_ids = case["in.input_ids"]
    assert model.config.codebook_size == codes
    input_ids = torch.where(source_ids[:, 1:] == mask, codes, source_ids[:, 1:])
    assert (input_ids == codes).any()
    with torch.no_grad():
        output = model(input_ids, source_ids[:, 0] - codes, full_vocabulary=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, case["out.logits"][:, 1:], atol=5e-5, rtol=0)
    for name in ("out.last_hidden_state", "out.hidden_states"):
        if name in case:
            torch.testing.assert_close(output.last_hidden_state, case[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", PREFIXES)
def test_transformer_computes_the_published_logits(source, pipelines):
    model = MaskGitBertTransformer2DModel.from_pretrained(pipelines / source, subfolder="transformer")
    published = golden(f"{PREFIXES[source]}_transformer_tiny")["model"]
    for name in ("num_classes", "hidden_size", "num_attention_heads", "intermediate_size"):
        assert model.config[name] == published[name]
    assert model.config.num_layers == published["num_hidden_layers"] and model.config.sample_size == 4
    check_logits(model, golden(f"{PREFIXES[source]}_transformer_tiny", "safetensors"), 32, 42)


def test_base_of_unlockmgm_computes_the_published_logits(files, tmp_path):
    assert convert("unlockmgm", "--transformer", files["unlockmgm", "base"], "--output_dir", tmp_path / "out") == 0
    model = MaskGitBertTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert model.config.norm_eps == 1e-12 and model.config.activation_fn == "gelu"
    # Fine-tuning trains adapters with the dropouts of the original.
    assert model.config.dropout == 0.1 and not model.config.attention_out_dropout
    check_logits(model, golden("unlockmgm/base_tiny", "safetensors"), 1024, 1034)


@pytest.mark.parametrize("source", PREFIXES)
def test_tokenizer_computes_the_published_codes_and_images(source, pipelines):
    model = MaskGitVQModel.from_pretrained(pipelines / source, subfolder="vqvae")
    case = golden(f"{PREFIXES[source]}_tokenizer_tiny", "safetensors")
    if source == "maskgit-jax":
        floats = [name for name, tensor in case.items() if tensor.ndim == 4]
        case |= {name: case[name].permute(0, 3, 1, 2) for name in floats}

    def decode(tokens):
        return model.decode(tokens, force_not_quantize=True, shape=(2, 4, 4, 16)).sample * 0.5 + 0.5

    with torch.no_grad():
        latents = model.encode(case["in.image"] * 2 - 1).latents
        indices = model.quantize(latents)[2][2].view(2, 4, 4)
        reconstruction, decoded = decode(case["out.indices"]), decode(case["in.indices"])
    torch.testing.assert_close(latents, case["out.encoded"], atol=1e-4, rtol=0)
    assert torch.equal(indices, case["out.indices"])
    torch.testing.assert_close(reconstruction, case["out.reconstruction"], atol=5e-5, rtol=0)
    torch.testing.assert_close(decoded, case["out.decoded_from_indices"], atol=5e-5, rtol=0)


def test_numerical_differences_between_the_projects(pipelines):
    """Google's activation is an approximation that the ports do not have, and maskgit-torch's norms have another eps."""
    configs = {}
    for source in PREFIXES:
        transformer = MaskGitBertTransformer2DModel.load_config(pipelines / source, subfolder="transformer")
        vqvae = MaskGitVQModel.load_config(pipelines / source, subfolder="vqvae")
        configs[source] = transformer["activation_fn"], transformer["norm_eps"], vqvae["norm_eps"]
    assert configs == {"maskgit-jax": ("gelu-approximate", 1e-12, 1e-6), "maskgit-torch": ("gelu", 1e-12, 1e-5)}


# Names: the layouts written out once more, from sizes


def tokenizer_names(levels, layers, widths, latent, codes):
    """Every tensor of a tokenizer: its names in Flax, maskgit-torch and open-muse, and its shape in PyTorch."""

    def convolution(flax, torch_port, muse, *shape, bias):
        yield f"{flax}/kernel", f"{torch_port}.weight", f"{muse}.weight", shape
        if bias:
            yield f"{flax}/bias", f"{torch_port}.bias", f"{muse}.bias", shape[:1]

    def norm(flax, torch_port, muse, width):
        yield f"{flax}/scale", f"{torch_port}.weight", f"{muse}.weight", (width,)
        yield f"{flax}/bias", f"{torch_port}.bias", f"{muse}.bias", (width,)

    def block(flax, torch_port, muse, before, width):
        yield from norm(f"{flax}/GroupNorm_0", f"{torch_port}.norm0", f"{muse}.norm1", before)
        names = f"{flax}/Conv_0", f"{torch_port}.conv0", f"{muse}.conv1"
        yield from convolution(*names, width, before, 3, 3, bias=False)
        yield from norm(f"{flax}/GroupNorm_1", f"{torch_port}.norm1", f"{muse}.norm2", width)
        names = f"{flax}/Conv_1", f"{torch_port}.conv1", f"{muse}.conv2"
        yield from convolution(*names, width, width, 3, 3, bias=False)
        if before != width:
            names = f"{flax}/Conv_2", f"{torch_port}.conv_res", f"{muse}.nin_shortcut"
            yield from convolution(*names, width, width, 1, 1, bias=False)

    encoder, decoder = ["encoder.conv_in"] * 2, ["decoder.conv_in"] * 2
    yield from convolution("encoder/Conv_0", *encoder, widths[0], 3, 3, 3, bias=False)
    before = widths[0]
    for n in range(levels * layers + layers):
        level, i = divmod(n, layers)
        width = widths[min(level, levels - 1)]
        muse = f"encoder.down.{level}.block.{i}" if level < levels else f"encoder.mid.{i}"
        yield from block(f"encoder/ResBlock_{n}", f"encoder.res_blocks.{level}.{i}", muse, before, width)
        before = width
    yield from norm("encoder/GroupNorm_0", *["encoder.norm_out"] * 2, widths[-1])
    yield from convolution("encoder/Conv_1", *["encoder.conv_out"] * 2, latent, widths[-1], 1, 1, bias=True)
    yield "quantizer/codebook", "quantizer.codebook.weight", "quantize.embedding.weight", (codes, latent)
    yield from convolution("decoder/Conv_0", *decoder, widths[-1], latent, 3, 3, bias=True)
    before = widths[-1]
    for n in range(layers + levels * layers):
        group, i = divmod(n, layers)
        level = levels - max(group, 1)
        muse = f"decoder.up.{level}.block.{i}" if group else f"decoder.mid.{i}"
        yield from block(f"decoder/ResBlock_{n}", f"decoder.res_blocks.{group}.{i}", muse, before, widths[level])
        before = widths[level]
    for j in range(1, levels):
        names = f"decoder/Conv_{j}", f"decoder.res_blocks.{j}.{layers + 1}", f"decoder.up.{levels - j}.upsample_conv"
        yield from convolution(*names, widths[levels - j], widths[levels - j], 3, 3, bias=True)
    yield from norm("decoder/GroupNorm_0", *["decoder.norm_out"] * 2, widths[0])
    yield from convolution(f"decoder/Conv_{levels}", *["decoder.conv_out"] * 2, 3, widths[0], 3, 3, bias=True)


@pytest.mark.parametrize(
    "layers, widths",
    [(1, [32, 64]), (3, [32, 32, 64, 96]), (2, [64, 32]), (2, [32]), (1, [32, 32, 64, 64, 128])],
)
def test_the_three_layouts_of_a_tokenizer_agree(layers, widths):
    generator = torch.Generator().manual_seed(0)
    projects = {}, {}, {}
    for *names, shape in tokenizer_names(len(widths), layers, widths, latent=8, codes=12):
        tensor = torch.randn(shape, generator=generator)
        for project, name in zip(projects, names):
            project[name] = tensor.permute(2, 3, 1, 0) if name.endswith("kernel") else tensor
    flax, torch_port, muse = projects
    converted = convert_flax_tokenizer(flax), convert_torch_tokenizer(torch_port), convert_muse_tokenizer(muse, {})
    model = MaskGitVQModel(**converted[0].config)
    assert model.config.block_out_channels == widths and model.config.layers_per_block == layers
    model.load_state_dict(converted[0].state_dict)
    for other in converted[1:]:
        assert other.config | {"norm_eps": 1e-6} == converted[0].config
        assert other.state_dict.keys() == converted[0].state_dict.keys()
        assert all(torch.equal(tensor, converted[0].state_dict[name]) for name, tensor in other.state_dict.items())
    assert converted[2].config["norm_eps"] == 1e-6
    assert all(tensor.is_contiguous() for one in converted for tensor in one.state_dict.values())


def test_published_tokenizer_files_are_covered():
    """The names of the published sizes are those of the published files: 168 tensors, two odd ones spelled out."""
    rows = list(tokenizer_names(5, 2, [128, 128, 256, 256, 512], 256, 1024))
    assert len(rows) == 168
    assert {names[0]: names[3] for names in rows if "Conv_2/" in names[0] and "ResBlock" in names[0]} == {
        "encoder/ResBlock_4/Conv_2/kernel": (256, 256, 1, 1),
        "encoder/ResBlock_8/Conv_2/kernel": (512, 512, 1, 1),
        "decoder/ResBlock_4/Conv_2/kernel": (256, 256, 1, 1),
        "decoder/ResBlock_8/Conv_2/kernel": (128, 128, 1, 1),
    }


def other_transformers(flax):
    """A Flax transformer's tensors as maskgit-torch's and open-muse's converters store them."""
    ends = {
        "Embed_0/word_embeddings/embedding": ("tok_emb.weight", "embed.word_embeddings.weight"),
        "Embed_0/position_embeddings/embedding": ("pos_emb", "embed.position_embeddings.weight"),
        "Embed_0/embeddings_ln/scale": ("emb_ln.weight", "embed.embeddings_ln.weight"),
        "Embed_0/embeddings_ln/bias": ("emb_ln.bias", "embed.embeddings_ln.bias"),
        "MlmLayer_0/mlm_dense/kernel": ("Token_Prediction.0.weight", "mlm_layer.mlm_dense.weight"),
        "MlmLayer_0/mlm_dense/bias": ("Token_Prediction.0.bias", "mlm_layer.mlm_dense.bias"),
        "MlmLayer_0/mlm_ln/scale": ("Token_Prediction.2.weight", "mlm_layer.mlm_ln.weight"),
        "MlmLayer_0/mlm_ln/bias": ("Token_Prediction.2.bias", "mlm_layer.mlm_ln.bias"),
        "MlmLayer_0/mlm_bias/bias": ("bias", "mlm_layer.to_logits.bias"),
    }
    layer = {
        "Attention_0/attention_output_ln": ("AttentionLN", "attn_layer_norm"),
        "Mlp_0/intermediate_output": ("MLP.0", "ffn.intermediate_output"),
        "Mlp_0/layer_output": ("MLP.2", "ffn.layer_output"),
        "Mlp_0/layer_output_ln": ("MlpLN", "ffn.layer_norm"),
    }

    def plain(name):
        return flax[name].T if name.endswith("kernel") else flax[name]

    torch_port = {names[0]: plain(name) for name, names in ends.items()}
    muse = {names[1]: plain(name) for name, names in ends.items()}
    muse["mlm_layer.to_logits.weight"] = muse["embed.word_embeddings.weight"].clone()
    for i in range(sum(name.endswith("query/kernel") for name in flax)):
        for name, (torch_name, muse_name) in layer.items():
            for old, new in {"kernel": "weight", "scale": "weight", "bias": "bias"}.items():
                source = f"TransformerLayer_{i}/{name}/{old}"
                if source in flax:
                    torch_port[f"blocks.{i}.{torch_name}.{new}"] = plain(source)
                    muse[f"transformer_layers.{i}.{muse_name}.{new}"] = plain(source)
        attention = {
            name: (flax[f"{prefix}/kernel"], flax[f"{prefix}/bias"].flatten())
            for name in ("query", "key", "value", "out")
            for prefix in [f"TransformerLayer_{i}/Attention_0/self_attention/{name}"]
        }
        hidden = attention["query"][0].shape[0]
        attention = {
            name: (kernel.reshape(-1, hidden).T if name == "out" else kernel.reshape(hidden, -1).T, bias)
            for name, (kernel, bias) in attention.items()
        }
        for kind, (suffix, joined) in enumerate((("weight", "in_proj_weight"), ("bias", "in_proj_bias"))):
            for name, tensors in attention.items():
                muse[f"transformer_layers.{i}.attention.{name}.{suffix}"] = tensors[kind]
            torch_port[f"blocks.{i}.MultiHeadAttention.out_proj.{suffix}"] = attention["out"][kind]
            torch_port[f"blocks.{i}.MultiHeadAttention.{joined}"] = torch.cat(
                [attention[name][kind] for name in ("query", "key", "value")]
            )
    return torch_port, muse


def test_the_three_layouts_of_a_transformer_agree():
    flax = state_dict(golden("maskgit_google/flax_transformer_tiny"))
    torch_port, muse = other_transformers(flax)
    config = {"codebook_size": 32, "num_classes": 10, "num_attention_heads": 4, "layer_norm_eps": 1e-12}
    converted = (
        convert_flax_transformer(flax, codebook_size=32),
        convert_torch_transformer(torch_port, num_attention_heads=4, num_classes=10),
        convert_muse_transformer(muse, config),
    )
    MaskGitBertTransformer2DModel(**converted[0].config).load_state_dict(converted[0].state_dict)
    for other in converted[1:]:
        assert other.state_dict.keys() == converted[0].state_dict.keys()
        assert all(torch.equal(tensor, converted[0].state_dict[name]) for name, tensor in other.state_dict.items())
        differing = {name for name, value in other.config.items() if converted[0].config.get(name) != value}
        assert differing <= {"activation_fn", "attention_out_dropout", "dropout"}
    assert converted[2].dropped == ["mlm_layer.to_logits.weight (the same as embed.word_embeddings.weight)"]
    assert all(tensor.is_contiguous() for one in converted for tensor in one.state_dict.values())


# Pipelines and cards


def test_both_parts_make_a_pipeline(pipelines):
    for source in PREFIXES:
        pipe = MaskGitPipeline.from_pretrained(pipelines / source)
        pipe.set_progress_bar_config(disable=True)
        assert isinstance(pipe.scheduler, ConfidenceScheduler) and pipe.scheduler.config.mask_token_id == 32
        assert pipe.scheduler.config.masking_schedule == "cosine" and pipe.scheduler.config.choice_temperature == 4.5
        assert pipe.config.call_defaults == {"num_inference_steps": 16} and pipe.config.id2label is None
        images = pipe([1, 9], generator=torch.Generator().manual_seed(0), output_type="np").images
        assert images.shape == (2, 16, 16, 3)
        with pytest.raises(ValueError, match="guidance_scale"):
            pipe(1, guidance_scale=2.0)
        for folder, name in (("transformer", "transformer_bert.py"), ("vqvae", "vq_maskgit.py")):
            assert (pipelines / source / folder / name).is_file(), "loading without the package needs the source"
        text = (pipelines / source / "README.md").read_text()
        assert ModelCard(text).data.license == "apache-2.0"
        assert text.count("@inproceedings") == 1 and "chang2022maskgit" in text and "MaskGitVQModel`, 4 x 4" in text
        assert "FID" not in text, "a result of another model"


def test_unlockmgm_pipeline(files, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    flax = state_dict(golden("maskgit_google/flax_tokenizer_tiny"))
    rows = tokenizer_names(3, 2, [32, 32, 64], 16, 1024)
    weights = {row[2]: flax[row[0]].permute(3, 2, 0, 1) if row[0].endswith("kernel") else flax[row[0]] for row in rows}
    weights["quantize.embedding.weight"] = torch.randn(1024, 16)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tokenizer / "model.safetensors")
    (tokenizer / "config.json").write_text(json.dumps({"_class_name": "MaskGitVQGAN", "resolution": 16}))
    parts = ["--transformer", files["unlockmgm", "base"], "--tokenizer", tokenizer]
    assert convert("unlockmgm", *parts, "--output_dir", tmp_path / "out") == 0
    pipe = MaskGitPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, SelfGuidedScheduler) and pipe.scheduler.config.choice_temperature == 4.5
    assert pipe(3, output_type="np").images.shape == (1, 16, 16, 3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("chang2022maskgit") == 1 and "hur2024unlocking" in text and "no licence file" in text


@pytest.mark.parametrize("source", [*PREFIXES, "unlockmgm"])
@pytest.mark.parametrize("sample_size, image_size", [(16, 256), (32, 512)])
def test_published_sizes_have_their_results(source, sample_size, image_size):
    with torch.device("meta"):
        transformer = MaskGitBertTransformer2DModel(sample_size=sample_size).config
        tokenizer = dict(MaskGitVQModel().config) | {"block_out_channels": [128, 128, 256, 256, 512]}
    card = describe_transformer(source, transformer)
    assert card.title.endswith(f", {image_size} px") and "not measured on this conversion" in card.results
    fid = {"maskgit-torch": {256: "6.10", 512: "7.04"}}.get(source, {256: "6.06", 512: "7.32"})[image_size]
    assert f"| {fid} |" in card.results and "Google" in card.training
    assert describe_tokenizer(source, tokenizer).results
    smaller = dict(transformer) | {"num_layers": 12}
    assert not describe_transformer(source, smaller).results and not describe_transformer(source, smaller).training
    assert not describe_tokenizer(source, tokenizer | {"num_vq_embeddings": 512}).results


# What tensors do not tell


def test_codes_and_classes(files, tmp_path, capsys):
    path = files["maskgit-jax", "transformer"]
    arguments = ["maskgit-jax", "--transformer", path, "--output_dir", tmp_path / "out"]
    message = refused(capsys, *arguments)
    assert "43 rows" in message and "--codebook_size K or --num_classes N" in message
    assert "do not make the 43" in refused(capsys, *arguments, "--codebook_size", 32, "--num_classes", 9)
    assert "do not make the 43" in refused(capsys, *arguments, "--codebook_size", 42)
    assert "do not make the 43" in refused(capsys, *arguments, "--num_classes", 0)
    assert not (tmp_path / "out").exists()
    for i, option in enumerate((["--codebook_size", 32], ["--num_classes", 10])):
        assert convert(*arguments[:-1], tmp_path / str(i), *option) == 0
        config = MaskGitBertTransformer2DModel.load_config(tmp_path / str(i), subfolder="transformer")
        assert (config["codebook_size"], config["num_classes"]) == (32, 10)
    flax = state_dict(golden("maskgit_google/flax_transformer_tiny"))
    flax |= {
        "Embed_0/word_embeddings/embedding": torch.randn(2025, 64),
        "MlmLayer_0/mlm_bias/bias": torch.randn(2025),
    }
    published = convert_flax_transformer(flax).config
    assert (published["codebook_size"], published["num_classes"]) == (1024, 1000)


def test_heads(files, tmp_path, capsys):
    arguments = ["maskgit-torch", "--transformer", files["maskgit-torch", "transformer"], "--codebook_size", 32]
    arguments += ["--output_dir", tmp_path / "out"]
    assert "5 attention heads do not divide the 64 channels" in refused(capsys, *arguments, "--num_attention_heads", 5)
    assert "no published model is 64 channels wide" in refused(capsys, *arguments)
    weights = state_dict(golden("maskgit_google/hmori_transformer_tiny"))
    for name, tensor in weights.items():  # the published width
        sizes = [size if size in (10, 17, 32, 43, 128) else size * 12 for size in tensor.shape]
        weights[name] = torch.zeros(sizes)
    assert convert_torch_transformer(weights, codebook_size=32).config["num_attention_heads"] == 16
    flax = state_dict(golden("maskgit_google/flax_transformer_tiny"))
    flax = {name: tensor for name, tensor in flax.items() if "self_attention" not in name}
    for i in range(2):
        for name in ("query", "key", "value"):
            flax[f"TransformerLayer_{i}/Attention_0/self_attention/{name}/kernel"] = torch.zeros(64, 4, 12)
            flax[f"TransformerLayer_{i}/Attention_0/self_attention/{name}/bias"] = torch.zeros(4, 12)
        flax[f"TransformerLayer_{i}/Attention_0/self_attention/out/kernel"] = torch.zeros(4, 12, 64)
        flax[f"TransformerLayer_{i}/Attention_0/self_attention/out/bias"] = torch.zeros(64)
    assert "4 heads of 12 channels" in refusal(convert_flax_transformer, flax, codebook_size=32)


def test_rectangular_grid():
    flax = state_dict(golden("maskgit_google/flax_transformer_tiny"))
    flax["Embed_0/position_embeddings/embedding"] = torch.randn(13, 64)
    assert "--sample_size H W" in refusal(convert_flax_transformer, flax, codebook_size=32)
    message = refusal(convert_flax_transformer, flax, codebook_size=32, sample_size=(2, 5))
    assert "no grid of the 12" in message and "Embed_0/position_embeddings/embedding" in message
    assert convert_flax_transformer(flax, codebook_size=32, sample_size=(3, 4)).config["sample_size"] == (3, 4)


def test_muse_config():
    manifest = golden("unlockmgm/base_tiny")
    weights, config = state_dict(manifest), manifest["config"]

    def without(*names):
        return {name: value for name, value in config.items() if name not in names}

    plain = convert_muse_transformer(weights, without("layer_norm_eps", "hidden_dropout")).config
    assert plain["norm_eps"] == 1e-5 and plain["dropout"] == 0.0  # open-muse's own defaults
    assert "num_attention_heads" in refusal(convert_muse_transformer, weights, config | {"num_attention_heads": "4"})
    assert "3 attention heads" in refusal(convert_muse_transformer, weights, config | {"num_attention_heads": 3})
    assert "codebook_size" in refusal(convert_muse_transformer, weights, without("codebook_size"))
    for name, wrong in (
        ("layer_norm_eps", math.nan),
        ("layer_norm_eps", math.inf),
        ("hidden_dropout", 1.5),
        ("hidden_dropout", -0.1),
        ("num_classes", True),
    ):
        assert f"{name} in the config.json is" in refusal(convert_muse_transformer, weights, config | {name: wrong})
    for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "num_hidden_layers"):
        message = refusal(convert_muse_transformer, weights, config | {name: config[name] + 1})
        assert f"{name} in the config.json is {config[name] + 1}, but {config[name]} by the tensors" in message
    assert "do not make the 1035" in refusal(convert_muse_transformer, weights, config | {"num_classes": 11})
    assert "mask_token_id" in refusal(convert_muse_transformer, weights, config | {"mask_token_id": 1024})
    assert "1000 classes" in refusal(convert_muse_transformer, weights, {})
    untied = weights | {"mlm_layer.to_logits.weight": 2 * weights["mlm_layer.to_logits.weight"]}
    assert "to_logits.weight differs" in refusal(convert_muse_transformer, untied, config)


# Files


def test_adapter_and_transformer_of_one_file(files, tmp_path, capsys):
    manifest = golden("unlockmgm/forward_tiny")
    weights = state_dict(manifest)
    base, toast = split_toast(weights)
    assert len(toast) == 8 + 2 * 3 and len(base) + len(toast) == len(weights)
    assert convert_muse_transformer(base, manifest["config"]).config["num_layers"] == 3
    arguments = ["unlockmgm", "--transformer", files["unlockmgm", "forward"], "--output_dir", tmp_path / "out"]
    assert "self-guidance adapter" in refused(capsys, *arguments)


def test_muse_folders(tmp_path, capsys):
    manifest = golden("unlockmgm/base_tiny")

    def write(folder, **weights):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(manifest["config"]))
        torch.save(weights or {"name": torch.ones(2)}, folder / "pytorch_model.bin")

    outer = tmp_path / "archive" / "results" / "checkpoint-50000"
    assert "holds no model" in refusal(read_muse_folder, tmp_path)
    write(outer / "unwrapped_model", raw=torch.zeros(2))
    assert read_muse_folder(tmp_path)[0].keys() == {"raw"}  # the only one
    write(outer / "ema_model", averaged=torch.zeros(2))
    weights, others, config = read_muse_folder(tmp_path)
    assert weights.keys() == {"averaged"} and others == [] and config == manifest["config"]
    assert read_muse_folder(outer / "unwrapped_model")[0].keys() == {"raw"}
    write(tmp_path / "archive" / "results" / "checkpoint-60000" / "ema_model")
    message = refusal(read_muse_folder, tmp_path)
    assert "several" in message and "checkpoint-50000" in message and "checkpoint-60000" in message

    alone = tmp_path / "alone"
    alone.mkdir()
    torch.save({"name": torch.ones(2)}, alone / "maskgit-vqgan-imagenet-f16-256.bin")
    assert read_muse_folder(alone / "maskgit-vqgan-imagenet-f16-256.bin")[2] == {}
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(outer / "ema_model" / "config.json")
    for path, expected in ((tmp_path / "model.zip", "extract"), (tmp_path / "nowhere", "not there")):
        assert expected in refused(capsys, "unlockmgm", "--tokenizer", path, "--output_dir", tmp_path / "out")
    for text, expected in (("{", "no JSON"), ("[]", "not the config")):
        (outer / "ema_model" / "config.json").write_text(text)
        assert expected in refusal(read_muse_folder, outer / "ema_model")


def write_flax(path, tree):
    def pack(tensor):
        values = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        name = str(tensor.dtype).removeprefix("torch.")
        return msgpack.ExtType(1, msgpack.packb((tuple(tensor.shape), name, values)))

    path.write_bytes(msgpack.packb(tree, default=pack, strict_types=True))
    return path


def test_flax_reader(tmp_path, files):
    expected = arrays(golden("maskgit_google/flax_transformer_tiny"))
    weights, others = read_flax(files["maskgit-jax", "transformer"])
    assert weights.keys() == expected.keys() and others == []
    assert all((weights[name].numpy() == array).all() for name, array in expected.items())

    tree = {"params": {"a": {"kernel": torch.ones(2, 3, dtype=torch.bfloat16)}, "step": 3}}
    tree |= {"opt_state": {"count": msgpack.ExtType(3, b"x"), "nothing": None}, "step": 7}
    weights, others = read_flax(write_flax(tmp_path / "more", tree))
    assert weights.keys() == {"a/kernel"} and others == ["opt_state", "step", "step"]
    assert weights["a/kernel"].dtype == torch.bfloat16 and weights["a/kernel"].shape == (2, 3)


def test_googles_tokenizer_serves_open_muses_transformers(files, tmp_path):
    # None is published in open-muse's format for 512 px.
    file = files["maskgit-jax", "tokenizer"]
    assert not file.suffix
    assert convert("unlockmgm", "--tokenizer", file, "--output_dir", tmp_path / "muse") == 0
    assert convert("maskgit-jax", "--tokenizer", file, "--output_dir", tmp_path / "google") == 0
    parts = [MaskGitVQModel.from_pretrained(tmp_path / name, subfolder="vqvae") for name in ("muse", "google")]
    assert parts[0].config == parts[1].config | {"_name_or_path": parts[0].config["_name_or_path"]}
    for name, tensor in parts[0].state_dict().items():
        assert torch.equal(tensor, parts[1].state_dict()[name])
    card = (tmp_path / "muse" / "README.md").read_text()
    assert "[google-research/maskgit]" in card and "UnlockMGM" not in card


@pytest.mark.parametrize("kind", ["transformer", "tokenizer"])
def test_files_that_are_no_flax_checkpoints(kind, files, tmp_path, capsys, monkeypatch):
    good = files["maskgit-jax", kind].read_bytes()
    other = files["maskgit-jax", "tokenizer" if kind == "transformer" else "transformer"]
    old_pickle = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(3)}, old_pickle, _use_new_zipfile_serialization=False)
    cases = {
        tmp_path / "missing": (None, "not there"),
        tmp_path / "empty": (b"", "no Flax checkpoint, or a damaged one"),
        tmp_path / "text": (b"# not weights\n" * 50, "no Flax checkpoint, or a damaged one"),
        tmp_path / "truncated": (good[: len(good) // 2], "no Flax checkpoint, or a damaged one"),
        tmp_path / "cut": (good[:-1], "no Flax checkpoint, or a damaged one"),
        tmp_path / "longer": (good + b"x", "no Flax checkpoint, or a damaged one"),
        tmp_path / "foreign": (msgpack.packb({"model": {"a": 1}, "epoch": 3}), "no 'params'.* a dict of model, epoch"),
        tmp_path / "list": (msgpack.packb([1, 2]), "no 'params'.* list"),
        tmp_path / "empty_params": (msgpack.packb({"params": {}}), "missing: "),
        files["maskgit-torch", kind]: (None, "zip file, as PyTorch's are"),
        old_pickle: (None, "no Flax checkpoint, or a damaged one"),
        other: (None, "these are not the tensors of a Flax MaskGIT " + kind),
        tmp_path: (None, "a folder"),
    }
    for path, (content, expected) in cases.items():
        if content is not None:
            path.write_bytes(content)
        message = refused(capsys, "maskgit-jax", f"--{kind}", path, "--output_dir", tmp_path / "out")
        assert str(path) in message
        assert all(part in message for part in expected.split(".*")), message
    path = files["maskgit-jax", kind]
    assert "no checkpoint" in refused(capsys, "maskgit-torch", f"--{kind}", path, "--output_dir", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "msgpack", None)
    message = refused(capsys, "maskgit-jax", f"--{kind}", path, "--output_dir", tmp_path / "out")
    assert "pip install msgpack" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_renamed_or_misshapen_tensor_is_named(tmp_path, capsys):
    manifest = golden("maskgit_google/flax_tokenizer_tiny")
    name = "decoder/ResBlock_3/Conv_1/kernel"
    for change, expected in (
        (
            lambda spec: manifest["weights"].update({name[:-6] + "weight": spec}),
            f"missing: {name}; unknown: {name[:-6]}w",
        ),
        (
            lambda spec: manifest["weights"].update({name: spec | {"shape": [3, 3, 64, 65]}}),
            f"wrong: {name} (3 x 3 x 64 x 65 instead of 3 x 3 x 64 x 64)",
        ),
    ):
        manifest = golden("maskgit_google/flax_tokenizer_tiny")
        change(manifest["weights"].pop(name))
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        path = checkpoint(tmp_path / "manifest.json", tmp_path / "checkpoint")
        message = refused(capsys, "maskgit-jax", "--tokenizer", path, "--output_dir", tmp_path / "out")
        assert expected in message, message
    assert not (tmp_path / "out").exists()


CONVERSIONS = {
    "maskgit_google/flax_transformer_tiny": (lambda weights: convert_flax_transformer(weights, codebook_size=32), 1),
    "maskgit_google/hmori_transformer_tiny": (lambda weights: convert_torch_transformer(weights, 4, 32), 1),
    "unlockmgm/base_tiny": (
        lambda weights: convert_muse_transformer(weights, golden("unlockmgm/base_tiny")["config"]),
        5,
    ),
    "maskgit_google/flax_tokenizer_tiny": (convert_flax_tokenizer, 5),
    "maskgit_google/hmori_tokenizer_tiny": (convert_torch_tokenizer, 5),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_each_tensor_is_checked(name):
    function, step = CONVERSIONS[name]
    published = state_dict(golden(name))
    # The only tensors of a size, or the only two, of which cannot be told which one is wrong.
    alone = {"quantizer/codebook", "quantizer.codebook.weight", "Embed_0/position_embeddings/embedding", "pos_emb"}
    alone |= {"embed.position_embeddings.weight"}
    pair = {"Embed_0/word_embeddings/embedding", "MlmLayer_0/mlm_bias/bias", "tok_emb.weight", "bias"}
    for key in list(published)[::step]:
        tensor = published[key]
        message = refusal(function, {n if n != key else n + "_": t for n, t in published.items()})
        assert f"missing: {key}; unknown: {key}_." in message
        for wrong in (tensor[None], torch.full_like(tensor, torch.nan), tensor.long(), tensor[..., None]):
            assert f"wrong: {key} (" in refusal(function, published | {key: wrong})
        message = "" if key in alone else refusal(function, published | {key: tensor[:-1]})
        if key in pair:
            assert all(name in message for name in pair & published.keys()) and "do not fit together" in message
        elif key not in alone:
            assert f"wrong: {key} (" in message
