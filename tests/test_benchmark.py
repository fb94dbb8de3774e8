import json
import sys
from pathlib import Path

import pytest
import torch

from maskgit import MaskGitDiTTransformer2DModel, MaskGitPipeline, PartitionTransformer2DModel


@pytest.fixture
def run(monkeypatch):
    """Runs the script with some options."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "evaluations")
    import benchmark

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, options)])
        benchmark.main()

    return run


def test_report(run, tiny_pipeline_dir, tmp_path, capsys):
    output = tmp_path / "reports" / "report.json"
    options = [
        "--model",
        tiny_pipeline_dir,
        "--repeats",
        2,
        "--num_inference_steps",
        3,
        "--latency",
        "--device",
        "cpu",
    ]
    run(*options, "--output", output)

    report = json.loads(output.read_text())
    results = report["results"]
    assert [(result["method"], result["dtype"]) for result in results] == [
        ("full_logits", "float32"),
        ("positions", "float32"),
    ]
    assert report["baseline"] == {"method": "full_logits", "dtype": "float32"}
    assert report["sample_size"] == 8 and report["num_threads"] >= 1
    assert report["device"] and report["date"] and set(report["versions"]) >= {"torch", "diffusers", "maskgit"}
    assert report["options"]["batch_size"] == 2 and report["options"]["scheduler"] == "halton"
    for result in results:
        assert result["num_parameters"] > 0
        assert len(result["all_seconds_per_batch"]) == 2
        assert result["images_per_second"] == pytest.approx(2 / result["seconds_per_batch"])
        assert 0 < result["transformer_seconds"] < result["seconds_per_batch"]
        assert 0 < result["sampling_seconds"] < result["seconds_per_batch"]
        assert result["decoding_seconds"] > 0 and result["latency_seconds"] > 0
        assert 50 < result["peak_memory_mb"] < 5000
    assert results[0]["ratio_to_baseline"] == 1
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and table[0][3] == "x baseline"
    assert float(table[3][3]) == pytest.approx(results[1]["ratio_to_baseline"], rel=1e-3)

    with pytest.raises(SystemExit) as exit:
        run(*options, "--output", output)
    assert exit.value.code == 2 and "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", ["halton", "confidence"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("method", ["full_logits", "positions"])
def test_every_case_samples(run, tiny_pipeline_dir, scheduler, guidance_scale, method):
    import benchmark

    options = ["--model", str(tiny_pipeline_dir), "--scheduler", scheduler, "--num_inference_steps", "4"]
    args = benchmark.make_parser().parse_args([*options, "--guidance_scale", str(guidance_scale), "--device", "cpu"])
    pipe = benchmark.load(args, benchmark.Case(method, "bfloat16"))
    latents = []
    pipe.decode_latents = latents.append
    seconds = benchmark.sample(pipe, method, 3, args)
    assert latents[0].shape == (3, 8, 8) and latents[0].max() < 32, "every token is decided"
    assert seconds["total"] == pytest.approx(seconds["transformer"] + seconds["sampling"])


@pytest.fixture(scope="module")
def partition_dir(tiny_pipeline_dir, tmp_path_factory):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir)
    pipe.transformer = PartitionTransformer2DModel(
        codebook_size=32,
        num_classes=10,
        sample_size=8,
        hidden_size=64,
        num_layers=2,
        num_decoder_layers=1,
        num_attention_heads=4,
    )
    folder = tmp_path_factory.mktemp("partition")
    pipe.save_pretrained(folder)
    return folder


def test_partition_transformer_beside_a_dit_of_its_sizes(run, partition_dir, tmp_path, capsys):
    import benchmark

    options = ["--model", partition_dir, "--baseline", "dit", "--repeats", 1, "--num_inference_steps", 2]
    run(*options, "--guidance_scale", 1, "--device", "cpu", "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["method"] for result in report["results"]] == ["dit", "positions"]
    assert report["baseline"] == {"method": "dit", "dtype": "float32"}
    assert report["results"][1]["ratio_to_baseline"] > 0

    args = benchmark.make_parser().parse_args(["--model", str(partition_dir), "--device", "cpu"])
    transformer = benchmark.load(args, benchmark.Case("dit", "float32")).transformer
    config = {"codebook_size": 32, "num_classes": 10, "sample_size": 8, "hidden_size": 64, "num_layers": 3}
    assert isinstance(transformer, MaskGitDiTTransformer2DModel)
    assert transformer.config.items() >= config.items() and transformer.config.num_attention_heads == 4
    assert report["results"][0]["num_parameters"] == transformer.num_parameters()


def test_random_weights_of_each_size():
    import benchmark

    for model_class, sizes in benchmark.SIZES.values():
        with torch.device("meta"):
            transformer = model_class(**sizes)
            if model_class is PartitionTransformer2DModel:
                assert benchmark.dit_like(transformer).config.num_layers in (12, 24)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "missing"], "missing"),
        (["--model", "tiny", "--batch_size", 0], "--batch_size 0"),
        (["--scheduler", "euler"], "euler"),
        (["--model", "tiny", "--device", "tpu"], "tpu"),
        (["--model", "tiny", "--device", "cpu", "--baseline", "dit"], "has a DiT transformer itself"),
    ],
)
def test_wrong_options_are_explained_in_a_line(run, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
