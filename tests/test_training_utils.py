import dataclasses
import shutil
import signal
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi

from maskgit.options import RunOptions, load_options, option
from maskgit.training_utils import (
    averaged_weights,
    list_checkpoints,
    load_checkpoint,
    make_accelerator,
    make_lr_scheduler,
    make_train_loader,
    save_checkpoint,
    start_run,
    training_batches,
)


@dataclasses.dataclass(kw_only=True)
class ToyOptions(RunOptions):
    debug_values: ClassVar[dict] = {"max_train_steps": 2, "model.width": 4}
    model: dict = option({"width": 64, "depth": 2}, help="The model.")
    widths: list | None = option(None, help="A list.")


def load(tmp_path, text, *overrides):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return load_options(ToyOptions, ["--config", str(config), "output_dir=out", *overrides])


class TestOptions:
    def test_config_then_overrides(self, tmp_path):
        options = load(
            tmp_path, "learning_rate: 1e-3\nmixed_precision: no\n", "seed=3", "max_grad_norm=null", "model.depth=5"
        )
        assert options.learning_rate == 1e-3 and options.seed == 3 and options.max_grad_norm is None
        assert options.mixed_precision == "no"
        assert options.model == {"width": 64, "depth": 5}
        assert ToyOptions(output_dir="x").model == {"width": 64, "depth": 2}

    def test_debug_wins_over_config_but_not_over_arguments(self, tmp_path):
        text = "debug: true\nmax_train_steps: 100\nmodel: {width: 8, depth: 1}\n"
        assert load(tmp_path, text).max_train_steps == 2
        assert load(tmp_path, text).model == {"width": 4, "depth": 1}
        assert load(tmp_path, text, "max_train_steps=7").max_train_steps == 7

    @pytest.mark.parametrize(
        "text, overrides, message",
        [
            ("learning_rte: 1.0", [], "did you mean 'learning_rate'?"),
            ("", ["train_batchsize=3"], "did you mean 'train_batch_size'?"),
            ("", ["modle.width=3"], "did you mean 'model'?"),
            ("seed: many", [], "seed='many' is of type str: expected int"),
            ("seed: true", [], "seed=True is of type bool: expected int"),
            ("max_grad_norm: [1]", [], "expected float | null"),
            ("mixed_precision: half", [], "mixed_precision='half': expected one of no, bf16, fp16"),
            ("seed: [1", [], "not valid YAML"),
            ("just text", [], "holds no options"),
            ("", ["seed"], "'seed' is not of the form key=value"),
            ("", ["seed.x=1"], "seed={'x': 1} is of type dict: expected int"),
            ("train_batch_size: 0", [], "train_batch_size=0: give a number above 0"),
            ("lr_scheduler: cosin", [], "lr_scheduler='cosin': expected one of"),
            ("overwrite: true\nresume_from_checkpoint: latest", [], "exclude each other"),
            ("lr_scheduler: piecewise_constant", [], "expected one of linear"),
            ("push_to_hub: true", [], "needs hub_model_id"),
            ("hub_model_id: me/my model", [], "hub_model_id='me/my model': Repo id must"),
        ],
    )
    def test_mistakes_are_one_line_and_exit_code_2(self, tmp_path, capsys, text, overrides, message):
        with pytest.raises(SystemExit) as stop:
            load(tmp_path, text, *overrides)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert message in error and error.count("\n") == 1

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works here")
    def test_fp16_is_refused_on_a_cpu(self):
        with pytest.raises(ValueError, match="fp16.*no effect without a GPU"):
            ToyOptions(output_dir="x", mixed_precision="fp16")

    def test_missing_required_option_and_file(self, tmp_path, capsys):
        (tmp_path / "config.yaml").write_text("seed: 1")
        for config, message in (("config.yaml", "output_dir is missing"), ("other.yaml", "No such file")):
            with pytest.raises(SystemExit) as stop:
                load_options(ToyOptions, ["--config", str(tmp_path / config)])
            assert stop.value.code == 2 and message in capsys.readouterr().err

    def test_help_shows_every_option(self, capsys):
        with pytest.raises(SystemExit) as stop:
            load_options(ToyOptions, ["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for field in dataclasses.fields(ToyOptions):
            assert f"{field.name} (" in text and field.metadata["help"] in text


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, index):
        return torch.tensor([float(index), 1.0]) / 22


def reset_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(options, stop_at=None):
    """A small training loop as in the scripts, with dropout-like noise from the global generator; returns the losses."""
    reset_accelerate()
    accelerator = make_accelerator(options)
    loader = make_train_loader(accelerator, options, Numbers())
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))
    lr_scheduler = make_lr_scheduler(accelerator, options, optimizer)
    checkpoint = start_run(accelerator, options)
    step = load_checkpoint(accelerator, checkpoint) if checkpoint else 0
    losses = []
    for batch in training_batches(loader, step * options.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            loss = (model(batch) - torch.rand(len(batch), 1)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if not accelerator.sync_gradients:
            continue
        step += 1
        losses.append(lr_scheduler.get_last_lr()[0])
        if step % options.checkpointing_steps == 0:
            save_checkpoint(accelerator, options, step)
        if step == (stop_at or options.max_train_steps):
            return losses


def toy_options(tmp_path, **kwargs):
    values = {"max_train_steps": 12, "train_batch_size": 4, "checkpointing_steps": 4, "report_to": "none"}
    values |= {
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 0.1,
    }
    return ToyOptions(**(values | kwargs))


class TestMakeAccelerator:
    @pytest.mark.parametrize("variable, name", [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
    def test_sharding_is_refused(self, tmp_path, monkeypatch, variable, name):
        monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
        with pytest.raises(ValueError, match=f"{name} is not supported: run `accelerate config` again"):
            make_accelerator(toy_options(tmp_path))

    @pytest.mark.parametrize("launched, warnings", [("bf16", 1), ("no", 0)])
    def test_precision_of_the_launcher_is_not_used(self, tmp_path, monkeypatch, caplog, launched, warnings):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        reset_accelerate()
        assert make_accelerator(toy_options(tmp_path)).mixed_precision == "no"
        assert caplog.text.count("mixed_precision=no; bf16, chosen for") == warnings


def test_averaged_weights_end_with_an_error():
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model.parameters())
    own, average = model.weight.detach().clone(), torch.full((2, 2), 7.0)
    ema.shadow_params[0] = average
    with pytest.raises(KeyError), averaged_weights(ema, model):
        assert torch.equal(model.weight, average)
        raise KeyError
    assert torch.equal(model.weight, own)
    with averaged_weights(None, model):
        assert torch.equal(model.weight, own)


class TestUpload:
    def test_repository_is_made_before_training(self, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, exist_ok: made.append((repo_id, exist_ok)))
        options = toy_options(tmp_path, push_to_hub=True, hub_model_id="me/toy")
        reset_accelerate()
        start_run(make_accelerator(options), options)
        assert made == [("me/toy", True)]

    def test_missing_token_shows_before_training(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise RuntimeError("no token\nat all")

        monkeypatch.setattr(HfApi, "create_repo", refuse)
        options = toy_options(tmp_path, push_to_hub=True, hub_model_id="me/toy")
        reset_accelerate()
        with pytest.raises(ValueError, match="cannot upload to hub_model_id='me/toy': no token at all"):
            start_run(make_accelerator(options), options)
        assert not (tmp_path / "out").exists()


class TestCheckpoints:
    @pytest.mark.parametrize("accumulation, workers", [(1, 0), (2, 0), (3, 0), (1, 2)])
    def test_resumed_run_has_the_losses_of_an_uninterrupted_one(self, tmp_path, accumulation, workers):
        kwargs = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
        straight = train(toy_options(tmp_path / "straight", **kwargs))
        options = toy_options(tmp_path, resume_from_checkpoint="latest", **kwargs)
        first = train(options, stop_at=7)  # in the middle of the second epoch, beyond its checkpoint
        resumed = train(options)
        kept = 4 * (accumulation + 1)
        assert first == straight[: len(first)]
        assert resumed == straight[kept:]

    def test_limit_and_leftovers(self, tmp_path):
        options = toy_options(tmp_path, checkpoints_total_limit=2)
        train(options)
        out = tmp_path / "out"
        assert [path.name for path in list_checkpoints(out)] == ["checkpoint-8", "checkpoint-12"]
        (out / ".checkpoint-16.tmp").mkdir()
        (out / ".checkpoint-16.tmp" / "model.safetensors").write_text("half")
        train(dataclasses.replace(options, resume_from_checkpoint="latest", max_train_steps=13))
        assert not list(out.glob(".checkpoint-*"))

    def test_kill_while_a_checkpoint_is_written(self, tmp_path):
        code = f"""
import sys, time
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import accelerate, test_training_utils as t
from pathlib import Path
class Slow(accelerate.Accelerator):
    def save_state(self, folder):
        super().save_state(folder)
        if folder.endswith(".checkpoint-8.tmp"):    # not "8" anywhere: pytest numbers its folders
            print("writing", flush=True)
            time.sleep(60)
import maskgit.training_utils
maskgit.training_utils.Accelerator = Slow
t.train(t.toy_options(Path({str(tmp_path)!r})))
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        out = tmp_path / "out"
        assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4"] and list(out.glob(".*.tmp"))
        resumed = train(toy_options(tmp_path, resume_from_checkpoint="latest"))
        assert resumed == train(toy_options(tmp_path / "straight"))[8:]
        assert not list(out.glob(".*.tmp"))

    def test_used_folder_is_refused_or_overwritten(self, tmp_path):
        train(toy_options(tmp_path))
        with pytest.raises(ValueError, match="is not empty.*resume_from_checkpoint=latest.*overwrite=true"):
            train(toy_options(tmp_path))
        train(toy_options(tmp_path, overwrite=True, max_train_steps=4))
        assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-4"]

    def test_going_back_behind_later_checkpoints_is_refused(self, tmp_path):
        straight = train(toy_options(tmp_path, checkpoints_total_limit=None))
        back = str(tmp_path / "out" / "checkpoint-4")
        with pytest.raises(ValueError, match="back to step 4, but .* delete checkpoint-8, checkpoint-12, or give"):
            train(toy_options(tmp_path, resume_from_checkpoint=back))
        assert train(toy_options(tmp_path / "other", resume_from_checkpoint=back)) == straight[8:]
        for later in list_checkpoints(tmp_path / "out")[1:]:
            shutil.rmtree(later)
        assert train(toy_options(tmp_path, resume_from_checkpoint=back)) == straight[8:]

    def test_resume_with_other_options(self, tmp_path):
        train(toy_options(tmp_path))
        with pytest.raises(ValueError, match="train_batch_size=2, but .*checkpoint-12 was made with 4"):
            train(toy_options(tmp_path, resume_from_checkpoint="latest", train_batch_size=2))
        with pytest.raises(ValueError, match="is no checkpoint"):
            train(toy_options(tmp_path, resume_from_checkpoint=str(tmp_path)))

    def test_too_few_images_for_a_batch(self, tmp_path):
        with pytest.raises(ValueError, match="22 images, less than one batch of 64"):
            train(toy_options(tmp_path, train_batch_size=64))
