import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit.images import MASK_FILL, make_grid
from maskgit.loading import DTYPES, SCHEDULERS
from maskgit_cli import main


@pytest.fixture
def sample(tiny_pipeline_dir, tmp_path):
    """Runs `maskgit sample` in this process with the tiny model; returns the folder that it wrote."""

    def run(name, *arguments):
        folder = tmp_path / name
        command = ["sample", "--model", str(tiny_pipeline_dir), "--output_dir", str(folder), *arguments]
        assert main(command) == 0
        return folder

    return run


def read_images(folder):
    return {path.name: path.read_bytes() for path in folder.glob("0*.png")}


def read_settings(folder):
    return json.loads((folder / "settings.json").read_text())


def test_files_grid_and_settings(sample, tiny_pipeline_dir, capsys):
    folder = sample("out", "--classes", "3,Ankle Boot, top", "--images_per_class", "2", "--seed", "7")
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000_dress.png",
        "00001_dress.png",
        "00002_ankle-boot.png",
        "00003_ankle-boot.png",
        "00004_t-shirt.png",
        "00005_t-shirt.png",
        "grid.png",
        "settings.json",
    ]
    output = capsys.readouterr()
    assert output.out == f"Wrote 6 images to {folder}, all of them in {folder / 'grid.png'}\n"
    assert "3/3" in output.err  # the steps of the only batch

    grid = Image.open(folder / "grid.png")
    assert grid.size == (2 * 98, 3 * 98)  # a row a class; 16 pixels times 6, and a border of 1
    second_row = grid.crop((1, 99, 97, 195))
    image = Image.open(folder / "00002_ankle-boot.png")
    assert image.size == (16, 16)
    assert np.array_equal(second_row, image.resize((96, 96), Image.Resampling.NEAREST))

    settings = read_settings(folder)
    expected = {
        "model": str(tiny_pipeline_dir),
        "classes": [3, 9, 0],
        "class_names": ["dress", "ankle boot", "t-shirt, top"],
        "images_per_class": 2,
        "seed": 7,
        "num_inference_steps": 3,  # the model's own
        "guidance_scale": 2.0,
        "guidance_schedule": "constant",
        "scheduler": "HaltonScheduler",
        "dtype": "float32",
    }
    assert {name: settings[name] for name in expected} == expected
    assert set(settings["versions"]) == {"maskgit", "diffusers", "torch"}


def test_image_depends_on_its_own_seed_only(sample, capsys):
    arguments = ("--classes", "all", "--images_per_class", "1", "--scheduler", "confidence")
    together = read_images(sample("together", *arguments))
    assert len(together) == 10
    capsys.readouterr()
    assert together == read_images(sample("batches", *arguments, "--batch_size", "3"))
    assert "10/10" in capsys.readouterr().err  # the images
    assert together == read_images(sample("single", *arguments, "--batch_size", "1"))
    alone = read_images(sample("alone", "--classes", "4", *arguments[2:], "--seed", "4"))
    assert alone["00000_coat.png"] == together["00004_coat.png"]
    assert len(set(together.values())) == 10


def test_sampling_options(sample):
    usual = ("--classes", "1", "--images_per_class", "2")
    default = sample("default", *usual)
    for name, value in (("num_inference_steps", 5), ("guidance_scale", 9.5), ("seed", 2**63 - 1)):
        folder = sample(name, *usual, f"--{name}", str(value))
        assert read_settings(folder)[name] == value
        assert read_images(folder) != read_images(default)
    assert read_settings(sample("device", *usual, "--device", "cpu"))["device"] == "cpu"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler(sample, scheduler):
    settings = read_settings(sample("out", "--classes", "1", "--scheduler", scheduler))
    assert settings["scheduler"] == SCHEDULERS[scheduler].__name__
    assert settings["scheduler_config"]["mask_token_id"] == 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(sample, dtype):
    assert read_settings(sample("out", "--classes", "1", "--dtype", dtype))["dtype"] == dtype


def test_save_steps(sample):
    folder = sample("out", "--classes", "bag", "--images_per_class", "2", "--save_steps")
    stems = ["00000_bag", "00001_bag"]
    expected = [f"{stem}.{suffix}" for stem in stems for suffix in ("gif", "png")]
    assert sorted(path.name for path in (folder / "steps").iterdir()) == expected
    for stem in stems:
        assert Image.open(folder / "steps" / f"{stem}.gif").n_frames == 4  # all masked, and three steps
        strip = Image.open(folder / "steps" / f"{stem}.png")
        assert strip.size == (4 * 98, 98)
        # The middle of each of the 8 x 8 cells.
        frames = [np.asarray(strip)[7:97:12, 98 * i + 7 : 98 * i + 97 : 12] for i in range(4)]
        shares = [(frame == MASK_FILL).all(-1).mean() for frame in frames]
        assert shares[0] == 1
        assert sorted(set(shares), reverse=True) == shares
        image = Image.open(folder / f"{stem}.png").resize((96, 96), Image.Resampling.NEAREST)
        assert np.array_equal(strip.crop((3 * 98 + 1, 1, 4 * 98 - 1, 97)), image)


def test_overwrite_replaces_files_of_the_same_names_only(sample, tiny_pipeline_dir, tmp_path, capsys):
    usual = ("--classes", "1,2", "--images_per_class", "1")
    folder = sample("out", *usual)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = ["sample", "--model", str(tiny_pipeline_dir), "--output_dir", str(folder), *usual, "--seed", "1"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "has files in it: give another --output_dir, or --overwrite" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    assert main([*arguments, "--overwrite"]) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] == before[name]} == {"notes.txt"}

    (folder / "grid.png").unlink()
    (folder / "grid.png").mkdir()
    capsys.readouterr()
    assert main([*arguments, "--overwrite"]) == 2
    assert "there is a folder of this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "10"], "no class 10: this model's classes are 0 to 9"),
        (["--classes", "-1"], "no class -1"),
        (["--classes", "all,0"], "must be all, or classes without it"),
        (["--classes", "ankle bot"], "Unknown class name 'ankle bot'. Did you mean 'ankle boot'?"),
        (["--classes", ""], "--classes: must be class ids or names"),
        (["--classes", "1,,2"], "--classes: must be class ids or names"),
        (["--images_per_class", "0"], "--images_per_class: must be a whole number of at least 1, but is '0'"),
        (["--batch_size", "-4"], "--batch_size: must be a whole number of at least 1, but is '-4'"),
        (["--num_inference_steps", "0"], "--num_inference_steps: must be a whole number of at least 1"),
        (["--num_inference_steps", "2.5"], "--num_inference_steps: must be a whole number of at least 1"),
        (["--guidance_scale", "-1"], "--guidance_scale: must be a number of at least 0, but is '-1'"),
        (["--guidance_scale", "nan"], "--guidance_scale: must be a number"),
        (["--guidance_scale", "inf"], "--guidance_scale: must be a number"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 to 9223372036854775807, but is '-1'"),
        (["--seed", "9223372036854775808"], "--seed: must be a whole number from 0 to 9223372036854775807"),
        (["--scheduler", "ddim"], "--scheduler: invalid choice: 'ddim'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "abacus"], "no device 'abacus' on this machine"),
        (["--step", "3"], "unrecognized arguments: --step 3"),
        (["--model", "nowhere"], "no folder 'nowhere'"),
        (["--model", "builtin-nothing"], "no built-in model 'nothing'"),
    ],
)
def test_bad_input(tiny_pipeline_dir, tmp_path, capfd, arguments, message):
    folder = tmp_path / "out"
    assert main(["sample", "--model", str(tiny_pipeline_dir), "--output_dir", str(folder), *arguments]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("maskgit: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not folder.exists()


def test_nothing_is_written_when_the_pipeline_refuses(tiny_pipeline_dir, tmp_path, capfd):
    model = shutil.copytree(tiny_pipeline_dir, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"call_defaults": {"guidance_scale": -2.0}}))
    assert main(["sample", "--model", str(model), "--output_dir", str(tmp_path / "out")]) == 2
    output = capfd.readouterr()
    assert (
        output.err
        == "maskgit: error: `guidance_scale` is -2.0, but must be a number of at least 0; 1 is no guidance.\n"
    )
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(tiny_pipeline_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        assert main(["sample", "--model", str(tiny_pipeline_dir), "--output_dir", str(folder)]) == 2
        error = capfd.readouterr().err
        assert error == f"maskgit: error: Cannot write to '{folder}': '{tmp_path / 'file'}' is a file.\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tiny_pipeline_dir, tmp_path, capfd):
    tmp_path.chmod(0o500)
    assert main(["sample", "--model", str(tiny_pipeline_dir), "--output_dir", str(tmp_path / "out")]) == 2
    tmp_path.chmod(0o700)
    assert f"no permission in '{tmp_path}'" in capfd.readouterr().err


def test_console_command(tiny_pipeline_dir, tmp_path):
    command = [Path(sys.executable).with_name("maskgit"), "sample", "--model", tiny_pipeline_dir]
    result = subprocess.run([*command, "--classes", "bag"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (
        0,
        "Wrote 4 images to outputs/samples, all of them in outputs/samples/grid.png\n",
    )
    assert (tmp_path / "outputs" / "samples" / "grid.png").is_file()
    lines = result.stderr.split("\n")
    assert [line for line in lines if line and "step/s]" not in line] == []  # nothing but the bar
    result = subprocess.run([*command, "--classes", "1000"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_help_and_mistakes_do_not_wait_for_torch():
    script = """if True:
        import sys
        from maskgit_cli import main
        assert main(["sample", "--batch_size", "0"]) == 2
        try:
            main(["sample", "--help"])
        finally:
            assert "torch" not in sys.modules
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--images_per_class N" in result.stdout


def test_grid_of_large_images_is_limited():
    images = [Image.new("RGB", (500, 250), (i, 0, 0)) for i in range(95)]
    grid = make_grid(images, columns=10)
    assert grid.width <= 4096
    assert grid.width == 10 * 409 - 10 * 409 % 10
    assert grid.getpixel((grid.width - 200, 50)) == (9, 0, 0)
    assert grid.getpixel((grid.width - 200, grid.height - 50)) == (255, 255, 255)  # no 100th image
