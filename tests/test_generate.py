import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import generate
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from maskgit import MaskGitPipeline


SCRIPT = Path(generate.__file__)


@pytest.fixture
def run(tiny_pipeline_dir, tmp_path):
    """Runs the script in this process with the tiny model; returns the folder that it wrote."""

    def run(name, *arguments, num_images=12):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        folder = tmp_path / name
        usual = ["--model", tiny_pipeline_dir, "--num_images", num_images, "--output_dir", folder]
        generate.main([str(argument) for argument in (*usual, *arguments)])
        return folder

    return run


def read_images(folder):
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "images").iterdir()}


def equal(images, others):
    return images.keys() == others.keys() and all(np.array_equal(images[name], others[name]) for name in images)


def read_settings(folder):
    return json.loads((folder / "settings.json").read_text())


def test_images_depend_on_their_index_only(run):
    images = read_images(run("out"))
    assert sorted(images) == [f"{i:06d}.png" for i in range(12)]
    assert len({image.tobytes() for image in images.values()}) == 12
    assert equal(images, read_images(run("other", "--batch_size", 5)))
    confident = read_images(run("confidence", "--scheduler", "confidence", "--labels", "random"))
    single = ("--scheduler", "confidence", "--labels", "random", "--batch_size", 1)
    assert equal(confident, read_images(run("single", *single)))
    # Image i of the seed S is image 0 of the seed S + i, if the class is the same.
    shifted = read_images(run("shifted", "--seed", 10, num_images=2))
    assert np.array_equal(shifted["000000.png"], images["000010.png"])


def test_folder_npz_and_settings(run, tmp_path, tiny_pipeline_dir, capsys):
    folder = run("out", "--npz", tmp_path / "npz" / "out.npz", "--labels", "random", "--seed", 3, num_images=23)
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "images", "settings.json"]
    assert "23 images are in" in capsys.readouterr().out
    assert Image.open(folder / "grid.png").size == (10 * 98, 3 * 98)
    with np.load(tmp_path / "npz" / "out.npz") as file:
        pixels, labels, settings = file["arr_0"], file["arr_1"], json.loads(str(file["settings"]))
    assert pixels.dtype == np.uint8 and labels.dtype == np.int64
    assert pixels.shape == (23, 16, 16, 3) and labels.shape == (23,)
    images = read_images(folder)
    assert all(np.array_equal(pixels[i], images[f"{i:06d}.png"]) for i in range(23))
    assert labels.tolist() == [generate.label_of(i, "random", 10, 3) for i in range(23)]
    assert settings == read_settings(folder)
    expected = {
        "model": str(tiny_pipeline_dir),
        "transformer": "MaskGitDiTTransformer2DModel",
        "labels": "random",
        "seed": 3,
        "num_images": 23,
        "scheduler": "HaltonScheduler",
        "dtype": "float32",
    }
    assert {name: settings[name] for name in expected} == expected
    assert (
        settings["call"]["num_inference_steps"] == 3 and settings["call"]["guidance_scale"] == 2.0
    )  # the model's own
    assert settings["scheduler_config"]["masking_schedule"] == "arccos"
    assert set(settings["versions"]) == {"maskgit", "diffusers", "torch"}
    assert set(settings["weights_sha256"]) == {"transformer", "vqvae"}


def test_labels():
    balanced = [generate.label_of(i, "balanced", 10, 5) for i in range(1000)]
    assert np.bincount(balanced).tolist() == [100] * 10
    random = [generate.label_of(i, "random", 10, 5) for i in range(1000)]
    assert 60 < np.bincount(random, minlength=10).min() and np.bincount(random).max() < 140
    assert random[:20] != [generate.label_of(i, "random", 10, 6) for i in range(20)]


@pytest.mark.slow
def test_killed_and_resumed(run, tiny_pipeline_dir, tmp_path):
    expected = read_images(run("whole", num_images=60))
    folder = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--model", tiny_pipeline_dir, "--num_images", "60", "--output_dir", folder]
    with subprocess.Popen(
        [*command, "--batch_size", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while len(generate.image_indices(folder)) < 8 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        errors = process.stderr.read().decode()
    there = generate.image_indices(folder)
    assert 8 <= len(there) < 60, errors
    (folder / "images" / ".000059.png.tmp").write_bytes(b"half")
    written = {i: generate.image_path(folder, i).stat().st_mtime_ns for i in there}

    run("out", "--batch_size", 7, num_images=60)
    assert equal(read_images(folder), expected)
    assert {i: generate.image_path(folder, i).stat().st_mtime_ns for i in there} == written  # none was made twice


@pytest.mark.slow
def test_two_processes(run, tiny_pipeline_dir, tmp_path):
    expected = read_images(run("whole", num_images=9))
    run("out", num_images=2)  # they go on with what one process did
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    command += ["--model", tiny_pipeline_dir, "--num_images", "9", "--output_dir", tmp_path / "out"]
    result = subprocess.run([*command, "--npz", tmp_path / "out.npz"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("9 images are in") == 1
    assert "9/9" in result.stderr  # the images of both processes
    assert equal(read_images(tmp_path / "out"), expected)
    assert read_settings(tmp_path / "out")["num_processes"] == 2
    with np.load(tmp_path / "out.npz") as file:
        assert len(file["arr_0"]) == 9


def test_same_command_again_and_more_images(run, tmp_path, capsys):
    npz = tmp_path / "out.npz"
    folder = run("out", "--npz", npz, num_images=4)
    written = {path: path.stat().st_mtime_ns for path in [npz, *(folder / "images").iterdir()]}
    run("out", "--npz", npz, "--batch_size", 3, num_images=4)
    assert written == {path: path.stat().st_mtime_ns for path in written}

    with pytest.raises(SystemExit) as error:
        run("out", "--npz", npz, num_images=6)
    assert (
        error.value.code == 2 and "not of these images: give another --npz, or --overwrite" in capsys.readouterr().err
    )
    run("out", num_images=6)
    assert equal(read_images(folder), read_images(run("whole", num_images=6)))
    del written[npz]
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert read_settings(folder)["num_images"] == 6
    with pytest.raises(SystemExit):
        run("out", num_images=5)
    assert "holds 6 images, more than --num_images 5: give another --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, difference",
    [
        (["--guidance_scale", "3"], "call.guidance_scale 2.0, not 3.0"),
        (["--seed", "1"], "seed 0, not 1"),
        (["--labels", "random"], "labels 'balanced', not 'random'"),
        (["--scheduler", "confidence"], "scheduler 'HaltonScheduler', not 'ConfidenceScheduler'"),
        (["--scheduler_config", "top_k=5"], "scheduler_config.top_k None, not 5"),
        (["--dtype", "bfloat16"], "dtype 'float32', not 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(run, capsys, arguments, difference):
    folder = run("out", num_images=2)
    before = read_images(folder)
    with pytest.raises(SystemExit) as error:
        run("out", *arguments, num_images=3)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and difference in message and "--overwrite to start anew" in message
    assert equal(read_images(folder), before)


def test_overwrite_starts_anew(run, tmp_path):
    folder = run("out", "--npz", tmp_path / "out.npz", num_images=5)
    run("out", "--npz", tmp_path / "out.npz", "--seed", 100, "--overwrite", num_images=3)
    assert equal(read_images(folder), read_images(run("whole", "--seed", 100, num_images=3)))
    with np.load(tmp_path / "out.npz") as file:
        assert len(file["arr_0"]) == 3


def test_other_weights_are_refused(run, tiny_pipeline_dir, tmp_path, capsys):
    run("out", num_images=2)
    pipe = MaskGitPipeline.from_pretrained(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(1.01)
        break
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run("out", "--model", tmp_path / "model", num_images=3)
    assert "weights_sha256.transformer" in capsys.readouterr().err


def test_preset_and_scheduler_options(run, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        """
        model: {source: halton, download: [], conversion: []}
        scheduler: ConfidenceScheduler
        scheduler_config: {choice_temperature: 3.0}
        call: {guidance_scale: 1.5, num_inference_steps: 2}
        published: {metrics: {fid: 1.0}, protocol: none, source: nobody}
        reproduced: false
        """
    )
    fields = ("softmax_temperature=[1, 0.5]", "top_k=3")
    options = ("--preset", preset, "--num_inference_steps", 4, "--scheduler_config", *fields)
    settings = read_settings(run("out", *options, num_images=2))
    assert settings["preset"] == str(preset)
    assert settings["scheduler"] == "ConfidenceScheduler"
    assert settings["scheduler_config"]["choice_temperature"] == 3.0
    assert settings["scheduler_config"]["softmax_temperature"] == [1, 0.5]
    assert settings["scheduler_config"]["top_k"] == 3
    assert settings["call"]["guidance_scale"] == 1.5 and settings["call"]["num_inference_steps"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_images", "0"], "--num_images 0: must be a whole number of at least 1"),
        (["--batch_size", "0"], "--batch_size 0: must be a whole number of at least 1"),
        (["--seed", "-1"], "--seed -1: must be a whole number of at least 0"),
        (["--model", "nowhere"], "no folder 'nowhere'"),
        (["--num_inference_steps", "0"], "`num_inference_steps` is 0, but must be"),
        (["--guidance_scale", "nan"], "`guidance_scale` is nan, but must be"),
        (["--preset", "halton-larg"], "There is no preset 'halton-larg'"),
        (["--scheduler_config", "top_k"], "'top_k' is not of the form key=value"),
        (["--scheduler_config", "topk=1"], "unknown field of HaltonScheduler, 'topk': did you mean 'top_k'?"),
        (["--scheduler_config", "top_k=0"], "`top_k` is 0, but must be at least 1"),
        (["--scheduler_config", "top_k=many"], "top_k"),
        (["--scheduler_config", "top_k=["], "its value is no YAML"),
    ],
)
def test_bad_input(run, tmp_path, capfd, arguments, message):
    with pytest.raises(SystemExit) as error:
        run("out", *arguments)
    output = capfd.readouterr()
    assert error.value.code == 2 and output.out == ""
    assert message in output.err and output.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_are_something_else(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run("out")
    assert "has files in it, but no settings.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("new", "--npz", tmp_path)
    assert "is a folder: give a file" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", np.zeros(3))
    with pytest.raises(SystemExit):
        run("new", "--npz", tmp_path / "other.npz")
    assert "not of these images" in capsys.readouterr().err
    assert np.load(tmp_path / "other.npz")["arr_0"].shape == (3,)
