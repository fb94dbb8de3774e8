"""What the README and the docs tell a reader to do works, and is said without gaps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_blocks(text):
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def test_nothing_is_left_to_fill_in():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z_]+@|MEASURED|TODO", text), path


def test_links_and_pictures_are_there():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path}: {target}"


def test_commands_name_files_that_exist():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in shell_blocks(path.read_text(encoding="utf-8")):
            for name in re.findall(r"(?:training|evaluations|scripts|configs)/\w+\.(?:py|yaml)", block):
                assert (ROOT / name).is_file(), f"{path}: {name}"


@pytest.mark.slow
def test_training_on_ones_own_images(tmp_path):
    """The README's commands on a folder of images, in debug size: its class names must not be mistaken for splits."""
    random = np.random.RandomState(0)
    for name in ("bullet_train", "car"):
        folder = tmp_path / "my_images" / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(random.randint(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    for name in ("configs", "training"):
        (tmp_path / name).symlink_to(ROOT / name)

    block = next(block for block in shell_blocks(README) if "data=my_images" in block)
    commands = block.replace("\\\n", " ").splitlines()
    assert commands[0].startswith("pip install")
    for command in commands[1:]:
        words = shlex.split(command)
        assert words[:2] == ["accelerate", "launch"]
        words = [sys.executable, *words[2:]]
        if "encode_dataset" in command:
            words[words.index("--image_size") + 1] = "32"
        else:
            words.append("debug=true")
        result = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"
    result = subprocess.run(
        [sys.executable, "-c", "import sys, maskgit_cli; sys.exit(maskgit_cli.main())", "sample"]
        + ["--model", "outputs/my_model/pipeline", "--classes", "bullet_train", "--images_per_class", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs" / "samples" / "00000_bullet_train.png").is_file()
