import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from maskgit.data import (
    TOKEN_DATASET_INFO,
    ImageDataset,
    TokenDataset,
    UnreadableImageError,
    image_to_tensor,
    load_image_dataset,
)


def random_image(seed, size=(32, 32), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def image_folder(tmp_path):
    for split in ("train", "validation"):
        for name in ("zebra", "ant", "bee"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                random_image(i).save(folder / f"{i}.png")
    return tmp_path / "images"


class TestImageToTensor:
    def test_image_of_the_right_size_is_not_touched(self):
        image = random_image(0)
        pixels = image_to_tensor(image, 32)
        assert pixels.dtype == torch.float32 and pixels.shape == (3, 32, 32)
        assert np.array_equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), np.asarray(image))
        assert pixels.min() == -1 and pixels.max() == 1

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
    def test_any_mode_becomes_rgb(self, mode):
        if mode == "I;16":
            image = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
        else:
            image = Image.new("RGB", (8, 8), "white").convert(mode)
        assert torch.equal(image_to_tensor(image, 8), torch.ones(3, 8, 8))

    def test_transparent_pixels_are_white(self):
        assert torch.equal(image_to_tensor(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8), torch.ones(3, 8, 8))

    @pytest.mark.parametrize("size", [(64, 33), (33, 64), (20, 20), (17, 50)])
    def test_shorter_side_is_resized(self, size):
        assert image_to_tensor(random_image(0, size), 32).shape == (3, 32, 32)

    def test_centre_and_corners(self):
        stripes = Image.fromarray(np.repeat(np.arange(0, 96, dtype=np.uint8)[None], 32, axis=0))
        for crop, first in (((0.0, 0.5), 0), ((0.5, 0.5), 32), ((1.0, 0.5), 64)):
            assert ((image_to_tensor(stripes, 32, crop)[0, 0, 0] + 1) * 127.5).round() == first


class TestImageDataset:
    def test_augmentation_depends_on_seed_epoch_and_index_only(self, image_folder):
        rows = load_image_dataset(str(image_folder))
        images = ImageDataset(rows, 16, random_crop=True, random_flip=True, seed=3)
        first = [images[i]["pixel_values"] for i in range(6)]
        torch.rand(5)
        assert all(torch.equal(images[i]["pixel_values"], first[i]) for i in reversed(range(6)))
        images.set_epoch(1)
        assert any(not torch.equal(images[i]["pixel_values"], first[i]) for i in range(6))

    def test_random_flip_mirrors_about_half(self, image_folder):
        plain = ImageDataset(load_image_dataset(str(image_folder)), 32)
        flipped = ImageDataset(plain.dataset, 32, random_flip=True)
        mirrored = 0
        for epoch in range(10):
            flipped.set_epoch(epoch)
            for i in range(6):
                if not torch.equal(flipped[i]["pixel_values"], plain[i]["pixel_values"]):
                    assert torch.equal(flipped[i]["pixel_values"].flip(-1), plain[i]["pixel_values"])
                    mirrored += 1
        assert 15 < mirrored < 45

    @pytest.mark.parametrize("workers", [0, 1])
    def test_broken_image_is_named(self, image_folder, workers):
        path = image_folder / "train" / "bee" / "1.png"
        path.write_bytes(path.read_bytes()[:200])
        images = ImageDataset(load_image_dataset(str(image_folder)), 16)
        with pytest.raises(UnreadableImageError) as error:
            list(torch.utils.data.DataLoader(images, num_workers=workers))
        assert str(error.value).startswith(f"image 3 ({path}) cannot be read: ")
        assert "\n" not in str(error.value)


class TestLoadImageDataset:
    def test_class_folders_give_sorted_labels(self, image_folder):
        rows = load_image_dataset(str(image_folder), "validation")
        assert rows.features["label"].names == ["ant", "bee", "zebra"]
        assert rows["label"] == [0, 0, 1, 1, 2, 2]

    @pytest.mark.parametrize("above", ["", "train"])
    def test_names_that_look_like_splits(self, tmp_path, above):
        for name in ("bus", "car", "bullet_train", "eval-kit"):
            folder = tmp_path / above / name
            folder.mkdir(parents=True)
            for file in ("my_train_1", "photo-test", "1", "validation"):
                random_image(0).save(folder / f"{file}.png")
        if above:
            (tmp_path / "val" / "bullet_train").mkdir(parents=True)
            (tmp_path / "val" / "car").mkdir()
            for name in ("bullet_train", "car"):
                random_image(0).save(tmp_path / "val" / name / "train.png")
            assert load_image_dataset(str(tmp_path), "validation")["label"] == [0, 2]
        rows = load_image_dataset(str(tmp_path))
        assert rows.features["label"].names == ["bullet_train", "bus", "car", "eval-kit"]
        assert sorted(rows["label"]) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4

    @pytest.mark.parametrize("form", ["saved", "parquet"])
    def test_other_folders_and_column_names(self, tmp_path, form):
        rows = {"key": ["a", "b", "c"], "img": [random_image(i) for i in range(3)], "cls": [10, 2, 0]}
        rows = datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image())
        if form == "saved":
            datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "rows")
        else:
            rows.to_parquet(tmp_path / "rows" / "train.parquet")
        loaded = load_image_dataset(str(tmp_path / "rows"))
        assert loaded.column_names == ["image", "label"]
        assert loaded["label"] == [10, 2, 0]  # ids stay what they are, also above 9
        assert len(loaded.features["label"].names) == 11

    def test_webdataset_shards(self, tmp_path):
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for i in range(3):
                buffer = io.BytesIO()
                random_image(i).save(buffer, format="PNG")
                for name, content in ((f"{i}.png", buffer.getvalue()), (f"{i}.cls", str(i).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        loaded = load_image_dataset(str(tmp_path))
        assert loaded["label"] == [0, 1, 2]
        assert image_to_tensor(loaded[2]["image"], 32).equal(image_to_tensor(random_image(2), 32))

    def test_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="there is no folder"):
            load_image_dataset(str(tmp_path / "nothing"))

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "notes.md").write_text("no image")
        with pytest.raises(ValueError, match="cannot read split 'train' of images"):
            load_image_dataset(str(tmp_path))

    def test_missing_split(self, image_folder, tmp_path):
        with pytest.raises(ValueError, match="test"):
            load_image_dataset(str(image_folder), "test")
        datasets.DatasetDict({"train": load_image_dataset(str(image_folder))}).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="no split 'test', only train"):
            load_image_dataset(str(tmp_path / "saved"), "test")


class TestTokenDataset:
    def test_folder_that_is_none(self, image_folder):
        with pytest.raises(ValueError, match="is no token dataset.*encode_dataset.py"):
            TokenDataset(image_folder)

    def test_incomplete_and_missing_split(self, tmp_path):
        info = {"splits": {"train": {"num_parts": 2}}, "grid_height": 8, "grid_width": 8}
        (tmp_path / TOKEN_DATASET_INFO).write_text(json.dumps(info))
        with pytest.raises(ValueError, match="not complete: 0 of 2 parts"):
            TokenDataset(tmp_path)
        with pytest.raises(ValueError, match="no split 'test', only train"):
            TokenDataset(tmp_path, "test")
