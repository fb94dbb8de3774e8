import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import checkpoint, state_dict
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from maskgit import HaltonScheduler, MaskGitPipeline, PartitionTransformer2DModel
from maskgit.conversion import ConversionError
from maskgit.conversion.pgm import call_defaults, check_fit, convert_pgm_transformer, describe_transformer


GOLDEN = Path(__file__).parent / "golden" / "pgm"
SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_to_diffusers.py"
TRAINED = ("tiny_train", "tiny_mlp4_train", "tiny_mean_train", "tiny_interleave_train")
SAMPLED = ("tiny_infer", "tiny_infer_ragged", "tiny_infer_published_lengths", "tiny_mlp4_infer", "tiny_mean_infer")
SAMPLED += ("tiny_mean_infer_ragged", "tiny_interleave_infer")

spec = importlib.util.spec_from_file_location("convert_to_diffusers", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def manifest_of(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def convert(*arguments):
    """Runs the command in this process; its exit code."""
    try:
        script.main(["pgm", *map(str, arguments)])
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


@pytest.fixture(scope="module")
def convert_case(tmp_path_factory):
    """The golden checkpoint of a case, rebuilt, converted by the command and loaded."""

    def convert_case(name, **config):
        folder = tmp_path_factory.mktemp(name)
        published = manifest_of(name)["model"]
        file = checkpoint(GOLDEN / f"{name}.json", folder / "file.ckpt")
        side, mode = published["grid"], published["pre_query_mode"]
        options = ["--sample_size", side, side] + (["--query_mode", mode] if mode != "learn+freqs" else [])
        assert convert("--transformer", file, *options, "--output_dir", folder / "out") == 0
        model = PartitionTransformer2DModel.from_pretrained(folder / "out", subfolder="transformer", **config)
        assert model.config.codebook_size == published["codebook_size"]
        assert model.config.num_attention_heads == published["n_heads"]
        assert model.config.query_processor == published["query_process_mode"]
        return model, load_file(GOLDEN / f"{name}.safetensors")

    return convert_case


def without_mask(logits, codebook_size):
    """The published logits but for the mask token's, which stands between the codes' and BOS's."""
    return torch.cat([logits[..., :codebook_size], logits[..., codebook_size + 1 :]], dim=-1)


@pytest.mark.parametrize("name", TRAINED)
def test_training_computes_the_published_logits_loss_and_gradients(name, convert_case):
    model, case = convert_case(name)
    labels = case["in.labels"].masked_fill(case["in.drop_label"], model.config.num_classes)
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, key=key: outputs.update({key: output}))
        for key, module in (("encoder", model.transformer_blocks[-1]), ("group_swap", model.group_swap))
    ]
    tokens, groups = case["in.tokens"][:, 1:], case["in.group_idxs"][:, 1:]  # without BOS
    logits = model(tokens, labels, group_ids=groups, full_vocabulary=True).logits
    for hook in hooks:
        hook.remove()
    expected = without_mask(case["out.logits"][:, 1:], model.config.codebook_size)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(outputs["encoder"], case["out.encoder_output"], atol=2e-4, rtol=0)
    queried = outputs["group_swap"].shape[1]
    torch.testing.assert_close(outputs["group_swap"], case["out.group_swap_output"][:, -queried:], atol=2e-4, rtol=0)

    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss, case["out.loss"], atol=2e-5, rtol=0)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    torch.testing.assert_close(norm, case["out.grad_norm"], atol=1e-4, rtol=1e-4)
    for name, expected in (
        ("group_swap.query_embed", case["out.grad.decoder.group_swap.base_embedding"][0]),
        ("proj_out.bias", case["out.grad.output_layer.linear.bias"][: model.config.codebook_size]),
        ("proj_bos.bias", case["out.grad.output_layer.linear.bias"][model.config.codebook_size + 1 :]),
    ):
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=2e-5, rtol=1e-4)
    registers = case["out.grad.reg_tokens.weight"]
    torch.testing.assert_close(model.prefix_embed.weight.grad[: len(registers)], registers, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_computes_the_published_logits(name, convert_case):
    published_lengths = name.endswith("published_lengths")
    model, case = convert_case(name, published_lengths=published_lengths)
    codebook_size = model.config.codebook_size
    labels = case["in.labels"].masked_fill(case["in.drop_label"], model.config.num_classes)
    counts = case["in.concrete_lengths"] - (0 if published_lengths else model.config.num_register_tokens // 2)
    input_ids = torch.full_like(case["in.tokens"][:, 1:], codebook_size)
    for image, count, positions, tokens in zip(input_ids, counts, case["in.clean_positions"], case["in.clean_tokens"]):
        image[positions[1:count] - 1] = tokens[1:count]  # the first is BOS, at 0
    positions = (case["in.noisy_positions"] - 1).clamp(min=0)
    known_positions = case["in.clean_positions"][:, 1:] - 1 if published_lengths else None
    with torch.no_grad():
        logits = model(input_ids, labels, positions, known_positions=known_positions, full_vocabulary=True).logits
    expected = without_mask(case["out.logits"], codebook_size)
    queried = torch.arange(positions.shape[1]) < case["in.query_lengths"][:, None]
    torch.testing.assert_close(logits[queried], expected[queried], atol=2e-4, rtol=0)


def test_published_confidence_sampler_starts_as_published(convert_case):
    """Its first step; later it may draw the mask token and go on from that, which is not possible here."""
    model, case = convert_case("sample_confidence", published_lengths=True)
    codebook_size = model.config.codebook_size
    nothing = torch.full_like(case["out.codes_published"], codebook_size)
    with torch.no_grad():
        logits = model(nothing, case["in.labels"]).logits  # guidance is off in the first step
    expected = case["out.probs_first_published"][..., :codebook_size]
    torch.testing.assert_close(logits.softmax(-1), expected / expected.sum(-1, keepdim=True), atol=2e-4, rtol=0)


def test_decoder_is_read_from_names():
    def names(own):
        weights = {}
        for name, tensor in state_dict(manifest_of("tiny_interleave_train")).items():
            for i in range(4):
                source = 1 if i in own else 0  # the first block is cross-attention, the second self-attention
                if name.startswith(f"decoder.layers.{source}."):
                    weights[name.replace(f"layers.{source}.", f"layers.{i}.")] = tensor
            if not name.startswith("decoder.layers."):
                weights[name] = tensor
        return weights

    kinds = {1: "attn_qkv", 0: "attn_kv"}
    interleaved = state_dict(manifest_of("tiny_interleave_train"))
    assert all(f"decoder.layers.{i}.{kind}.weight" in interleaved for i, kind in kinds.items())
    for own in ([], [0, 2], [1, 3], [2, 3], [0, 1, 2, 3]):
        converted = convert_pgm_transformer(names(own), sample_size=(4, 4))
        assert (converted.config["self_attention_layers"] or []) == own
        model = PartitionTransformer2DModel(**converted.config)
        model.load_state_dict(converted.state_dict)


def test_rotary_frequencies_are_those_of_the_file():
    weights = state_dict(manifest_of("tiny_train"))
    weights["rotary_emb.inv_freq"] = weights["rotary_emb.inv_freq"] * 1.01
    config = convert_pgm_transformer(weights, sample_size=(4, 4)).config
    assert torch.equal(torch.tensor(config["rotary_frequencies"]), weights["rotary_emb.inv_freq"])


def test_models_without_registers():
    weights = state_dict(manifest_of("tiny_train"))
    del weights["reg_tokens.weight"]
    converted = convert_pgm_transformer(weights, sample_size=(2, 8))
    assert converted.config["num_register_tokens"] == 0 and converted.config["sample_size"] == (2, 8)
    model = PartitionTransformer2DModel(**converted.config)
    model.load_state_dict(converted.state_dict)
    assert torch.equal(model.prefix_embed.weight, weights["vocab_embed.embedding"][-1:])


def refusal(weights, **options):
    with pytest.raises(ConversionError) as error:
        convert_pgm_transformer(weights, **options)
    return str(error.value)


def test_each_tensor_is_checked():
    published = state_dict(manifest_of("tiny_interleave_train"))
    for key, tensor in published.items():
        message = refusal({n if n != key else n + "_": t for n, t in published.items()})
        assert f"unknown: {key}_" in message
        if key != "reg_tokens.weight":  # a model may be without
            assert f"missing: {key}" in message
        wrongs = [tensor[None], torch.full_like(tensor, torch.nan), tensor.long()]
        if key not in ("rotary_emb.inv_freq", "reg_tokens.weight", "cls_embed.embedding_table.weight"):
            wrongs.append(tensor[..., :-1])
        for wrong in wrongs:
            assert f"wrong: {key} (" in refusal(published | {key: wrong}), key


def test_missing_stacks_are_named():
    published = state_dict(manifest_of("tiny_train"))
    for stack, first in (("encoder.blocks.", "norm1"), ("decoder.layers.", "q_norm1")):
        message = refusal({name: tensor for name, tensor in published.items() if not name.startswith(stack)})
        assert f"missing: {stack}0.{first}.weight" in message and "unknown" not in message
        assert message.count(f"{stack}0.attn_out.weight") <= 1
    key = "encoder.blocks.0.attn_qkv.weight"  # the source of three tensors
    assert refusal({name: tensor for name, tensor in published.items() if name != key}).count(key) == 1


def test_sizes_that_do_not_fit():
    weights = state_dict(manifest_of("tiny_train"))
    rows = ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias")
    assert "there must be codes" in refusal(weights | {name: weights[name][:2] for name in rows})
    classes = "cls_embed.embedding_table.weight"
    assert "single row" in refusal(weights | {classes: weights[classes][:1]})
    assert "5 frequencies" in refusal(weights | {"rotary_emb.inv_freq": torch.ones(5)})
    assert "3 registers" in refusal(weights | {"reg_tokens.weight": torch.ones(3, 64)})
    assert "no grid" in refusal(weights, sample_size=(0, 16))


# The command


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 32 codes in LlamaGen's format, with one token for 8 x 8 pixels."""
    manifest = json.loads((GOLDEN.parent / "llamagen_vq" / "vq8.json").read_text())
    manifest["weights"]["quantize.embedding.weight"]["shape"] = [32, 8]
    path = tmp_path_factory.mktemp("tokenizer") / "vq8.pt"
    torch.save({"model": state_dict(manifest)}, path)
    return path


def test_both_parts_make_a_pipeline(tokenizer, tmp_path, capsys):
    file = checkpoint(GOLDEN / "tiny_infer.json", tmp_path / "file.ckpt")
    parts = ["--transformer", file, "--tokenizer", tokenizer, "--output_dir", tmp_path / "out"]
    assert convert(*parts, "--sample_size", 4, 4) == 0
    printed = capsys.readouterr().out
    assert "(the mask token, which is never read nor predicted), iter, global_epoch" in printed
    assert "query_mode is that of the published model" in printed and "sample_size is that" not in printed
    pipe = MaskGitPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, HaltonScheduler) and pipe.scheduler.config.temperature_warmup_steps == 1
    assert pipe.config.call_defaults is None and pipe.config.id2label is None
    images = pipe([1, 2], num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and "deschenaux2026partition" in text and "sun2024autoregressive" in text
    assert "FID" not in text, "a result of another model"


def test_checkpoints_of_a_decaying_learning_rate_need_trust(tmp_path, capsys):
    manifest = manifest_of("tiny_train")
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "params": []}]}
    path = tmp_path / "file.ckpt"
    torch.save({"iter": 5, "model_state_dict": state_dict(manifest), "optimizer_state_dict": optimizer}, path)
    arguments = ["--transformer", path, "--sample_size", 4, 4, "--output_dir", tmp_path / "out"]
    assert "--trust_pickle" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()
    assert convert(*arguments, "--trust_pickle") == 0


def test_foreign_and_damaged_files(tmp_path, capsys):
    weights = state_dict(manifest_of("tiny_train"))
    good = tmp_path / "good.ckpt"
    torch.save({"model_state_dict": weights}, good)
    content = good.read_bytes()
    (tmp_path / "text.ckpt").write_text("# not weights\n" * 50)
    (tmp_path / "truncated.ckpt").write_bytes(content[: len(content) // 2])
    foreign = {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.zeros(4, 4) for i in range(30)}
    torch.save({"state_dict": foreign}, tmp_path / "foreign.ckpt")
    torch.save({"model_state_dict": {**weights, "reg_tokens.weight": torch.ones(3, 64)}}, tmp_path / "odd.ckpt")
    for name, expected in (
        ("text", "no checkpoint"),
        ("truncated", "no checkpoint"),
        ("foreign", "unknown: model.diffusion_model.input_blocks.0.0.weight"),
        ("odd", "3 registers"),
    ):
        path = tmp_path / f"{name}.ckpt"
        message = refused(capsys, "--transformer", path, "--output_dir", tmp_path / "out")
        assert expected in message and str(path) in message
    with pytest.raises(SystemExit) as error:
        script.main(
            ["pgm", "--transformer", str(good), "--query_mode", "freqs", "--output_dir", str(tmp_path / "out")]
        )
    assert error.value.code == 2 and "learn+freqs+mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


PUBLISHED = {"codebook_size": 16384, "num_classes": 1000, "sample_size": 32, "hidden_size": 1024}
PUBLISHED |= {"num_layers": 12, "num_decoder_layers": 12, "self_attention_layers": None}


def test_published_settings():
    defaults = {"guidance_scale": 4.0, "guidance_schedule": "linear", "num_inference_steps": 32}
    assert call_defaults(PUBLISHED) == defaults
    assert call_defaults(PUBLISHED | {"num_layers": 14, "num_decoder_layers": 10}) == defaults
    for other in ({"num_classes": 10}, {"sample_size": 16}, {"num_layers": 10}, {"self_attention_layers": [1]}):
        assert call_defaults(PUBLISHED | other) is None
    card = describe_transformer(PUBLISHED)
    assert "| 64 | 3, linear | 4.56 | 219.0 |" in card.results and card.base_model == "jdeschena/pgm"
    assert "12-12, 256 px" in card.title
    check_fit(PUBLISHED, {"block_out_channels": [1] * 4})
    with pytest.raises(ConversionError, match="vq_ds8_c2i.pt.*16 x 16"):
        check_fit(PUBLISHED, {"block_out_channels": [1] * 5})
