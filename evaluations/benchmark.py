# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Sampling speed and memory, always beside a baseline of the same run.

    python evaluations/benchmark.py --model tiny --dtype float32 bfloat16 --output report.json

measures how many token grids a second a model samples with a scheduler, and the peak memory it takes. The baseline
"full_logits" stands for the published samplers: in every step it computes the logits of all positions and draws tokens at all
of them, and keeps those that the step reveals. Ours ("positions") asks the scheduler first which positions it will decide.

    python evaluations/benchmark.py --model partition-6-6 --baseline dit --guidance_scale 1 --batch_size 4

has another baseline: "dit" is a DiT transformer of the model's width, blocks, heads and token grid with random weights, sampled as
ours. Against it, this measures what a partition transformer gains by reading known tokens only.

The cases take turns, and medians over the turns count, so that other work on the machine meets them all alike: the ratio to the
baseline is the median of the ratios within each turn. Decoding to pixels is timed on its own, where the model has a tokenizer.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin

import maskgit
from maskgit import MaskGitDiTTransformer2DModel, MaskGitPipeline, PartitionTransformer2DModel
from maskgit.loading import DTYPES, SCHEDULERS, load_pipeline
from maskgit.options import user_errors


# Random weights: DiT transformers of the published sizes at 256 x 256 pixels, and partition transformers of 32 x 32 tokens, of
# which 12-12 and 14-10 are published sizes.
SIZES = {
    "tiny": (MaskGitDiTTransformer2DModel, {"hidden_size": 384, "num_layers": 6, "num_attention_heads": 6}),
    "small": (MaskGitDiTTransformer2DModel, {"hidden_size": 512, "num_layers": 12, "num_attention_heads": 6}),
    "base": (MaskGitDiTTransformer2DModel, {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12}),
    "large": (MaskGitDiTTransformer2DModel, {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16}),
    "partition-6-6": (
        PartitionTransformer2DModel,
        {"hidden_size": 256, "num_layers": 6, "num_decoder_layers": 6, "num_attention_heads": 4},
    ),
    "partition-12-12": (PartitionTransformer2DModel, {}),
    "partition-14-10": (PartitionTransformer2DModel, {"num_layers": 14, "num_decoder_layers": 10}),
}


@dataclass(frozen=True)
class Case:
    """What is measured: a way of sampling, in a precision."""

    method: str  # "positions", or the baseline
    dtype: str


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="builtin",
        help=f"Folder or Hub id of a pipeline, builtin, or {', '.join(SIZES)}: random weights of that size.",
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="halton")
    parser.add_argument("--num_inference_steps", type=int, default=32)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="1 is no guidance, and half the work.")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="The first is the baseline's.")
    parser.add_argument(
        "--baseline",
        choices=["full_logits", "dit"],
        default="full_logits",
        help="What ratios refer to: the model with logits of all positions, or a DiT transformer of its sizes.",
    )
    parser.add_argument("--repeats", type=int, default=3, help="Turns of each case, after one for warming up.")
    parser.add_argument("--latency", action="store_true", help="Time batches of one image too.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Defaults to the GPU if there is one, else the CPU.")
    parser.add_argument("--output", help="JSON file to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an --output that exists.")
    return parser


def load(args: argparse.Namespace, case: Case) -> MaskGitPipeline:
    diffusers.logging.set_verbosity_error()  # a change of dtype warns of nothing
    if args.model in SIZES:
        model_class, sizes = SIZES[args.model]
        with torch.device("meta" if case.method == "dit" else "cpu"):
            transformer = model_class(**sizes).eval()
        scheduler = SCHEDULERS[args.scheduler](mask_token_id=transformer.config.codebook_size)
        pipe = MaskGitPipeline(transformer, None, scheduler)
    else:
        pipe = load_pipeline(args.model, args.scheduler, case.dtype, args.device)
    if case.method == "dit":
        pipe.transformer = dit_like(pipe.transformer)
    pipe.to(args.device, DTYPES[case.dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_like(transformer: ModelMixin) -> MaskGitDiTTransformer2DModel:
    """A DiT transformer of random weights, as wide and as deep as `transformer` (encoder and decoder)."""
    if isinstance(transformer, MaskGitDiTTransformer2DModel):
        raise ValueError("--baseline dit: this model has a DiT transformer itself, leave it at full_logits.")
    names = ("codebook_size", "num_classes", "sample_size", "hidden_size", "num_attention_heads")
    sizes = {name: transformer.config[name] for name in names}
    num_layers = transformer.config.num_layers + transformer.config.get("num_decoder_layers", 0)
    return MaskGitDiTTransformer2DModel(**sizes, num_layers=num_layers).eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def sample_full_logits(pipe: MaskGitPipeline, labels: list[int], args: argparse.Namespace) -> torch.LongTensor:
    """Tokens (B, H, W), with logits and draws at all positions in every step."""
    config, scheduler = pipe.transformer.config, pipe.scheduler
    class_labels = torch.tensor(labels, device=pipe.device)
    null_labels = torch.full_like(class_labels, config.num_classes)
    size = config.sample_size
    grid = (size, size) if isinstance(size, int) else tuple(size)
    latents = torch.full((len(labels), *grid), config.codebook_size, device=pipe.device)
    scheduler.set_timesteps(args.num_inference_steps, device=pipe.device)
    for timestep in scheduler.timesteps:
        if args.guidance_scale == 1:
            logits = pipe.transformer(latents, class_labels).logits.float()
        else:
            inputs = torch.cat([latents, latents]), torch.cat([class_labels, null_labels])
            conditional, unconditional = pipe.transformer(*inputs).logits.float().chunk(2)
            logits = unconditional + args.guidance_scale * (conditional - unconditional)
        positions = scheduler.positions_to_predict(timestep, latents)
        if positions is None:
            latents = scheduler.step(logits, timestep, latents).prev_sample
        else:
            drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(len(labels), -1)
            latents = latents.flatten(1).scatter(1, positions, drawn.gather(1, positions)).unflatten(1, grid)
    return latents


def sample(pipe: MaskGitPipeline, method: str, batch_size: int, args: argparse.Namespace) -> dict[str, float]:
    """Sample a batch once: its seconds, and how many of them went to the transformer, the sampling and the decoding."""
    labels = [i % pipe.transformer.config.num_classes for i in range(batch_size)]
    seconds = {"transformer": 0.0}

    def start_clock(module, inputs):
        synchronize(pipe.device)
        seconds["transformer"] -= time.perf_counter()

    def stop_clock(module, inputs, output):
        synchronize(pipe.device)
        seconds["transformer"] += time.perf_counter()

    hooks = [
        pipe.transformer.register_forward_pre_hook(start_clock),
        pipe.transformer.register_forward_hook(stop_clock),
    ]
    synchronize(pipe.device)
    start = time.perf_counter()
    if method == "full_logits":
        latents = sample_full_logits(pipe, labels, args)
    else:
        latents = pipe(
            labels,
            guidance_scale=args.guidance_scale,
            guidance_schedule="constant",
            num_inference_steps=args.num_inference_steps,
            output_type="latent",
        ).images
    synchronize(pipe.device)
    seconds["total"] = time.perf_counter() - start
    seconds["sampling"] = seconds["total"] - seconds["transformer"]
    for hook in hooks:
        hook.remove()
    if pipe.vqvae is not None:
        start = time.perf_counter()
        with torch.no_grad():
            pipe.decode_latents(latents)
        synchronize(pipe.device)
        seconds["decoding"] = time.perf_counter() - start
    return seconds


def peak_resident_bytes(args: argparse.Namespace, case: Case, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    sample(load(args, case), case.method, args.batch_size, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_memory(args: argparse.Namespace, case: Case) -> float:
    """Peak memory in MB: on a GPU what torch allocated, on a CPU that of the whole process."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sample(load(args, case), case.method, args.batch_size, args)
        peak = torch.cuda.max_memory_allocated()
    else:
        # A process's peak never falls: each case gets a process of its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(peak_resident_bytes, args, case, torch.get_num_threads()).result()
    return peak / 1e6


def benchmark(args: argparse.Namespace) -> dict:
    """Measure all cases: the report, ready for JSON."""
    cases = [Case(method, dtype) for dtype in args.dtype for method in (args.baseline, "positions")]
    # Before anything large is loaded here: a child process's peak counts from its parent's size.
    memory = {case: measure_memory(args, case) for case in cases}
    pipes = {case: load(args, case) for case in cases if case.method != "full_logits"}
    pipes |= {case: pipes[Case("positions", case.dtype)] for case in cases if case.method == "full_logits"}

    runs = {case: [] for case in cases}
    latencies = {case: [] for case in cases}
    for turn in range(args.repeats + 1):
        for case in cases:
            seconds = sample(pipes[case], case.method, args.batch_size, args)
            if turn > 0:  # the first is for warming up
                runs[case].append(seconds)
        for case in cases if args.latency else []:
            seconds = sample(pipes[case], case.method, 1, args)["total"]
            if turn > 0:
                latencies[case].append(seconds)

    results = []
    for case in cases:
        medians = {part: statistics.median(run[part] for run in runs[case]) for part in runs[case][0]}
        ratios = [baseline["total"] / run["total"] for baseline, run in zip(runs[cases[0]], runs[case])]
        results.append(
            asdict(case)
            | {
                "num_parameters": pipes[case].transformer.num_parameters(),
                "images_per_second": args.batch_size / medians["total"],
                "ratio_to_baseline": statistics.median(ratios),
                "seconds_per_batch": medians["total"],
                "transformer_seconds": medians["transformer"],
                "sampling_seconds": medians["sampling"],
                "decoding_seconds": medians.get("decoding"),
                "latency_seconds": statistics.median(latencies[case]) if args.latency else None,
                "peak_memory_mb": memory[case],
                "all_seconds_per_batch": [run["total"] for run in runs[case]],
            }
        )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": vars(args),
        "baseline": asdict(cases[0]),
        "sample_size": pipes[cases[0]].transformer.config.sample_size,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": {
            "maskgit": maskgit.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "results": results,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


COLUMNS = {
    "method": "method",
    "dtype": "dtype",
    "images/s": "images_per_second",
    "x baseline": "ratio_to_baseline",
    "s a batch": "seconds_per_batch",
    "transformer": "transformer_seconds",
    "sampling": "sampling_seconds",
    "decoding": "decoding_seconds",
    "s a single image": "latency_seconds",
    "peak MB": "peak_memory_mb",
}


def to_markdown(report: dict) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for result in report["results"]:
        values = [result[name] for name in COLUMNS.values()]
        rows.append([f"{value:.4g}" if isinstance(value, float) else value or "-" for value in values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name in ("num_inference_steps", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1.")
    if args.output is not None and Path(args.output).exists() and not args.overwrite:
        parser.error(f"{args.output} is there already: give another --output, or --overwrite to replace it.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with user_errors():
        report = benchmark(args)
        if args.output is not None:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n")
    print(f"{report['device']}, {report['num_threads']} threads, load {report['load_average'][0]:.1f}")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
