# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Speed and memory of sampling and training, always beside a baseline of the same run.

    python evaluations/benchmark.py --model tiny --dtype float32 bfloat16 --output report.json

measures how many token grids a second a model samples, where the time goes, and the peak memory. The baseline "full_logits" stands
for the published samplers: in every step it computes the logits of all positions and draws tokens at all of them, and keeps those
that the step reveals. Ours ("positions") asks the scheduler first which positions it will decide.

    python evaluations/benchmark.py --model tiny --decode --latency

decodes to pixels too. The random weights' tokenizer has the size of LlamaGen's with a stride of 16; other models have their own.

    python evaluations/benchmark.py --model partition-6-6 --baseline dit --guidance_scale 1 --batch_size 4

has another baseline: "dit" is a DiT transformer of the model's width, blocks, heads and token grid with random weights, sampled as
ours. Against it, this measures what a partition transformer gains by reading known tokens only.

    python evaluations/benchmark.py --model base --dtype float32 bfloat16 --compile none default --attention_backend default _native_flash

measures all combinations, of several --scheduler too. The baseline is never compiled and has the default attention. Compiled are the
transformer's blocks (`compile_repeated_blocks`), with sizes that change from step to step left open: "recompiled" counts what was
compiled during the measurement all the same, and should be 0.

    python evaluations/benchmark.py --model tiny --training --dtype float32 bfloat16 --batch_size 8

times the optimizer steps of training/train_maskgit.py (forward, backward, clipping, AdamW, EMA) on random tokens. Precisions other
than float32 are autocast, --compile compiles the whole transformer, as there, and the baseline is float32, not compiled.

Each case has a process of its own, so memory must hold them all. The cases take turns, and medians over the turns count, so that
other work on the machine meets them all alike: the ratio to the baseline is the median of the ratios within each turn. --output gets
report.json, and report.csv and report.md beside it, all after each turn of a case: what is measured when Ctrl-C stops the run is
kept. In the table, "transformer" is the time up to the output of the last block, "sampling" the rest: output layer, draws and
scheduler. GFLOP/s counts the transformer's matrix products and PyTorch's own attention (no other package's) over the
time of both; "of matrix peak" is their share of what plain products of two large matrices reach in the same process.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import ModelMixin, VQModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch._dynamo.utils import counters
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import maskgit
from maskgit import MaskGitDiTTransformer2DModel, MaskGitPipeline, PartitionTransformer2DModel
from maskgit.loading import DTYPES, SCHEDULERS, load_pipeline
from maskgit.masking import MaskedDataset
from maskgit.options import check_writable, user_errors


# Random weights: DiT transformers of the published sizes at 256 x 256 pixels ("large" at 384 x 384 too), and partition transformers
# of 32 x 32 tokens, of which 12-12 and 14-10 are published sizes.
SIZES = {
    "tiny": (MaskGitDiTTransformer2DModel, {"hidden_size": 384, "num_layers": 6, "num_attention_heads": 6}),
    "small": (MaskGitDiTTransformer2DModel, {"hidden_size": 512, "num_layers": 12, "num_attention_heads": 6}),
    "base": (MaskGitDiTTransformer2DModel, {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12}),
    "large": (MaskGitDiTTransformer2DModel, {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16}),
    "large-384": (
        MaskGitDiTTransformer2DModel,
        {"hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16, "sample_size": 24},
    ),
    "partition-6-6": (
        PartitionTransformer2DModel,
        {"hidden_size": 256, "num_layers": 6, "num_decoder_layers": 6, "num_attention_heads": 4},
    ),
    "partition-12-12": (PartitionTransformer2DModel, {}),
    "partition-14-10": (PartitionTransformer2DModel, {"num_layers": 14, "num_decoder_layers": 10}),
}
# LlamaGen's tokenizer with a stride of 16.
TOKENIZER_SIZES = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 256,
    "vq_embed_dim": 8,
    "num_vq_embeddings": 16384,
    "sample_size": 256,
    "lookup_from_codebook": True,
}
COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ATTENTION_BACKENDS = ("default", *(backend.value for backend in AttentionBackendName))
# What only sampling has: given with --training, it would do nothing.
SAMPLING_OPTIONS = ("scheduler", "num_inference_steps", "guidance_scale", "baseline", "latency", "decode")
MIXED_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
TRAIN_STEPS = 4  # of a turn
# Where the output layer begins: what a transformer calls first behind its last block.
HEADS = ("adaln_out", "dense_out", "output_head")


@dataclass(frozen=True)
class Case:
    """What is measured: a way of sampling or training, in a precision."""

    method: str  # "positions", the baseline, or "training"
    dtype: str
    scheduler: str | None = None
    compile: str = "none"
    attention_backend: str = "default"

    def __str__(self) -> str:
        return " ".join(value for value in asdict(self).values() if value is not None)


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
    parser.add_argument(
        "--scheduler", nargs="+", choices=SCHEDULERS, default=["halton"], help="The first is the baseline's."
    )
    parser.add_argument("--num_inference_steps", type=int, default=32)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="1 is no guidance, and half the work.")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="The first is the baseline's.")
    parser.add_argument(
        "--compile", nargs="+", choices=COMPILE_MODES, default=["none"], help="Modes of torch.compile, or none."
    )
    parser.add_argument(
        "--attention_backend",
        nargs="+",
        choices=ATTENTION_BACKENDS,
        default=["default"],
        metavar="NAME",
        help="Names of transformer.set_attention_backend, or default.",
    )
    parser.add_argument(
        "--baseline",
        choices=["full_logits", "dit"],
        default="full_logits",
        help="What ratios refer to: the model with logits of all positions, or a DiT transformer of its sizes.",
    )
    parser.add_argument("--repeats", type=int, default=3, help="Turns of each case, after one for warming up.")
    parser.add_argument("--latency", action="store_true", help="Time batches of one image too.")
    parser.add_argument("--decode", action="store_true", help="Give random weights a tokenizer, to decode with.")
    parser.add_argument("--training", action="store_true", help="Measure training instead of sampling.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Defaults to the GPU if there is one, else the CPU.")
    parser.add_argument("--output", help="JSON file to write; a CSV and a Markdown file come beside it.")
    parser.add_argument("--overwrite", action="store_true", help="Replace reports that exist.")
    return parser


def make_cases(args: argparse.Namespace) -> list[Case]:
    """All combinations, the baseline first; its method is measured in each precision, and with each scheduler."""
    variants = list(itertools.product(args.compile, args.attention_backend))
    if args.training:
        grid = [Case("training", dtype, None, *variant) for dtype in args.dtype for variant in variants]
        return list(dict.fromkeys([Case("training", "float32"), *grid]))
    cases = []
    for scheduler, dtype in itertools.product(args.scheduler, args.dtype):
        cases.append(Case(args.baseline, dtype, scheduler))
        cases += [Case("positions", dtype, scheduler, *variant) for variant in variants]
    return list(dict.fromkeys(cases))


def load(args: argparse.Namespace, case: Case) -> MaskGitPipeline:
    """The pipeline of a case, not compiled; a ValueError if it cannot run here."""
    diffusers.logging.set_verbosity_error()  # a change of dtype warns of nothing
    if args.model in SIZES:
        model_class, sizes = SIZES[args.model]
        with torch.device("meta" if case.method == "dit" else "cpu"):
            transformer = model_class(**sizes).eval()
        scheduler = SCHEDULERS[case.scheduler or "halton"](mask_token_id=transformer.config.codebook_size)
        vqvae = VQModel(**TOKENIZER_SIZES).eval() if args.decode else None
        pipe = MaskGitPipeline(transformer, vqvae, scheduler)
    else:
        pipe = load_pipeline(args.model, case.scheduler, "float32" if args.training else case.dtype, args.device)
    if case.method == "dit":
        pipe.transformer = dit_like(pipe.transformer)
    if args.guidance_scale != 1 and not args.training and not pipe.transformer.config.has_null_class:
        raise ValueError(f"--guidance_scale {args.guidance_scale:g}: this model has no label for no class, give 1.")
    pipe.to(args.device, DTYPES["float32" if args.training else case.dtype])
    pipe.set_progress_bar_config(disable=True)
    if case.attention_backend != "default":
        try:
            pipe.transformer.set_attention_backend(case.attention_backend)
            try_attention(pipe.transformer, case)
        except Exception as error:  # backends and their packages raise all kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--attention_backend {case.attention_backend} cannot run here in {case.dtype}: {reason}"
            ) from error
    return pipe


def try_attention(transformer: ModelMixin, case: Case) -> None:
    """Run the transformer once, with one token asked for and the others known: it takes little memory."""
    num_tokens = math.prod(grid_of(transformer))
    tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=transformer.device)
    labels = torch.zeros(1, dtype=torch.long, device=transformer.device)
    if case.method == "training":
        inputs = {"group_ids": tokens} if isinstance(transformer, PartitionTransformer2DModel) else {}
        with torch.autocast(transformer.device.type, DTYPES[case.dtype], enabled=case.dtype != "float32"):
            transformer(tokens, labels, **inputs).logits.float().mean().backward()
        transformer.zero_grad()
    else:
        tokens[:, 0] = transformer.config.codebook_size
        with torch.no_grad():
            transformer(tokens, labels, positions=torch.zeros_like(tokens[:, :1]))


def grid_of(transformer: ModelMixin) -> tuple[int, int]:
    size = transformer.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def dit_like(transformer: ModelMixin) -> MaskGitDiTTransformer2DModel:
    """A DiT transformer of random weights, as wide and as deep as `transformer` (encoder and decoder)."""
    if isinstance(transformer, MaskGitDiTTransformer2DModel):
        raise ValueError("--baseline dit: this model has a DiT transformer itself, leave it at full_logits.")
    names = ("codebook_size", "num_classes", "sample_size", "hidden_size", "num_attention_heads")
    sizes = {name: transformer.config[name] for name in names}
    num_layers = transformer.config.num_layers + transformer.config.get("num_decoder_layers", 0)
    return MaskGitDiTTransformer2DModel(**sizes, num_layers=num_layers).eval()


def compile_blocks(transformer: ModelMixin, mode: str) -> None:
    """
    Compile what the blocks of a transformer compute in sampling. The number of positions differs from step to step; torch makes a
    size open at its first change, so that compiling ends within a few steps. The blocks alone, since a whole partition transformer
    cannot be compiled without encoding masked tokens too, and so that hooks behind the last block still tell the time.
    """
    torch._dynamo.config.recompile_limit = 64  # of the code that all blocks, batch sizes and kinds of block share
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond it, torch would go on without compiling
    transformer.compile_repeated_blocks(mode=mode, fullgraph=True)


def num_compilations() -> int:
    return counters["stats"]["unique_graphs"]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_clock(device: torch.device) -> float | torch.cuda.Event:
    """The time at which the device has done all that it was given so far, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1000


@torch.no_grad()
def sample_full_logits(pipe: MaskGitPipeline, labels: list[int], args: argparse.Namespace) -> torch.LongTensor:
    """Tokens (B, H, W), with logits and draws at all positions in every step."""
    config, scheduler = pipe.transformer.config, pipe.scheduler
    class_labels = torch.tensor(labels, device=pipe.device)
    null_labels = torch.full_like(class_labels, config.num_classes)
    grid = grid_of(pipe.transformer)
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
    """Sample a batch once: its seconds, and how many of them went to the blocks, to the rest, and to the decoding."""
    labels = [i % pipe.transformer.config.num_classes for i in range(batch_size)]
    clocks = []

    def read(module, *inputs):
        clocks.append(read_clock(pipe.device))

    def begin(module, inputs):
        # Without this, "reduce-overhead" would take each block for a new step, and reuse the memory of the last block's output.
        torch.compiler.cudagraph_mark_step_begin()
        read(module)

    head = next(getattr(pipe.transformer, name) for name in HEADS if hasattr(pipe.transformer, name))
    hooks = [pipe.transformer.register_forward_pre_hook(begin), head.register_forward_pre_hook(read)]
    synchronize(pipe.device)
    start = time.perf_counter()
    if method == "full_logits":
        latents = sample_full_logits(pipe, labels, args)
    else:
        latents = pipe(
            labels,
            guidance_scale=args.guidance_scale,
            guidance_schedule="constant",
            self_guidance_scale=0.0,
            num_inference_steps=args.num_inference_steps,
            output_type="latent",
        ).images
    synchronize(pipe.device)
    seconds = {"total": time.perf_counter() - start}
    for hook in hooks:
        hook.remove()
    seconds["transformer"] = sum(seconds_between(*pair) for pair in zip(clocks[::2], clocks[1::2], strict=True))
    seconds["sampling"] = seconds["total"] - seconds["transformer"]
    if pipe.vqvae is not None:
        start = time.perf_counter()
        with torch.no_grad():
            pipe.decode_latents(latents)
        synchronize(pipe.device)
        seconds["decoding"] = time.perf_counter() - start
    return seconds


def make_train_step(args: argparse.Namespace, case: Case, transformer: ModelMixin) -> Callable[[], None]:
    """An optimizer step of training/train_maskgit.py, on a batch of random tokens."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
    from train_maskgit import MaskGitOptions, Trainer

    has_null_class = transformer.config.has_null_class
    options = MaskGitOptions(
        output_dir="",
        data="",
        mixed_precision=MIXED_PRECISIONS[case.dtype],
        label_drop=0.1 if has_null_class else 0.0,
        guidance_scale=1.0,
        ema_decay=0.9999,
    )
    trainer = Trainer.__new__(Trainer)  # __init__ would want data on disk, a folder for checkpoints, and trackers
    trainer.options = options
    trainer.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=options.mixed_precision)
    trainer.codebook_size, trainer.num_classes = transformer.config.codebook_size, transformer.config.num_classes
    transformer.train().requires_grad_(True)
    if case.compile != "none":
        transformer.compile(mode=case.compile)
    trainer.prepare(transformer)

    grid = grid_of(transformer)
    items = [
        {"input_ids": torch.randint(trainer.codebook_size, grid), "label": i % trainer.num_classes}
        for i in range(args.batch_size)
    ]
    items = MaskedDataset(items, math.prod(grid), options.masking_schedule, options.label_drop, seed=0)
    batch = torch.utils.data.default_collate([items[i] for i in range(args.batch_size)])
    batch = {name: values.to(trainer.accelerator.device) for name, values in batch.items()}
    return lambda: trainer.train_step([batch])


class Worker:
    """
    A case in a process of its own: peak memory, the attention backend, accelerate's precision and what torch.compile remembers
    are a process's. The process says that it is ready, or what is wrong, and then does a turn whenever it is told to.
    """

    def __init__(self, args: argparse.Namespace, case: Case):
        context = multiprocessing.get_context("spawn")
        self.case = case
        self.is_busy = False
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, args, case), daemon=True, name=str(case))
        # Ctrl-C is this process's to handle, and goes to all: the new one ignores it from its start.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        other.close()

    def ask(self) -> dict:
        """The next that `measure_case` yields in the process; its error is raised here."""
        try:
            self.is_busy = True
            self.connection.send(None)
            answer = self.connection.recv()
            self.is_busy = False
        except (EOFError, ConnectionError):
            self.process.join()
            raise ValueError(
                f"{self.case}: its process ended with exit code {self.process.exitcode}, perhaps for lack of memory: give "
                "fewer cases or a smaller --batch_size."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """After `self.connection.close()`, which ends a process that waits."""
        if not self.is_busy:
            self.process.join(timeout=10)
        self.process.terminate()
        self.process.join()


def work(connection, args: argparse.Namespace, case: Case) -> None:
    """What a worker's process does."""
    answers = measure_case(args, case)
    # An end or an error of the connection means that the parent is gone, or has closed it, perhaps on an answer unread.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.recv()
            try:
                answer = next(answers)
            except torch.OutOfMemoryError as error:
                answer = ValueError(
                    f"{case}: out of memory, give a smaller --batch_size. {str(error).splitlines()[0]}"
                )
            except (ValueError, OSError) as error:
                answer = ValueError(str(error))  # others may not survive the way to the parent
            except Exception as error:
                traceback.print_exc()
                answer = RuntimeError(f"{case}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            connection.send(answer)


def measure_case(args: argparse.Namespace, case: Case) -> Iterator[dict]:
    """Yields what is known of a case once it is loaded, then once it is warm, and then the seconds of each turn."""
    pipe = load(args, case)
    transformer = pipe.transformer
    facts = {"num_parameters": transformer.num_parameters(), "sample_size": transformer.config.sample_size}
    if args.training:
        train_step = make_train_step(args, case, transformer)

        def run() -> dict[str, float]:
            synchronize(pipe.device)
            start = time.perf_counter()
            for _ in range(TRAIN_STEPS):
                train_step()
            synchronize(pipe.device)
            return {"total": time.perf_counter() - start}
    else:
        if case.compile != "none":
            compile_blocks(transformer, case.compile)

        def run() -> dict[str, float]:
            return sample(pipe, case.method, args.batch_size, args)

    yield facts

    # Without compiling, which would hide the matrix products.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    for _ in range(2 if case.compile != "none" else 0):  # CUDA graphs are recorded in the second run
        run()
        if args.latency:
            sample(pipe, case.method, 1, args)
    reset_peak_memory(pipe.device)
    run()
    memory = peak_memory(pipe.device)
    if args.latency:
        sample(pipe, case.method, 1, args)
    # Counted by module, for the tokenizer's are not wanted.
    flops = sum(counter.get_flop_counts()["Global" if args.training else type(transformer).__name__].values())
    num_compiled = num_compilations()
    peak = matrix_peak(pipe.device, DTYPES[case.dtype])
    yield {"flops": flops, "num_compiled": num_compiled, "peak_memory_mb": memory, "matrix_peak_gflops": peak}

    while True:
        seconds = run()
        if args.latency:
            single = sample(pipe, case.method, 1, args)
            seconds["latency"] = single["total"]
            if "decoding" in single:
                seconds["latency_with_decoding"] = single["total"] + single["decoding"]
        yield seconds | {"num_recompiled": num_compilations() - num_compiled}


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of some products of two large matrices: what arithmetic reaches here at best."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange().times) / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Loading and compiling may take more memory than running: they shall not count, where the system can forget them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux alone has it, and some containers protect it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in MB: on a GPU what torch allocated, else what was resident, libraries and all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # on Linux, where getrusage starts a process at the size of its parent
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def benchmark(args: argparse.Namespace) -> dict | None:
    """Measure all cases, and write the reports on the way: the last report, None if Ctrl-C came before the first turn."""
    cases = make_cases(args)
    facts, turns, workers, report = {}, {case: [] for case in cases}, [], None
    bar = tqdm(total=(args.repeats + 2) * len(cases), unit="turn")
    try:
        for case in cases:
            workers.append(Worker(args, case))
        # All are loaded before the first is measured: what cannot run is refused at once.
        for worker in workers:
            bar.set_description(f"load {worker.case}")
            facts[worker.case] = worker.ask()
            bar.update()
        for worker in workers:
            bar.set_description(f"warm up {worker.case}")
            facts[worker.case] |= worker.ask()
            bar.update()
        for _ in range(args.repeats):
            for worker in workers:
                bar.set_description(str(worker.case))
                turns[worker.case].append(worker.ask())
                report = make_report(args, cases, facts, turns)
                if args.output is not None:
                    write_reports(report, args.output)
                bar.update()
    except KeyboardInterrupt:
        pass  # what is measured is kept
    except Exception:
        if report is not None:
            print(to_markdown(report))
        raise
    finally:
        bar.close()
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.stop()
    return report


def make_report(args: argparse.Namespace, cases: list[Case], facts: dict, turns: dict[Case, list[dict]]) -> dict:
    """The report of the turns so far, ready for JSON."""
    results = []
    for case in cases:
        if not turns[case]:
            continue
        medians = {part: statistics.median(turn[part] for turn in turns[case]) for part in turns[case][0]}
        pairs = list(zip(turns[cases[0]], turns[case]))
        ratios = [ratio(pair, "total") for pair in pairs]
        result = asdict(case) | {"num_parameters": facts[case]["num_parameters"]}
        if args.training:
            result |= {
                "samples_per_second": TRAIN_STEPS * args.batch_size / medians["total"],
                "ratio_to_baseline": statistics.median(ratios),
                "seconds_per_step": medians["total"] / TRAIN_STEPS,
            }
        else:
            decoding = medians.get("decoding")
            result |= {
                "images_per_second": args.batch_size / medians["total"],
                "ratio_to_baseline": statistics.median(ratios),
                "images_per_second_with_decoding": decoding and args.batch_size / (medians["total"] + decoding),
                "ratio_with_decoding": decoding
                and statistics.median(ratio(pair, "total", "decoding") for pair in pairs),
                "seconds_per_batch": medians["total"],
                "transformer_seconds": medians["transformer"],
                "sampling_seconds": medians["sampling"],
                "decoding_seconds": decoding,
                "latency_seconds": medians.get("latency"),
                "latency_with_decoding_seconds": medians.get("latency_with_decoding"),
            }
        gflops_per_second = facts[case]["flops"] / 1e9 / medians["total"]
        result |= {
            "peak_memory_mb": facts[case]["peak_memory_mb"],
            "gflops_per_turn": facts[case]["flops"] / 1e9,
            "gflops_per_second": gflops_per_second,
            "matrix_peak_gflops": facts[case]["matrix_peak_gflops"],
            "share_of_matrix_peak": gflops_per_second / facts[case]["matrix_peak_gflops"],
            "num_compiled": facts[case]["num_compiled"],
            "num_recompiled": turns[case][-1]["num_recompiled"],
            "num_turns": len(turns[case]),
            "all_seconds": [turn["total"] for turn in turns[case]],
        }
        results.append(result)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": vars(args),
        "baseline": asdict(cases[0]),
        "turns_finished": min(map(len, turns.values())),
        "turns_asked": args.repeats,
        "sample_size": facts[cases[0]]["sample_size"],
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


def ratio(pair: tuple[dict, dict], *parts: str) -> float:
    """How many times as long the first of two turns took as the second, in these parts together."""
    first, second = (sum(turn[part] for part in parts) for turn in pair)
    return first / second


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


# Those that no result has a value for are left out.
COLUMNS = {
    "method": "method",
    "dtype": "dtype",
    "scheduler": "scheduler",
    "compile": "compile",
    "attention": "attention_backend",
    "images/s": "images_per_second",
    "samples/s": "samples_per_second",
    "x baseline": "ratio_to_baseline",
    "decoded images/s": "images_per_second_with_decoding",
    "x baseline, decoded": "ratio_with_decoding",
    "s a batch": "seconds_per_batch",
    "s a step": "seconds_per_step",
    "transformer": "transformer_seconds",
    "sampling": "sampling_seconds",
    "decoding": "decoding_seconds",
    "s a single image": "latency_seconds",
    "s a decoded image": "latency_with_decoding_seconds",
    "peak MB": "peak_memory_mb",
    "GFLOP/s": "gflops_per_second",
    "of matrix peak": "share_of_matrix_peak",
    "recompiled": "num_recompiled",
}


def to_markdown(report: dict) -> str:
    columns = {
        title: name
        for title, name in COLUMNS.items()
        if any(result.get(name) is not None for result in report["results"])
    }
    rows = [list(columns), ["---"] * len(columns)]
    for result in report["results"]:
        values = [result[name] for name in columns.values()]
        rows.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in values])
    options, turns = report["options"], f"{report['turns_finished']} of {report['turns_asked']}"
    settings = f"{options['model']}, batches of {options['batch_size']}"
    if not options["training"]:
        settings += f", {options['num_inference_steps']} steps, guidance {options['guidance_scale']:g}"
    lines = [
        f"{report['device']}, {report['num_threads']} threads, load {report['load_average'][0]:.1f}",
        f"{settings}; {turns} turns are finished. Seconds and rates are medians over them.",
    ]
    return "\n\n".join(lines) + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report_paths(output: str) -> list[Path]:
    return [Path(output).with_suffix(suffix) for suffix in (".json", ".csv", ".md")]


def write_reports(report: dict, output: str) -> None:
    """The three files, each replaced at once: a run that is killed leaves whole ones."""
    table = io.StringIO()
    names = [name for name in report["results"][0] if name != "all_seconds"]
    writer = csv.DictWriter(table, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["results"])
    for path, text in zip(
        report_paths(output), (json.dumps(report, indent=2) + "\n", table.getvalue(), to_markdown(report) + "\n")
    ):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def check_output(args: argparse.Namespace) -> None:
    """Raise an error if the reports cannot be written, before hours of work."""
    if Path(args.output).suffix != ".json":
        raise ValueError(f"--output {args.output}: give a name that ends in .json, the others follow from it.")
    for path in report_paths(args.output):
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path} is there already: give another --output, or --overwrite to replace it.")
        check_writable("output", path)


def check_options(args: argparse.Namespace, given: set[str]) -> None:
    """Raise a ValueError for options that cannot be, before any work."""
    for name in ("num_inference_steps", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if not 0 <= args.guidance_scale < math.inf:
        raise ValueError(f"--guidance_scale {args.guidance_scale}: must be 0 or more, 1 is no guidance.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU.")
    if args.decode and args.model not in SIZES:
        raise ValueError(f"--decode is for random weights ({', '.join(SIZES)}): leave it out, a pipeline has its own.")
    if args.overwrite and args.output is None:
        raise ValueError("--overwrite is for --output: give both.")
    if args.training and given:
        raise ValueError(f"--{min(given)} is for sampling: leave it out with --training.")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    given = {name for name in SAMPLING_OPTIONS if getattr(args, name) != parser.get_default(name)}
    with user_errors():
        check_options(args, given)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.training and args.device == "cpu" and "float16" in args.dtype:
            raise ValueError("--dtype float16: training in it needs a GPU, give bfloat16 or float32.")
        if args.output is not None:
            check_output(args)
        report = benchmark(args)
    if report is not None:
        print(to_markdown(report))
    if report is None or report["turns_finished"] < args.repeats:
        print(
            "Stopped: " + ("the table holds the turns before." if report else "nothing was measured."), file=sys.stderr
        )
        raise SystemExit(130)


if __name__ == "__main__":
    main()
