import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import VQModel
from PIL import Image

from maskgit.data import ImageDataset, TokenDataset, load_image_dataset
from maskgit.tokenization import encode_images, load_tokenizer, tokenizer_checksum


SCRIPT = Path(__file__).parent.parent / "training" / "encode_dataset.py"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A random tokenizer (16 codes, 16 pixels to 8x8 tokens) and 22 images in two classes, in splits train and test."""
    folder = tmp_path_factory.mktemp("encode")
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        lookup_from_codebook=True,
    )
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    vqvae.save_pretrained(folder / "pipeline" / "vqvae")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(11):
                image = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(folder / "images" / split / name / f"{i:02d}.png")
    return folder


def arguments(paths, output_dir, *more):
    return [
        *("--tokenizer", str(paths / "pipeline"), "--data", str(paths / "images"), "--output_dir", str(output_dir)),
        *("--image_size", "16", "--batch_size", "4", "--images_per_part", "5", *more),
    ]


def encode(paths, output_dir, *more):
    """Runs the script in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    spec = importlib.util.spec_from_file_location("encode_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv, sys.argv = sys.argv, [str(SCRIPT), *arguments(paths, output_dir, *more)]
    try:
        module.main()
    finally:
        sys.argv = argv


def expected_tokens(paths, split="train", flip=False):
    images = ImageDataset(load_image_dataset(str(paths / "images"), split), 16)
    pixels = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    tokenizer = load_tokenizer(str(paths / "pipeline" / "vqvae"))
    return encode_images(tokenizer, pixels.flip(-1) if flip else pixels)


def test_tokens_are_those_of_the_tokenizer(paths, tmp_path):
    encode(paths, tmp_path / "tokens")
    encode(paths, tmp_path / "tokens", "--split", "test")
    for split in ("train", "test"):
        tokens = TokenDataset(tmp_path / "tokens", split)
        assert tokens.tokens.dtype == np.uint16 and tokens.tokens.shape == (22, 64)
        assert tokens.grid_size == (8, 8) and tokens.codebook_size == 16
        assert tokens.label_names == ["cat", "dog"] and tokens.labels.tolist() == [0] * 11 + [1] * 11
        assert torch.equal(torch.stack([tokens[i]["input_ids"] for i in range(22)]), expected_tokens(paths, split))
    rows = datasets.load_dataset(str(tmp_path / "tokens"), split="test", cache_dir=str(tmp_path / "cache"))
    assert rows.features["tokens"] == datasets.List(datasets.Value("uint16"), length=64)
    assert rows.features["label"].names == ["cat", "dog"]


def test_flips_are_extra_rows(paths, tmp_path):
    encode(paths, tmp_path / "tokens", "--with_flips", "--images_per_part", "100")
    tokens = TokenDataset(tmp_path / "tokens")
    assert len(tokens) == 44 and tokens.labels.tolist() == ([0] * 11 + [1] * 11) * 2
    grids = torch.stack([tokens[i]["input_ids"] for i in range(44)])
    assert torch.equal(grids[:22], expected_tokens(paths)) and torch.equal(
        grids[22:], expected_tokens(paths, flip=True)
    )


def test_killed_run_goes_on(paths, tmp_path, capsys):
    encode(paths, tmp_path / "tokens")
    whole = TokenDataset(tmp_path / "tokens").tokens
    files = sorted((tmp_path / "tokens" / "data").iterdir())
    kept = files[0].stat().st_mtime_ns
    files[1].rename(files[1].with_name(f".{files[1].name}.tmp"))  # what a kill while writing leaves
    files[3].unlink()
    with pytest.raises(ValueError, match="not complete: 3 of 5 parts.*encode_dataset.py again"):
        TokenDataset(tmp_path / "tokens")
    encode(paths, tmp_path / "tokens")
    assert "5 parts (2 new)" in capsys.readouterr().out
    assert np.array_equal(TokenDataset(tmp_path / "tokens").tokens, whole)
    assert files[0].stat().st_mtime_ns == kept and sorted((tmp_path / "tokens" / "data").iterdir()) == files


def test_two_processes(paths, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += arguments(paths, tmp_path / "tokens")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "train: 100%" in done.stderr
    if not torch.accelerator.is_available():
        assert "12/12" in done.stderr  # the first of two processes has parts 0, 2 and 4, the last one of 2 images
    tokens = TokenDataset(tmp_path / "tokens")
    assert np.array_equal(tokens.tokens, expected_tokens(paths).flatten(1).numpy())


def test_other_options_are_refused_or_overwrite(paths, tmp_path, capsys):
    encode(paths, tmp_path / "tokens")
    for more, message in (
        (["--with_flips"], "give the same options to go on with it, or --overwrite"),
        (["--image_size", "32"], "was made with grid_height 8, not 16: give --overwrite"),
    ):
        with pytest.raises(SystemExit) as stop:
            encode(paths, tmp_path / "tokens", *more)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    encode(paths, tmp_path / "tokens", "--image_size", "32", "--images_per_part", "9", "--overwrite")
    assert TokenDataset(tmp_path / "tokens").grid_size == (16, 16)


def test_a_retrained_tokenizer_is_noticed(paths, tmp_path, capsys):
    vqvae = VQModel.from_pretrained(paths / "pipeline" / "vqvae")
    vqvae.save_pretrained(tmp_path / "vqvae")
    again = ["--tokenizer", str(tmp_path / "vqvae")]
    encode(paths, tmp_path / "tokens")
    encode(paths, tmp_path / "tokens", *again)  # the same weights in another place
    assert "5 parts (0 new)" in capsys.readouterr().out
    with torch.no_grad():
        vqvae.quantize.embedding.weight[3, 1] += 1
    vqvae.save_pretrained(tmp_path / "vqvae")
    for more in ([], ["--split", "test"]):
        with pytest.raises(SystemExit) as stop:
            encode(paths, tmp_path / "tokens", *again, *more)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "other weights than those of" in error
        assert ("another --output_dir" if more else "--overwrite") in error
    encode(paths, tmp_path / "tokens", *again, "--overwrite")
    assert TokenDataset(tmp_path / "tokens").tokenizer_checksum == tokenizer_checksum(vqvae)


def test_a_broken_image_ends_with_one_line(paths, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        encode(paths, tmp_path / "tokens", "--data", str(tmp_path / "images"))
    assert stop.value.code == 2
    assert f"image 1 ({tmp_path / 'images' / 'dog' / '0.png'}) cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tokenizer", "nowhere/else/at/all"], "found no tokenizer"),
        (["--data", "./nothing"], "there is no folder './nothing'"),
        (["--split", "validation"], "cannot read split 'validation'"),
        (["--batch_size", "0"], "--batch_size 0: give a number above 0"),
    ],
)
def test_mistakes_end_with_one_line(paths, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        encode(paths, tmp_path / "tokens", *more)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_used_folder_is_refused(paths, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        encode(paths, tmp_path, "--overwrite")
    assert "holds something that is no token dataset" in capsys.readouterr().err
