import json

import numpy as np
import pytest
from PIL import Image

from maskgit.images import MASK_FILL
from maskgit_cli import main


@pytest.fixture
def picture(tmp_path):
    """The file of a picture of the tiny model's size."""
    array = np.random.RandomState(0).randint(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(array).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def inpaint(tiny_pipeline_dir, picture, tmp_path):
    """Runs `maskgit inpaint` in this process with the tiny model; returns the folder that it wrote."""

    def run(name, *arguments, mask="4,6,6,4", image=picture, label="bag"):
        folder = tmp_path / name
        command = ["inpaint", "--model", str(tiny_pipeline_dir), "--image", str(image), "--mask", str(mask)]
        assert main([*command, "--class", label, "--output_dir", str(folder), *arguments]) == 0
        return folder

    return run


def read_images(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def read_settings(folder):
    return json.loads((folder / "settings.json").read_text())


def test_files_grid_and_settings(inpaint, picture, tiny_pipeline_dir, capsys):
    folder = inpaint("out", "--num_images", "3", "--seed", "7")
    names = ["00000_bag.png", "00001_bag.png", "00002_bag.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "grid.png", "settings.json"]
    output = capsys.readouterr()
    assert output.out == f"Wrote 3 images to {folder}, all of them beside the original in {folder / 'grid.png'}\n"
    assert "3/3" in output.err  # the steps of the only batch

    original = np.asarray(Image.open(picture))
    results = read_images(folder)
    # The box is columns 4 to 9 and rows 6 to 9, cells of 2 pixels; 2 pixels around are a blend.
    outside = np.ones((16, 16), dtype=bool)
    outside[4:12, 2:12] = False
    for result in results.values():
        assert np.array_equal(result[outside], original[outside])
        assert not np.array_equal(result[6:10, 4:10], original[6:10, 4:10])
    grid = np.asarray(Image.open(folder / "grid.png"))
    assert grid.shape == (98, 5 * 98, 3)
    tiles = [grid[1:97, 98 * i + 1 : 98 * i + 97] for i in range(5)]
    assert np.array_equal(tiles[0], original.repeat(6, 0).repeat(6, 1))
    assert all(np.array_equal(tiles[2 + i], results[names[i]].repeat(6, 0).repeat(6, 1)) for i in range(3))
    covered = (tiles[1][6::12, 6::12] == MASK_FILL).all(-1)
    assert covered[3:5, 2:5].all() and covered.sum() == 6

    settings = read_settings(folder)
    expected = {
        "model": str(tiny_pipeline_dir),
        "image": str(picture),
        "mask": [4, 6, 6, 4],
        "class": 8,
        "class_name": "bag",
        "num_images": 3,
        "seed": 7,
        "num_inference_steps": 3,  # the model's own
        "guidance_scale": 2.0,
        "mask_dilation": 0,
        "composite": True,
        "scheduler": "HaltonScheduler",
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_file_is_the_same_mask_as_a_box(inpaint, tmp_path):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 6, 10, 10))
    mask.save(tmp_path / "mask.png")
    expected = read_images(inpaint("box"))
    assert all(
        np.array_equal(image, expected[name])
        for name, image in read_images(inpaint("file", mask=tmp_path / "mask.png")).items()
    )


def test_result_depends_on_its_own_seed_only(inpaint):
    together = read_images(inpaint("together", "--num_images", "4"))
    batches = read_images(inpaint("batches", "--num_images", "4", "--batch_size", "3"))
    assert all(np.array_equal(together[name], batches[name]) for name in together)
    alone = read_images(inpaint("alone", "--num_images", "1", "--seed", "2"))
    assert np.array_equal(alone["00000_bag.png"], together["00002_bag.png"])
    assert not np.array_equal(together["00000_bag.png"], together["00001_bag.png"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mask_dilation", "1"],
        ["--no_composite"],
        ["--scheduler", "confidence"],
        ["--num_inference_steps", "1"],
        ["--guidance_scale", "9"],
        ["--seed", "1"],
    ],
)
def test_options_change_the_result(inpaint, arguments):
    usual = read_images(inpaint("usual", "--num_images", "1"))["00000_bag.png"]
    folder = inpaint("changed", "--num_images", "1", *arguments)
    assert not np.array_equal(read_images(folder)["00000_bag.png"], usual)
    settings = read_settings(folder)
    if arguments[0] == "--no_composite":
        assert settings["composite"] is False
    elif arguments[0] != "--scheduler":
        assert settings[arguments[0][2:]] == int(arguments[1])


def test_photos_are_turned_upright_and_resized(inpaint, tmp_path):
    """As cameras store them: on their side, with a note which way is up. The box is on the upright picture."""
    photo = Image.new("RGB", (64, 48), "black")
    photo.paste((255, 255, 255), (0, 0, 64, 24))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned right: what is above comes to the right
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    folder = inpaint("out", image=tmp_path / "photo.jpg", mask="0,48,48,16")
    (result, *_) = read_images(folder).values()
    assert result.shape == (16, 16, 3)
    assert result[:10, :6].max() < 30 and result[:10, 10:].min() > 225


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--image", "nowhere.png"], "Cannot read the image 'nowhere.png': No such file or directory"),
        (["--image", "text.png"], "Cannot read the image 'text.png': cannot identify image file"),
        (["--image", "cut.png"], "Cannot read the image 'cut.png'"),
        (["--mask", "nowhere.png"], "Cannot read the image 'nowhere.png'"),
        (["--mask", "small.png"], "8 x 4 (height x width), but must be of the image's size, 16 x 16"),
        (["--mask", "black.png"], "nothing to paint"),
        (["--mask", "1,2,3"], "--mask: must be a file, or X,Y,W,H in pixels"),
        (["--mask", "0,0,0,5"], "--mask: must be a file, or X,Y,W,H in pixels"),
        (["--mask=-1,0,5,5"], "--mask: must be a file, or X,Y,W,H in pixels"),
        (["--mask", "0,0,1.5,5"], "--mask: must be a file, or X,Y,W,H in pixels"),
        (["--mask", "16,0,4,4"], "The box 16,0,4,4 is outside the image, which has 16 x 16 pixels"),
        (["--class", "10"], "no class 10"),
        (["--class", "boots"], "Unknown class name 'boots'"),
        (["--class", ""], "Unknown class name"),
        (["--num_images", "0"], "--num_images: must be a whole number of at least 1"),
        (["--mask_dilation", "-1"], "--mask_dilation: must be a whole number of at least 0"),
        (["--self_guidance_scale", "1"], "toast"),
        (["--model", "nowhere"], "no folder 'nowhere'"),
    ],
)
def test_bad_input(tiny_pipeline_dir, picture, tmp_path, capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:100])
    Image.new("L", (4, 8), 255).save(tmp_path / "small.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    command = ["inpaint", "--model", str(tiny_pipeline_dir), "--image", str(picture), "--mask", "0,0,4,4"]
    assert main([*command, "--class", "1", "--output_dir", "out", *arguments]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("maskgit: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folder_with_files_is_left_alone(inpaint, tiny_pipeline_dir, picture, capfd):
    folder = inpaint("out", "--num_images", "1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["inpaint", "--model", str(tiny_pipeline_dir), "--image", str(picture), "--mask", "0,0,4,4"]
    command += ["--class", "1", "--output_dir", str(folder)]
    capfd.readouterr()
    assert main(command) == 2
    assert "has files in it" in capfd.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*command, "--overwrite"]) == 0
    assert (folder / "00000_trouser.png").is_file()


def test_sample_of_the_builtin_model_is_painted_on(tmp_path):
    arguments = ["--num_inference_steps", "2"]
    sample = ["sample", "--classes", "sneaker", "--images_per_class", "1", "--output_dir", str(tmp_path / "sample")]
    assert main([*sample, *arguments]) == 0
    image = tmp_path / "sample" / "00000_sneaker.png"
    command = ["inpaint", "--image", str(image), "--mask", "16,0,16,32", "--class", "ankle-boot", "--num_images", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *arguments]) == 0
    result = np.asarray(Image.open(tmp_path / "out" / "00000_ankle-boot.png"))
    assert np.array_equal(result[:, :12], np.asarray(Image.open(image))[:, :12])
