import json
import os

import evaluate
import numpy as np
import pytest
import reconstruct
import torch
import toy_features  # noqa: F401 (registers the network `toy`)
from PIL import Image

from maskgit.metrics import ssim
from maskgit.tokenization import decode_tokens, encode_images, load_tokenizer, psnr
from maskgit_cli import main


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """23 images of 16 x 16 pixels, some in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "b").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    for i, pixels in enumerate(coarse):
        image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
        image.save(folder / ("b" if i >= 10 else "") / f"{i:02d}.png")
    return folder


@pytest.fixture
def run(tiny_pipeline_dir, images_dir, tmp_path):
    """Runs the script in this process on toy features; returns its folder."""

    def run(*arguments):
        folder = tmp_path / "out"
        usual = ["--tokenizer", tiny_pipeline_dir, "--images", images_dir, "--output_dir", folder]
        usual += ["--feature_extractor", "toy"]
        reconstruct.main([str(argument) for argument in (*usual, *arguments)])
        return folder

    return run


def tensor_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_metrics_are_those_of_the_tokenizer(run, images_dir, tiny_pipeline_dir, capsys):
    folder = run()
    paths = [*sorted(images_dir.glob("*.png")), *sorted((images_dir / "b").glob("*.png"))]
    images = torch.stack([tensor_of(path) for path in paths])
    tokenizer = load_tokenizer(str(tiny_pipeline_dir))
    floats = images / 127.5 - 1
    tokens = encode_images(tokenizer, floats)
    decoded = decode_tokens(tokenizer, tokens)
    expected = decoded.add(1).mul(127.5).round().byte()
    written = torch.stack([tensor_of(folder / "images" / f"{i:06d}.png") for i in range(23)])
    assert (written.int() - expected.int()).abs().max() <= 1  # a batch of another size is rounded in another way

    result = json.loads((folder / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["psnr"] == pytest.approx(psnr(floats, decoded).mean().item(), abs=0.02)
    assert metrics["psnr_worst"] == pytest.approx(psnr(floats, decoded).min().item(), abs=0.02)
    assert metrics["ssim"] == pytest.approx(ssim(images, expected).mean().item(), abs=1e-3)
    counts = tokens.flatten().bincount(minlength=32)
    assert metrics["codebook_usage"] == (counts > 0).float().mean()
    shares = counts[counts > 0] / counts.sum()
    assert metrics["codebook_perplexity"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
    options = [
        "--generated",
        str(folder),
        "--reference",
        str(images_dir),
        "--feature_extractor",
        "toy",
        "--metrics",
        "fid",
    ]
    evaluation = evaluate.evaluate(evaluate.make_parser().parse_args(options))
    assert metrics["rfid"] == evaluation["metrics"]["fid"]
    assert "23 generated images of 16x16 pixels" in result["statement"] and result["settings"]["num_images"] == 23
    assert Image.open(folder / "grid.png").size == (10 * 98, 6 * 98)  # three rows of pairs
    assert "rfid" in capsys.readouterr().out


def test_goes_on_where_it_stopped(run, capsys):
    folder = run("--metrics", "none")
    first = json.loads((folder / "result.json").read_text())
    assert "rfid" not in first["metrics"]
    written = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    os.remove(folder / "images" / "000020.png")  # of the second batch
    run("--metrics", "none")
    same = {path for path, time in written.items() if path.stat().st_mtime_ns == time}
    assert len(same) == 16  # the first batch was not made again
    assert json.loads((folder / "result.json").read_text())["metrics"] == first["metrics"]
    with pytest.raises(SystemExit) as error:
        run("--metrics", "none", "--image_size", "32")
    assert error.value.code == 2 and "image_size None, not 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "nowhere"], "There is no folder nowhere: a dataset needs --split"),
        (["--tokenizer", "./nowhere"], "found no tokenizer in './nowhere'"),
        (["--image_size", "15"], "are 15x15, but this tokenizer takes multiples of 2"),
        (["--image_size", "8"], "are 8x8, but"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--metrics", "fad"], "unknown metric 'fad'"),
        (["--device", "abacus"], "no device 'abacus'"),
    ],
)
def test_bad_input(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in line]
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- maskgit reconstruct


def test_command(images_dir, tiny_pipeline_dir, tmp_path, capsys):
    folder = tmp_path / "out"
    command = [
        "reconstruct",
        "--model",
        str(tiny_pipeline_dir),
        "--images_dir",
        str(images_dir),
        "--output_dir",
        str(folder),
    ]
    assert main(command) == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["00000_00.png", "00001_01.png"] and names[-3:] == ["00022_22.png", "grid.png", "psnr.json"]
    report = json.loads((folder / "psnr.json").read_text())
    path = images_dir / "b" / "10.png"
    floats = tensor_of(path)[None] / 127.5 - 1
    tokenizer = load_tokenizer(str(tiny_pipeline_dir))
    decoded = decode_tokens(tokenizer, encode_images(tokenizer, floats))
    assert report["psnr"][str(path)] == pytest.approx(psnr(floats, decoded).item())
    assert report["average_psnr"] == pytest.approx(np.mean(list(report["psnr"].values())))
    assert torch.equal(tensor_of(folder / "00010_10.png"), decoded[0].add(1).mul(127.5).round().byte())
    output = capsys.readouterr().out
    assert f"PSNR {report['average_psnr']:.2f} dB on average" in output and "and 3 better ones in" in output
    assert main(command) == 2
    assert "has files in it" in capsys.readouterr().err


def test_command_takes_images_of_any_size(tiny_pipeline_dir, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (35, 20), 128).save(tmp_path / "images" / "grey.png")
    Image.new("RGBA", (16, 17), (255, 0, 0, 0)).save(tmp_path / "images" / "clear.webp")
    command = ["reconstruct", "--model", str(tiny_pipeline_dir), "--images_dir", str(tmp_path / "images")]
    assert main([*command, "--output_dir", str(tmp_path / "own")]) == 0
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "own").glob("0*.png")}
    assert sizes == {"00000_clear.png": (16, 16), "00001_grey.png": (34, 20)}
    assert main([*command, "--output_dir", str(tmp_path / "cut"), "--image_size", "24"]) == 0
    assert {Image.open(path).size for path in (tmp_path / "cut").glob("0*.png")} == {(24, 24)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images_dir", "nowhere"], "There is no folder 'nowhere' of images"),
        (["--images_dir", "empty"], "There are no images in empty"),
        (["--images_dir", "broken"], "Cannot read the image 'broken/image.png'"),
        (["--images_dir", "dots"], "is smaller than a token of 2 pixels: give --image_size"),
        (["--images_dir", "dots", "--image_size", "15"], "must be a multiple of this tokenizer's 2 pixels"),
        (["--images_dir", "dots", "--image_size", "0"], "--image_size: must be a whole number of at least 1"),
        (["--images_dir", "dots", "--device", "abacus"], "no device 'abacus'"),
        ([], "required: --images_dir"),
    ],
)
def test_command_refuses_bad_input(tiny_pipeline_dir, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "dots"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (1, 1)).save("dots/image.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("broken/image.png")
    (tmp_path / "broken" / "image.png").write_bytes((tmp_path / "broken" / "image.png").read_bytes()[:400])
    assert main(["reconstruct", "--model", str(tiny_pipeline_dir), "--output_dir", "out", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_images_are_never_written_over(run, capsys):
    folder = run()
    before = {path: path.read_bytes() for path in (folder / "images").iterdir()}
    with pytest.raises(SystemExit):
        run("--images", folder / "images", "--overwrite")
    assert "lies in --output_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / "images").iterdir()} == before


@pytest.mark.parametrize("settings", ['{"transformer": "MaskGitDiTTransformer2DModel"}', "[]", "no JSON"])
def test_folder_of_another_program_is_refused(run, tmp_path, capsys, settings):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(settings)
    with pytest.raises(SystemExit):
        run("--overwrite")
    assert "holds images of another program" in capsys.readouterr().err


def test_too_few_images_for_a_metric_are_refused_before_the_work(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--metrics", "kid")
    assert "kid needs at least 1000 real images, but there are 23" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
