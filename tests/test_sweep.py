import csv
import json

import numpy as np
import pytest
import sweep
import toy_features  # noqa: F401 (registers the network `toy`)
from accelerate.state import AcceleratorState, GradientState
from PIL import Image


@pytest.fixture
def run(tiny_pipeline_dir, tmp_path):
    """Runs the script in this process on toy features; returns its folder and the rows of its table."""
    reference = tmp_path / "reference"
    reference.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(reference / f"{i:02d}.png")

    def run(*arguments):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        folder = tmp_path / "out"
        usual = ["--model", tiny_pipeline_dir, "--reference", reference, "--num_images", 12, "--output_dir", folder]
        usual += ["--feature_extractor", "toy", "--metrics", "fid,prc"]
        sweep.main([str(argument) for argument in (*usual, *arguments)])
        with open(folder / "table.csv", newline="") as file:
            return folder, list(csv.DictReader(file))

    return run


def test_table_plots_and_resuming(run, capsys):
    axes = ("--scheduler", "halton", "confidence", "--guidance_scale", 1, 3, "--choice_temperature", 2, 6)
    folder, rows = run(*axes, "--num_inference_steps", 2)
    assert len(rows) == 6  # Halton has no choice temperature
    assert [row["scheduler"] for row in rows] == ["halton"] * 2 + ["confidence"] * 4
    assert {row["choice_temperature"] for row in rows if row["scheduler"] == "confidence"} == {"2.0", "6.0"}
    assert {row["softmax_temperature"] for row in rows} == {"1.0"} and {
        row["num_inference_steps"] for row in rows
    } == {"2"}
    first = folder / "confidence_steps2_guidance3_choice6"
    result = json.loads((first / "result.json").read_text())
    row = rows[-1]
    assert float(row["fid"]) == result["metrics"]["fid"] and float(row["recall"]) == result["metrics"]["recall"]
    assert result["generated"]["settings"]["scheduler_config"]["choice_temperature"] == 6.0
    assert result["generated"]["settings"]["call"]["guidance_scale"] == 3.0
    table = (folder / "table.md").read_text()
    assert table.count("\n| ") == 7 and "12 images a row, against 20 reference images" in table
    assert table.splitlines()[0] in capsys.readouterr().out
    for name in ("fid_steps.png", "precision_recall.png"):
        assert Image.open(folder / name).size == (1050, 750)

    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/images/*.png")}
    written |= {path: path.stat().st_mtime_ns for path in [*folder.glob("*/result.json"), folder / "reference.npz"]}
    assert len(written) == 6 * 12 + 6 + 1
    folder, rows = run(*axes, "--num_inference_steps", 2, 4)
    assert len(rows) == 12
    assert written == {path: path.stat().st_mtime_ns for path in written}  # nothing finished was done again
    run(*axes, "--num_inference_steps", 2, "--metrics", "fid")
    assert written[first / "result.json"] != (first / "result.json").stat().st_mtime_ns


def test_one_combination_against_statistics(run, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.full(48, 0.5), sigma=np.eye(48))
    folder, rows = run("--reference", tmp_path / "statistics.npz", "--metrics", "fid")
    assert not (folder / "reference.npz").exists() and not (folder / "precision_recall.png").exists()
    assert len(rows) == 1 and rows[0]["scheduler"] == "HaltonScheduler"
    assert rows[0]["num_inference_steps"] == "3" and rows[0]["guidance_scale"] == "2.0"  # the model's own
    assert (folder / "default" / "images" / "000011.png").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_images", "0"], "--num_images 0: must be"),
        (["--guidance_scale", "-1"], "`guidance_scale` is -1.0"),
        (["--reference", "nowhere"], "nowhere is not there or of another kind"),
        (["--metrics", "fid,fad"], "unknown metric 'fad'"),
        (["--choice_temperature", "3"], "unknown field of HaltonScheduler, 'choice_temperature'"),
        (["--num_inference_steps", "2", "0"], "--num_inference_steps 0: must be at least 1"),
        (["--metrics", "kid"], "KID draws subsets of 1000 images, more than --num_images 12"),
    ],
)
def test_bad_input(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in line]
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_another_reference_is_refused(run, tmp_path, capsys):
    run()
    (tmp_path / "other").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "0.png")
    with pytest.raises(SystemExit):
        run("--reference", tmp_path / "other")
    assert "reference.npz is of another --reference or --image_size" in capsys.readouterr().err
