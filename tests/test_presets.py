import importlib
import json
import shlex
from pathlib import Path

import pytest
import yaml

from maskgit import ConfidenceScheduler, HaltonScheduler, MaskGitPipeline
from maskgit.conversion import halton, maskgit_v1, pgm
from maskgit.conversion.sources import SOURCES
from maskgit.pipelines.pipeline_maskgit import CALL_DEFAULTS, GUIDANCE_SCHEDULES
from maskgit.presets import apply_preset, load_preset, preset_names
from maskgit_cli import main


CONFIGS = Path(__file__).parent.parent / "configs" / "presets"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_presets_of_the_package_are_those_of_the_checkout():
    assert preset_names() == NAMES and len(NAMES) >= 29


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_valid(name):
    preset = load_preset(name)
    assert load_preset(CONFIGS / f"{name}.yaml") == preset
    call = CALL_DEFAULTS | preset.call
    assert call["guidance_schedule"] in GUIDANCE_SCHEDULES and call["guidance_scale"] >= 1
    assert isinstance(call["num_inference_steps"], int) and 8 <= call["num_inference_steps"] <= 64
    assert "fid" in preset.published["metrics"] or name.startswith(("unlockmgm", "maskgit-v1-512-looks"))
    for value in preset.published["metrics"].values():
        assert isinstance(value, (int, float)) and value > 0
    assert preset.published["protocol"] and preset.published["source"] and preset.reproduced is False

    # The commands: each file that is converted was downloaded, and the source and its options exist.
    downloads = " ".join(preset.model["download"])
    for command in preset.model["conversion"]:
        python, script, source, *options = shlex.split(command)
        assert (python, script) == ("python", "scripts/convert_to_diffusers.py") and source in SOURCES
        options = dict(zip(options[::2], options[1::2]))
        known = {"--transformer", "--tokenizer", "--toast", "--output_dir", "--tokenizer_config"}
        assert options.keys() <= known and "--output_dir" in options
        for option, file in options.items():
            assert option == "--output_dir" or file in downloads
    assert source == preset.model["source"]
    comments = (CONFIGS / f"{name}.yaml").read_text().partition("\n\n")[0]
    assert f"maskgit sample --model {options['--output_dir']} --preset {name} " in comments


def test_presets_say_what_the_converters_write():
    def check(name, make_scheduler, call_defaults, config, result):
        preset = load_preset(name)
        scheduler, defaults = make_scheduler(config), call_defaults(config)
        assert type(scheduler).__name__ == preset.scheduler
        built = type(scheduler)(mask_token_id=config["codebook_size"], **preset.scheduler_config)
        for field, value in built.config.items():
            if field[0] != "_":
                assert value == scheduler.config[field], (name, field)
        assert CALL_DEFAULTS | defaults == CALL_DEFAULTS | preset.call, name
        metrics = preset.published["metrics"]
        assert (metrics["fid"], metrics["inception_score"]) == (result.fid, result.inception_score)

    for (hidden_size, num_layers, sample_size), result in halton.PUBLISHED_RESULTS.items():
        config = {"codebook_size": 16384, "num_classes": 1000, "sample_size": sample_size}
        config |= {"hidden_size": hidden_size, "num_layers": num_layers}
        name = f"halton-{result.name}-{result.image_size}"
        check(name, halton.make_scheduler, halton.call_defaults, config, result)
    for (hidden_size, num_layers, sample_size), result in maskgit_v1.PUBLISHED_RESULTS.items():
        config = {"codebook_size": 1024, "num_classes": 1000, "sample_size": sample_size}
        config |= {"hidden_size": hidden_size, "num_layers": num_layers}
        check(
            f"maskgit-v1-{result.image_size}",
            maskgit_v1.make_scheduler,
            maskgit_v1.call_defaults,
            config,
            result,
        )
    for (num_layers, num_decoder_layers), results in pgm.PUBLISHED_RESULTS.items():
        config = {"codebook_size": 16384, "num_classes": 1000, "sample_size": 32, "hidden_size": 1024}
        config |= {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers, "self_attention_layers": None}
        name = f"pgm-{num_layers}-{num_decoder_layers}-halton-32"
        check(name, pgm.make_scheduler, pgm.call_defaults, config, results[0])


def test_preset_replaces_scheduler_and_call_defaults(tiny_pipeline_dir):
    pipe = MaskGitPipeline.from_pretrained(tiny_pipeline_dir)  # 3 steps, with guidance
    arguments = apply_preset(pipe, load_preset("maskgit-torch-256"))
    assert arguments == {
        "guidance_scale": 1.0,
        "guidance_schedule": "constant",
        "self_guidance_scale": 0.0,
        "num_inference_steps": 16,
    }
    assert type(pipe.scheduler) is ConfidenceScheduler and pipe.scheduler.config.mask_token_id == 32
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, **arguments, output_type="latent").images.shape == (1, 8, 8)

    apply_preset(pipe, load_preset("pgm-12-12-halton-32"))
    assert type(pipe.scheduler) is HaltonScheduler and pipe.scheduler.config.temperature_warmup_steps == 1


def test_command_samples_with_a_preset(tiny_pipeline_dir, tmp_path, capsys):
    preset = yaml.safe_load((CONFIGS / "maskgit-v1-256.yaml").read_text())
    preset["call"]["num_inference_steps"] = 2
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(preset))

    def settings(folder, *arguments):
        folder = tmp_path / folder
        command = ["sample", "--model", str(tiny_pipeline_dir), "--classes", "1", "--output_dir", str(folder)]
        assert main([*command, "--images_per_class", "1", *arguments]) == 0
        return json.loads((folder / "settings.json").read_text())

    made = settings("plain", "--preset", str(file))
    assert made["preset"] == str(file)
    assert made["scheduler"] == "ConfidenceScheduler" and made["scheduler_config"]["progress"] == "elapsed_increments"
    assert (made["guidance_scale"], made["guidance_schedule"], made["num_inference_steps"]) == (4.0, "linear", 2)

    # Options win over it. A scheduler of the same class keeps the preset's settings.
    made = settings("options", "--preset", str(file), "--guidance_scale", "1.5", "--num_inference_steps", "3")
    assert (made["guidance_scale"], made["guidance_schedule"], made["num_inference_steps"]) == (1.5, "linear", 3)
    made = settings("same", "--preset", str(file), "--scheduler", "confidence")
    assert made["scheduler_config"]["progress"] == "elapsed_increments"
    made = settings("other", "--preset", str(file), "--scheduler", "halton")
    assert made["scheduler"] == "HaltonScheduler" and made["guidance_scale"] == 4.0

    capsys.readouterr()
    assert main(["sample", "--preset", "halton-bsae-256", "--output_dir", str(tmp_path / "wrong")]) == 2
    assert "did you mean halton-base-256" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheduler": "HaltonSchedule"}, "must be one of HaltonScheduler"),
        ({"scheduler_config": {"progres": "elapsed"}}, "did you mean 'progress'"),
        ({"scheduler_config": {"progress": "half"}}, "`progress` is 'half'"),
        ({"scheduler_config": {"choice_temperature": "hot"}}, "scheduler_config"),
        ({"call": {"guidance": 2.0}}, "did you mean 'guidance_scale'"),
        ({"published": {"metrics": {}}}, "published lacks protocol, source"),
        ({"steps": 3}, "unknown key 'steps' in a preset"),
        ({"call": None}, "call must be keys with values"),
    ],
)
def test_wrong_presets_are_refused(tmp_path, change, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load((CONFIGS / "maskgit-torch-256.yaml").read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_preset(file)


def test_files_that_are_no_presets(tmp_path):
    file = tmp_path / "mine.yaml"
    with pytest.raises(OSError, match="mine.yaml"):
        load_preset(file)
    for text, message in (("a: [", "no YAML file"), ("- 1\n", "no preset"), ("", "no preset")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_preset(file)
    with pytest.raises(ValueError, match="there are halton-base-256, .*A file of your own ends in .yaml"):
        load_preset("zzz")


def test_setup_packages_the_files():
    setup = (CONFIGS.parent.parent / "setup.py").read_text()
    assert "preset_files/*.yaml" in setup
    assert (Path(importlib.import_module("maskgit").__file__).parent / "preset_files").resolve() == CONFIGS.resolve()
