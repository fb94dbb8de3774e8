"""The self-guidance adapter, and self-guidance in the pipeline."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import state_dict
from safetensors.torch import load, load_file, save_file

import maskgit_cli
from maskgit import (
    ConfidenceScheduler,
    HaltonScheduler,
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
    SelfGuidedScheduler,
    ToastAdapter,
    builtin,
    loading,
)
from maskgit.conversion.maskgit_google import convert_muse_transformer, split_toast
from maskgit.conversion.unlockmgm import convert_toast
from maskgit.loading import load_pipeline
from maskgit.schedulers import scheduling_maskgit_utils, scheduling_self_guided


GOLDEN = Path(__file__).parent / "golden" / "unlockmgm"
K = MASK = 32


def make_toast(hidden_size=32, num_layers=2, num_classes=10, **config) -> ToastAdapter:
    """Of random weights, large enough to matter."""
    torch.manual_seed(5)
    toast = ToastAdapter(hidden_size, num_layers, num_classes, anchor_factor=4, **config).eval()
    for parameter in toast.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return toast


@pytest.fixture
def pipe(tiny_pipeline_dir):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir, toast=make_toast())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens(pipe, *args, **kwargs):
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(*args, **{"output_type": "latent", "generator": generator} | kwargs).images


# Published models


def golden_pipeline(case):
    """The transformer, adapter and scheduler of a golden case, in a pipeline, and the stored numbers."""
    manifest = json.loads((GOLDEN / f"{case}.json").read_text())
    base, adapter = split_toast(state_dict(manifest))
    models = []
    for cls, converted in (
        (MaskGitBertTransformer2DModel, convert_muse_transformer(base, manifest["config"])),
        (ToastAdapter, convert_toast(adapter, manifest["config"])),
    ):
        model = cls(**converted.config).eval()
        model.load_state_dict(converted.state_dict)
        models.append(model)
    options = manifest["case"]
    scheduler = SelfGuidedScheduler(
        mask_token_id=1024,
        choice_temperature=options.get("temperature", 25.0),
        top_k=1 if options.get("draw") == "argmax" else None,
    )
    pipe = MaskGitPipeline(models[0], None, scheduler, models[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_file(GOLDEN / f"{case}.safetensors"), options


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


def test_published_passes():
    pipe, golden, _ = golden_pipeline("forward_tiny")
    sequence = golden["in.input_ids"]
    labels = sequence[:, 0] - 1024
    input_ids = sequence[:, 1:].clamp(max=1024)  # the file's mask is 1034
    seen = []
    pipe.toast.decoders[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        plain = pipe.transformer(input_ids, labels, output_hidden_states=True, full_vocabulary=True)
        close(plain.last_hidden_state, golden["out.hidden_states"])
        close(plain.logits, golden["out.logits"][:, 1:])
        close(pipe.toast.class_anchor(labels)[:, None], golden["out.cls_anchor"])
        features = pipe.toast(plain.last_hidden_state, labels)
        close(seen[0], golden["out.top_down_input"])
        close(torch.stack(features), golden["out.top_down_features"])
        blank = torch.full_like(input_ids, 1024)
        refined = pipe.transformer(blank, None, None, features, True, full_vocabulary=True)
        close(refined.last_hidden_state, golden["out.toast_hidden_states"])
        close(refined.logits, golden["out.toast_logits"][:, 1:])
        for scale in (0.5, 1.0):
            guided = pipe._predict(input_ids.view(2, 4, 4), labels, None, 1.0, scale)
            close(guided, golden[f"out.guided_logits_{scale}"][:, 1:])


@pytest.mark.parametrize("case", ["sample_tiny", "sample_tiny_plain", "sample_tiny_cdf"])
def test_published_trajectories(case, monkeypatch):
    pipe, golden, options = golden_pipeline(case)
    steps = []
    monkeypatch.setattr(scheduling_self_guided, "gumbel_noise", lambda *args: golden["in.gumbel"][len(steps)])
    if "in.uniform" in golden:
        monkeypatch.setattr(scheduling_maskgit_utils, "uniform_noise", lambda *args: golden["in.uniform"][len(steps)])

    def keep(pipe, i, timestep, tensors):
        steps.append(tensors["latents"].flatten(1))
        return {}

    final = pipe(
        golden["in.class_ids"],
        self_guidance_scale=options["guidance_scale"] if options["sampler"] == "sg" else 0.0,
        num_inference_steps=options["timesteps"],
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    expected = golden["out.input_ids_after"].clamp(max=1024)
    assert torch.equal(torch.stack(steps[:-1]), expected[:-1])
    assert torch.equal(final.flatten(1), golden["out.tokens"])


def test_published_size():
    with torch.device("meta"):
        toast = ToastAdapter()
    assert toast.num_parameters() == 41_793_808
    assert sum(parameter.numel() for parameter in toast.class_anchor.parameters()) == 12_892_432
    assert sum(parameter.numel() for parameter in toast.decoders.parameters()) == 28_311_552


# The adapter


def test_starts_as_published():
    torch.manual_seed(0)
    toast = ToastAdapter(64, 3, 10)
    assert torch.equal(toast.top_down_transform, torch.eye(64))
    weights = toast.state_dict()
    for name in ("class_anchor.class_embed.weight", "decoders.0.to_below.weight", "decoders.2.to_features.weight"):
        assert abs(float(weights[name].std()) - 0.02) < 1e-3, name
    assert weights["class_anchor.shared_embed"].std() > 0.01 and weights["class_anchor.factor_weights"].std() > 0.01
    assert not weights["class_anchor.proj.bias"].any() and not weights["class_anchor.norm.bias"].any()
    assert (weights["class_anchor.norm.weight"] == 1).all()


def test_features_are_of_the_class_and_of_each_token_alone():
    toast = make_toast()
    hidden_states = torch.randn(2, 7, 32)
    labels = torch.tensor([3, 4])
    with torch.no_grad():
        features = torch.stack(toast(hidden_states, labels))
        assert features.shape == (2, 2, 7, 32)
        assert not torch.allclose(torch.stack(toast(hidden_states, labels + 1)), features)
        close(torch.stack(toast(hidden_states[1:], labels[1:])), features[:, 1:])
        close(torch.stack(toast(hidden_states[:, 2:], labels)), features[:, :, 2:])
        # What points away from the class is hidden.
        anchor = toast.class_anchor(labels)[:, None]
        assert not torch.stack(toast(-anchor.expand(-1, 7, -1), labels)).any()
        assert torch.stack(toast(anchor.expand(-1, 7, -1), labels)).any()
    with pytest.raises(IndexError):
        toast(hidden_states, torch.tensor([3, 10]))


def test_adapter_saves_and_loads_and_runs_in_half_precision(tmp_path):
    toast = make_toast(use_blank_second=False)
    hidden_states, labels = torch.randn(2, 7, 32), torch.tensor([3, 4])
    toast.save_pretrained(tmp_path)
    loaded, info = ToastAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.use_blank_second is False
    with torch.no_grad():
        features = torch.stack(toast(hidden_states, labels))
        assert torch.equal(torch.stack(loaded(hidden_states, labels)), features)
        for dtype in (torch.bfloat16, torch.float16):
            half = loaded.to(dtype)(hidden_states.to(dtype), labels)
            assert half[0].dtype == dtype
            assert (torch.stack(half).float() - features).norm() < 0.03 * features.norm()


def test_adapter_compiles_without_graph_breaks():
    toast = make_toast()
    hidden_states, labels = torch.randn(2, 7, 32), torch.tensor([3, 4])
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(toast, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(hidden_states, labels), toast(hidden_states, labels))


# In the pipeline


def make_transformer(cls, **config):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | config
    transformer = cls(codebook_size=K, num_classes=10, sample_size=(4, 6), **config).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer


@pytest.mark.parametrize("use_blank_second", [True, False])
@pytest.mark.parametrize(
    "cls", [MaskGitDiTTransformer2DModel, MaskGitViTTransformer2DModel, MaskGitBertTransformer2DModel]
)
def test_guided_logits_of_every_transformer(cls, use_blank_second):
    transformer, toast = make_transformer(cls), make_toast(use_blank_second=use_blank_second)
    pipe = MaskGitPipeline(transformer, None, HaltonScheduler(MASK), toast)
    latents = torch.randint(0, K, (2, 4, 6)).masked_fill(torch.rand(2, 4, 6) < 0.5, MASK)
    labels = torch.tensor([1, 7])
    with torch.no_grad():
        plain = transformer(latents, labels, output_hidden_states=True)
        features = toast(plain.last_hidden_state, labels)
        second = (torch.full_like(latents, MASK), None) if use_blank_second else (latents, labels)
        refined = transformer(*second, top_down_features=features).logits
        expected = refined + 3 * (plain.logits - refined)
        assert not torch.allclose(refined, plain.logits)
        close(pipe._predict(latents, labels, None, 1.0, 2.0), expected)
        positions = torch.tensor([[5, 0, 23], [8, 9, 9]])
        some = expected.gather(1, positions[..., None].expand(-1, -1, K))
        close(pipe._predict(latents, labels, positions, 1.0, 2.0), some)
        if transformer.config.has_null_class:
            without = transformer(latents, torch.full_like(labels, 10)).logits
            both = expected + 0.5 * (plain.logits - without)
            close(pipe._predict(latents, labels, None, 1.5, 2.0), both)


@pytest.mark.parametrize("cls", [HaltonScheduler, ConfidenceScheduler, SelfGuidedScheduler])
def test_every_scheduler_in_two_passes_a_step(pipe, cls):
    pipe.scheduler = cls(MASK)
    passes, widths = [], []
    pipe.transformer.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0}
    plain = tokens(pipe, [1, 2], **arguments)
    assert passes == [2] * 4
    passes.clear(), widths.clear()
    guided = tokens(pipe, [1, 2], self_guidance_scale=1.0, **arguments)
    assert passes == [2] * 8 and not torch.equal(guided, plain) and guided.max() < MASK
    # The output layer runs for positions that are still masked, or decided in this step.
    assert widths[::2] == widths[1::2] and sum(widths) < 2 * 4 * 64
    passes.clear()
    tokens(pipe, [1, 2], self_guidance_scale=1.0, **arguments | {"guidance_scale": 2.0})
    assert passes == [4, 2] * 4
    known = torch.randint(0, K, (2, 8, 8)).masked_fill(torch.rand(2, 8, 8) < 0.5, MASK)
    inpainted = tokens(pipe, [1, 2], latents=known, self_guidance_scale=3.0, **arguments)
    assert torch.equal(inpainted[known < MASK], known[known < MASK]) and inpainted.max() < MASK


@pytest.mark.parametrize(
    "arguments, scales",
    [
        ({"guidance_interval": (0.25, 0.75)}, [0.0, 2.0, 2.0, 0.0]),
        ({"guidance_schedule": "linear"}, [2 * i / 3 for i in range(4)]),
        ({"guidance_schedule": "cosine"}, [1 - math.cos(math.pi * i / 3) for i in range(4)]),
    ],
)
def test_interval_and_schedule(pipe, arguments, scales):
    used = []
    predict = pipe._predict
    pipe._predict = lambda *args: used.append(args[3:]) or predict(*args)
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    tokens(pipe, [1, 2], self_guidance_scale=2.0, guidance_scale=3.0, num_inference_steps=4, **arguments)
    np.testing.assert_allclose([scale for _, scale in used], scales, atol=1e-12)
    np.testing.assert_allclose([scale for scale, _ in used], [1 + scale for scale in scales], atol=1e-12)
    assert batches == sum(([4, 2] if scale else [2] for scale in scales), [])


def test_default_of_the_checkpoint(pipe, tmp_path):
    expected = tokens(pipe, [1, 2], self_guidance_scale=1.5)
    defaults = pipe.config.call_defaults | {"self_guidance_scale": 1.5}
    guided = MaskGitPipeline(**pipe.components, id2label=pipe.id2label, call_defaults=defaults)
    guided.save_pretrained(tmp_path)
    loaded = MaskGitPipeline.from_pretrained(tmp_path)
    assert torch.equal(tokens(loaded, [1, 2]), expected)
    assert torch.equal(tokens(loaded, [1, 2], self_guidance_scale=0), tokens(pipe, [1, 2]))


def test_what_cannot_guide_itself_is_refused(pipe):
    passes = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: passes.append(args))
    for scale in (-1.0, math.nan, math.inf, "1", None):
        if scale is not None:
            with pytest.raises(ValueError, match="`self_guidance_scale` is"):
                pipe(1, self_guidance_scale=scale)
    for toast, message in (
        (None, "needs a `toast` adapter.*train_toast.py"),
        (make_toast(hidden_size=64), "hidden_size is 64, this one's is 32"),
        (make_toast(num_layers=3), "num_layers is 3, this one's is 2"),
        (make_toast(num_classes=11), "num_classes is 11, this one's is 10"),
    ):
        other = MaskGitPipeline(pipe.transformer, pipe.vqvae, pipe.scheduler, toast)
        with pytest.raises(ValueError, match=message):
            other(1, self_guidance_scale=1.0)
    with torch.random.fork_rng():
        partition = PartitionTransformer2DModel(
            codebook_size=K, num_classes=10, sample_size=8, hidden_size=32, num_attention_heads=2
        )
    with pytest.raises(ValueError, match="PartitionTransformer2DModel cannot guide itself"):
        MaskGitPipeline(partition, pipe.vqvae, pipe.scheduler, make_toast())(1, self_guidance_scale=1.0)
    assert not passes


def test_saved_with_the_pipeline_and_on_its_own(pipe, tmp_path):
    expected = tokens(pipe, [1, "bag"], self_guidance_scale=1.0)
    pipe.save_pretrained(tmp_path)
    loaded = MaskGitPipeline.from_pretrained(tmp_path)
    assert type(loaded.toast) is ToastAdapter
    assert torch.equal(tokens(loaded, [1, "bag"], self_guidance_scale=1.0), expected)
    parts = MaskGitPipeline.from_pretrained(
        tmp_path, toast=ToastAdapter.from_pretrained(tmp_path, subfolder="toast"), vqvae=None
    )
    assert torch.equal(tokens(parts, [1, "bag"], self_guidance_scale=1.0), expected)
    without = MaskGitPipeline.from_pretrained(tmp_path, toast=None)
    assert without.toast is None
    assert torch.equal(tokens(without, [1, "bag"]), tokens(pipe, [1, "bag"]))
    other = MaskGitPipeline.from_pipe(loaded)
    assert other.toast is loaded.toast
    assert torch.equal(tokens(other, [1, "bag"], self_guidance_scale=1.0), expected)


def test_loading_checks_the_adapter_too(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path)).toast) is ToastAdapter
    path = tmp_path / "toast" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(OSError, match=f"The file '{path}' is damaged"):
        load_pipeline(str(tmp_path))
    weights = load(whole)
    weights.pop("top_down_transform")
    save_file(weights, path)
    with pytest.raises(OSError, match="toast' are not those of a ToastAdapter.*such as top_down_transform"):
        load_pipeline(str(tmp_path))
    path.unlink()
    with pytest.raises(OSError, match="it lacks toast/.*safetensors"):
        load_pipeline(str(tmp_path))
    shutil.rmtree(path.parent)
    with pytest.raises(OSError, match="it lacks toast/config.json, toast/"):
        load_pipeline(str(tmp_path))


def test_saved_folder_loads_without_this_package(pipe, tmp_path):
    pipe.scheduler = SelfGuidedScheduler(MASK)
    expected = tokens(pipe, [1, 2], self_guidance_scale=1.0)
    pipe.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "expected.npy", expected.numpy())
    script = """
import sys
sys.modules["maskgit"] = None  # as if it were not installed
import numpy as np
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("model", trust_remote_code=True)
generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
tokens = pipe([1, 2], self_guidance_scale=1.0, generator=generator, output_type="latent").images
assert (tokens.numpy() == np.load("expected.npy")).all()
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_offloading_and_device_maps(pipe, tmp_path):
    expected = tokens(pipe, [1, 2], self_guidance_scale=1.0)
    pipe.save_pretrained(tmp_path)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tokens(pipe, [1, 2], self_guidance_scale=1.0), expected)
    mapped = MaskGitPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(tokens(mapped, [1, 2], self_guidance_scale=1.0), expected)


def test_bfloat16(tiny_pipeline_dir):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir, toast=make_toast()).to(torch.bfloat16)
    assert tokens(pipe, [1, 2], self_guidance_scale=1.0).max() < MASK


# The built-in model


def test_builtin_model_guides_itself_when_asked_to(tmp_path, capsys):
    arguments = ["sample", "--classes", "sneaker,3", "--images_per_class", "1", "--num_inference_steps", "4"]
    assert maskgit_cli.main([*arguments, "--output_dir", str(tmp_path / "plain")]) == 0
    guided = ["--scheduler", "self-guided", "--self_guidance_scale", "1.0", "--output_dir", str(tmp_path / "guided")]
    assert maskgit_cli.main([*arguments, *guided]) == 0
    settings = {name: json.loads((tmp_path / name / "settings.json").read_text()) for name in ("plain", "guided")}
    assert settings["plain"]["self_guidance_scale"] == 0 and settings["plain"]["scheduler"] == "HaltonScheduler"
    assert settings["guided"]["self_guidance_scale"] == 1 and settings["guided"]["scheduler"] == "SelfGuidedScheduler"
    pictures = [(tmp_path / name / "grid.png").read_bytes() for name in settings]
    assert pictures[0] != pictures[1]
    assert sum(path.stat().st_size for path in (builtin() / "toast").iterdir()) < 0.95e6


def test_model_without_an_adapter_is_one_line(tiny_pipeline_dir, tmp_path, capsys):
    arguments = [
        "--model",
        str(tiny_pipeline_dir),
        "--self_guidance_scale",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert maskgit_cli.main(["sample", *arguments]) == 2
    message = capsys.readouterr().err
    assert "needs a `toast` adapter" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shipping_an_adapter_changes_nothing_else(pipe, tiny_pipeline_dir, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("ship", Path(__file__).parents[1] / "scripts/ship_builtin_model.py")
    ship = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ship)
    for module in (ship, loading):
        monkeypatch.setattr(module, "BUILTIN_MODELS", tmp_path / "builtin")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ship_builtin_model.py", *map(str, arguments)])
        ship.main()

    run(tiny_pipeline_dir, "tiny")
    before = load_pipeline("builtin-tiny")
    defaults = {"self_guidance_scale": 2.0}
    MaskGitPipeline(**pipe.components, call_defaults=defaults).save_pretrained(tmp_path / "trained")
    run(tmp_path / "trained", "tiny", "--toast_only")
    after = load_pipeline("builtin-tiny")
    assert after.config.call_defaults == before.config.call_defaults and after.id2label == before.id2label
    assert torch.equal(tokens(after, [1, 2]), tokens(before, [1, 2]))
    assert not torch.equal(tokens(after, [1, 2], self_guidance_scale=1.0), tokens(before, [1, 2]))
    torch.nn.init.normal_(pipe.transformer.output_bias)
    pipe.save_pretrained(tmp_path / "other")
    for folder, message in ((tmp_path / "other", "another transformer"), (tiny_pipeline_dir, "no toast adapter")):
        with pytest.raises(SystemExit):
            run(folder, "tiny", "--toast_only")
        assert message in capsys.readouterr().err
