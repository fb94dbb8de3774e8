import csv
import functools
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.utils.flop_counter import FlopCounterMode

from maskgit import (
    MaskGitBertTransformer2DModel,
    MaskGitDiTTransformer2DModel,
    MaskGitPipeline,
    MaskGitViTTransformer2DModel,
    PartitionTransformer2DModel,
)


@pytest.fixture
def run(monkeypatch):
    """Runs the script with some options."""
    import benchmark

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, options)])
        benchmark.main()

    return run


@pytest.fixture
def in_this_process(run, monkeypatch):
    """Cases without processes of their own, which take seconds to start."""
    import benchmark

    class Worker:
        def __init__(self, args, case):
            self.case, self.answers = case, benchmark.measure_case(args, case)

            self.connection = io.BytesIO()  # to be closed

        def ask(self):
            return next(self.answers)

        def stop(self):
            pass

    monkeypatch.setattr(benchmark, "Worker", Worker)
    # Set for a whole process: other tests have it as it was.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    yield Worker
    torch.compiler.reset()


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
    case = {"dtype": "float32", "scheduler": "halton", "compile": "none", "attention_backend": "default"}
    assert report["baseline"] == {"method": "full_logits"} | case
    assert [result | {"method": name} | case for result, name in zip(results, ("full_logits", "positions"))] == results
    assert report["turns_finished"] == report["turns_asked"] == 2
    assert report["sample_size"] == 8 and report["num_threads"] >= 1
    assert report["device"] and report["date"] and set(report["versions"]) >= {"torch", "diffusers", "maskgit"}
    for result in results:
        assert result["num_parameters"] > 0 and result["num_recompiled"] == 0
        assert len(result["all_seconds"]) == 2
        assert result["images_per_second"] == pytest.approx(2 / result["seconds_per_batch"])
        assert 0 < result["images_per_second_with_decoding"] < result["images_per_second"]
        assert 0 < result["transformer_seconds"] < result["seconds_per_batch"]
        assert 0 < result["sampling_seconds"] < result["seconds_per_batch"]
        assert result["decoding_seconds"] > 0
        assert 0 < result["latency_seconds"] < result["latency_with_decoding_seconds"]
        assert 50 < result["peak_memory_mb"] < 5000
        assert 0 < result["share_of_matrix_peak"] < 1, "no model reaches what matrix products alone do"
    assert results[0]["ratio_to_baseline"] == 1
    assert results[0]["gflops_per_turn"] > results[1]["gflops_per_turn"] > 0, "positions save work"
    printed = capsys.readouterr().out
    assert output.with_suffix(".md").read_text() == printed
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    row = dict(zip(table[0], table[3]))
    assert len(table) == 4 and row["recompiled"] == "0" and row["method"] == "positions"
    assert float(row["x baseline"]) == pytest.approx(results[1]["ratio_to_baseline"], rel=1e-3)
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["images_per_second"]) for row in rows] == [result["images_per_second"] for result in results]

    output.unlink()  # the other two are kept too
    with pytest.raises(SystemExit) as exit:
        run(*options, "--output", output)
    assert exit.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert not output.exists()


def test_all_combinations_beside_one_baseline(run):
    import benchmark

    options = "--scheduler confidence halton --dtype bfloat16 float32 --compile none default"
    args = benchmark.make_parser().parse_args([*options.split(), "--attention_backend", "default", "_native_math"])
    cases = benchmark.make_cases(args)
    assert cases[0] == benchmark.Case("full_logits", "bfloat16", "confidence")
    assert len(set(cases)) == len(cases) == 2 * 2 * (1 + 2 * 2)
    assert benchmark.Case("positions", "float32", "halton", "default", "_native_math") in cases
    args.training = True
    cases = benchmark.make_cases(args)
    assert cases[0] == benchmark.Case("training", "float32") and len(cases) == 2 * 2 * 2


def test_compiled_sampling_is_compiled_once(run, in_this_process, monkeypatch):
    import benchmark

    def compile_blocks(transformer, mode, compile_blocks=benchmark.compile_blocks):
        # All but the compiler for the CPU, which takes a minute.
        compile = functools.partial(transformer.compile_repeated_blocks, backend="aot_eager")
        monkeypatch.setattr(transformer, "compile_repeated_blocks", compile, raising=False)
        compile_blocks(transformer, mode)

    monkeypatch.setattr(benchmark, "compile_blocks", compile_blocks)
    args = benchmark.make_parser().parse_args(["--num_inference_steps", "12", "--batch_size", "3", "--device", "cpu"])
    answers = benchmark.measure_case(args, benchmark.Case("positions", "float32", "halton", "default"))
    next(answers)
    warm = next(answers)
    assert 2 <= warm["num_compiled"] <= 4, "at the first step, and for an open number of positions"
    assert warm["flops"] > 0
    assert next(answers)["num_recompiled"] == 0
    args.num_inference_steps = 9
    assert next(answers)["num_recompiled"] <= 1
    args.num_inference_steps = 20
    assert next(answers)["num_recompiled"] <= 2


def test_ctrl_c_keeps_finished_turns(run, in_this_process, monkeypatch, tiny_pipeline_dir, tmp_path, capsys):
    answers = iter(range(3 * 2))  # load, warm up and the first turn of two cases

    def ask(self, ask=in_this_process.ask):
        if next(answers, None) is None:
            raise KeyboardInterrupt
        return ask(self)

    monkeypatch.setattr(in_this_process, "ask", ask)
    output = tmp_path / "report.json"
    with pytest.raises(SystemExit) as exit:
        run("--model", tiny_pipeline_dir, "--num_inference_steps", 2, "--device", "cpu", "--output", output)
    assert exit.value.code == 130
    report = json.loads(output.read_text())
    assert (report["turns_finished"], report["turns_asked"]) == (1, 3) and len(report["results"]) == 2
    assert "1 of 3 turns" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.json", "report.md"]


def test_ctrl_c_ends_all_processes(ctrl_c, tiny_pipeline_dir, tmp_path):
    script = Path(__file__).parents[1] / "evaluations" / "benchmark.py"
    options = ["--model", tiny_pipeline_dir, "--num_inference_steps", "2", "--repeats", "100000", "--device", "cpu"]
    command = [sys.executable, script, *options, "--output", tmp_path / "report.json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "report.md").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "| full_logits |" in output
    assert "Traceback" not in errors and "Stopped: the table holds the turns before." in errors
    with pytest.raises(ProcessLookupError):  # nobody of the group is left, once multiprocessing has cleaned up
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("is_read", [True, False])
def test_process_ends_quietly_when_its_parent_is_gone(is_read, monkeypatch):
    import benchmark

    monkeypatch.setattr(benchmark, "measure_case", lambda args, case: iter([{}]))
    connection, other = multiprocessing.Pipe()
    with ThreadPoolExecutor() as executor:
        work = executor.submit(benchmark.work, other, None, None)
        connection.send(None)
        assert connection.poll(timeout=60)
        if is_read:
            connection.recv()
        connection.close()
        work.result(timeout=60)


def test_errors_of_a_process_reach_the_user(run, monkeypatch):
    import benchmark

    def measure_case(args, case):
        raise json.JSONDecodeError("no JSON", "{", 1)  # cannot be made from its message alone
        yield

    class Connection:
        answers = []
        requests = [None]
        send = answers.append

        def recv(self):
            if not self.requests:
                raise EOFError
            return self.requests.pop()

    monkeypatch.setattr(benchmark, "measure_case", measure_case)
    benchmark.work(Connection(), None, benchmark.Case("positions", "float32"))
    (answer,) = Connection.answers
    assert isinstance(answer, ValueError) and "no JSON" in str(answer)


@pytest.mark.parametrize("model", ["dit", "partition"])
def test_training(run, in_this_process, tiny_pipeline_dir, partition_dir, tmp_path, model, monkeypatch):
    import benchmark

    folder, output = {"dit": tiny_pipeline_dir, "partition": partition_dir}[model], tmp_path / "report.json"
    transformers = []

    def make_train_step(args, case, transformer, make_train_step=benchmark.make_train_step):
        transformers.append((transformer, transformer.token_embed.weight.detach().clone()))
        return make_train_step(args, case, transformer)

    monkeypatch.setattr(benchmark, "make_train_step", make_train_step)
    try:
        run("--model", folder, "--training", "--repeats", 1, "--device", "cpu", "--batch_size", 3, "--output", output)
    finally:
        AcceleratorState._reset_state(True)
    (result,) = json.loads(output.read_text())["results"]
    assert result["method"] == "training" and result["ratio_to_baseline"] == 1
    assert result["samples_per_second"] == pytest.approx(3 / result["seconds_per_step"])
    ((transformer, initial),) = transformers
    assert not torch.equal(transformer.token_embed.weight, initial), "it learns"
    if model == "dit":
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(torch.zeros(3, 8, 8, dtype=torch.long), torch.zeros(3, dtype=torch.long))
        forward = counter.get_total_flops() * benchmark.TRAIN_STEPS / 1e9
        assert 2 * forward < result["gflops_per_turn"] < 4 * forward, "forward and backward"


@pytest.mark.parametrize(
    "model_class",
    [
        MaskGitDiTTransformer2DModel,
        MaskGitBertTransformer2DModel,
        MaskGitViTTransformer2DModel,
        PartitionTransformer2DModel,
    ],
)
def test_output_layer_counts_as_sampling(run, model_class, tiny_pipeline_dir, monkeypatch):
    import benchmark

    config = {"codebook_size": 32, "num_classes": 10, "sample_size": 8, "hidden_size": 32, "num_attention_heads": 2}
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir, transformer=model_class(**config, num_layers=1).eval())
    pipe.set_progress_bar_config(disable=True)
    events = []
    monkeypatch.setattr(benchmark, "read_clock", lambda device: events.append("clock") or 0.0)
    for name, module in pipe.transformer.named_modules():
        if name in ("token_embed", *benchmark.HEADS, "norm_out") or "blocks." in name and name.count(".") == 1:
            module.register_forward_hook(lambda module, *rest, name=name.split(".")[0]: events.append(name))
    args = benchmark.make_parser().parse_args(["--guidance_scale", "1", "--num_inference_steps", "1"])
    benchmark.sample(pipe, "positions", 1, args)
    blocks = [i for i, name in enumerate(events) if name.endswith("blocks")]
    first, second = (i for i, name in enumerate(events) if name == "clock")
    assert first < blocks[0] and blocks[-1] + 1 == second < len(events) - 1


def test_tokenizer_of_random_weights(run):
    import benchmark

    with torch.device("meta"):
        vqvae = benchmark.VQModel(**benchmark.TOKENIZER_SIZES)
    assert round(vqvae.num_parameters() / 1e6) == 72, "the published one's"
    assert vqvae.quantize.embedding.weight.shape == (16384, 8)
    pixels = vqvae.decode(torch.zeros(1, 8, 16, 16, device="meta"), force_not_quantize=False).sample
    assert pixels.shape == (1, 3, 256, 256)


@pytest.mark.parametrize("scheduler", ["halton", "confidence"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("method", ["full_logits", "positions"])
def test_every_case_samples(run, tiny_pipeline_dir, scheduler, guidance_scale, method):
    import benchmark

    options = ["--model", str(tiny_pipeline_dir), "--scheduler", scheduler, "--num_inference_steps", "4"]
    args = benchmark.make_parser().parse_args([*options, "--guidance_scale", str(guidance_scale), "--device", "cpu"])
    pipe = benchmark.load(args, benchmark.Case(method, "bfloat16", scheduler))
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


def test_partition_transformer_beside_a_dit_of_its_sizes(run, in_this_process, partition_dir, tmp_path, capsys):
    import benchmark

    options = ["--model", partition_dir, "--baseline", "dit", "--repeats", 1, "--num_inference_steps", 2]
    run(*options, "--guidance_scale", 1, "--device", "cpu", "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [result["method"] for result in report["results"]] == ["dit", "positions"]
    assert report["baseline"]["method"] == "dit"
    assert report["results"][1]["ratio_to_baseline"] > 0

    args = benchmark.make_parser().parse_args(["--model", str(partition_dir), "--device", "cpu"])
    transformer = benchmark.load(args, benchmark.Case("dit", "float32", "halton")).transformer
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
        (["--model", "tiny", "--batch_size", 0], "--batch_size 0"),
        (["--scheduler", "euler"], "euler"),
        (["--attention_backend", "nope"], "'_native_math'"),
        (["--overwrite"], "--overwrite is for --output"),
        (["--compile", "fast"], "'max-autotune'"),
        (["--num_inference_steps", 0], "--num_inference_steps 0"),
        (["--guidance_scale", "nan"], "--guidance_scale nan"),
        (["--decode"], "--decode is for random weights"),
        (["--training", "--latency"], "--latency is for sampling"),
        (["--training", "--dtype", "float16", "--device", "cpu"], "needs a GPU"),
        (["--output", "report.txt"], "ends in .json"),
        (["--output", f"{__file__}/report.json"], "cannot write"),
        (["--model", "tiny", "--device", "tpu"], "tpu"),
    ],
)
def test_wrong_options_are_explained_in_a_line(run, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "missing"], "missing"),
        (["--model", "tiny", "--baseline", "dit"], "has a DiT transformer itself"),
        (["--attention_backend", "_native_npu"], "--attention_backend _native_npu cannot run here in float32"),
        (["--attention_backend", "_native_cudnn"], "--attention_backend _native_cudnn cannot run here in float32"),
    ],
)
def test_what_cannot_run_is_refused_before_measuring(run, in_this_process, options, message, monkeypatch, capsys):
    import benchmark

    monkeypatch.setattr(benchmark, "sample", None)
    with pytest.raises(SystemExit) as exit:
        run(*options, "--device", "cpu")
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_guidance_needs_a_null_class(run, in_this_process, monkeypatch, capsys):
    import benchmark

    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "has_null_class": False}
    monkeypatch.setitem(benchmark.SIZES, "tiny", (MaskGitDiTTransformer2DModel, sizes))
    with pytest.raises(SystemExit) as exit:
        run("--model", "tiny", "--device", "cpu")
    assert exit.value.code == 2 and "no label for no class" in capsys.readouterr().err
