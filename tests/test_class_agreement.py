import json

import class_agreement
import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGitPipeline


@pytest.fixture
def data(tmp_path, tiny_pipeline_dir):
    """Images of plain colours, one for each class of the tiny pipeline, as a saved dataset."""
    id2label = MaskGitPipeline.from_pretrained(tiny_pipeline_dir).id2label
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[id2label[i] for i in range(10)])}
    )
    splits = {}
    for split, count in (("train", 260), ("test", 20)):
        images = [Image.fromarray(np.full((16, 16, 3), 25 * (i % 10), dtype=np.uint8)) for i in range(count)]
        rows = {"image": images, "label": [i % 10 for i in range(count)]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["class_agreement.py", *map(str, arguments)])
    class_agreement.main()


def test_agreement_is_measured_and_kept(tmp_path, data, tiny_pipeline_dir, monkeypatch, capsys):
    arguments = ["--data", data, "--model", tiny_pipeline_dir, "--num_images", 20, "--guidance_scale", 1, 2]
    arguments += ["--num_inference_steps", 2, "--epochs", 30, "--output_dir", tmp_path / "out"]
    run(monkeypatch, *arguments)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classifier_accuracy_on_real_images"] > 0.5  # chance is 0.1
    assert 0 <= result["agreement"]["2.0"]["all"] <= 1 and 0 < result["tokenizer_codebook_usage"] <= 1
    assert (tmp_path / "out" / "grid_guidance_2.0.png").is_file()

    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *arguments)
    assert error.value.code == 2 and "--overwrite" in capsys.readouterr().err
    run(monkeypatch, *arguments, "--overwrite")
    assert "training the classifier" not in capsys.readouterr().err  # the saved one is used again


def test_other_classes_are_refused(tmp_path, data, tiny_pipeline_dir, monkeypatch, capsys):
    splits = datasets.load_from_disk(str(data))
    names = splits["train"].features["label"].names[::-1]
    splits.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(tmp_path / "other")
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "--data", tmp_path / "other", "--model", tiny_pipeline_dir, "--output_dir", tmp_path / "out")
    assert error.value.code == 2 and "but the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generated_folders_are_judged(tmp_path, data, tiny_pipeline_dir, monkeypatch, capsys):
    """Images of the colours that the classifier learns: those asked for in one folder, others in the other."""
    for name, shift in (("right", 0), ("wrong", 1)):
        (tmp_path / name / "images").mkdir(parents=True)
        settings = {"num_classes": 10, "labels": "balanced", "seed": 0}
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        for i in range(20):
            colour = 25 * ((i + shift) % 10)
            Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / name / "images" / f"{i:06d}.png")
    arguments = ["--data", data, "--model", tiny_pipeline_dir, "--epochs", 30, "--output_dir", tmp_path / "out"]
    run(monkeypatch, *arguments, "--generated", tmp_path / "right", tmp_path / "wrong")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    agreement = {name: values["all"] for name, values in result["agreement"].items()}
    assert agreement["right"] == result["classifier_accuracy_on_real_images"]
    assert agreement["wrong"] < agreement["right"]
    assert result["agreement"]["right"]["variance_within_classes"] == 0  # all of a class are of one colour
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--overwrite", "--generated", data)
    assert "was not written by evaluations/generate.py" in capsys.readouterr().err


def test_variance_within_classes():
    """Of two classes with different means: the mean of their own variances."""
    images = torch.tensor([-1.0, 1.0, 0.5, 0.5]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert class_agreement.variance_within_classes(images, torch.tensor([0, 0, 1, 1])) == pytest.approx((2 + 0) / 2)
