# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""Model cards: the README.md beside saved weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


# Stands for the id of the Hub repository until the folder is uploaded.
MODEL_ID = "path/to/this/folder"

PIPELINE_USAGE = """\
With the package `maskgit`, whose own classes are used:

```python
from maskgit import MaskGitPipeline

pipe = MaskGitPipeline.from_pretrained("{model_id}")
pipe({label}).images[0].save("sample.png")
```

Without it, diffusers is enough; it runs the Python files that lie beside the weights:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model_id}", trust_remote_code=True)
pipe({label}).images[0].save("sample.png")
```

A call without further arguments uses {defaults}.
"""


def _read_config(folder: Path, *parts: str) -> dict:
    path = folder.joinpath(*parts)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _grid(sample_size: int | Sequence[int]) -> str:
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return f"{height} x {width}"


def _usage(folder: Path, model_id: str) -> str:
    index = _read_config(folder, "model_index.json")
    if index:
        defaults = {"guidance_scale": 1.0, "num_inference_steps": 32} | (index.get("call_defaults") or {})
        return PIPELINE_USAGE.format(
            model_id=model_id,
            label=json.dumps(next(iter((index.get("id2label") or {"0": 0}).values()))),
            defaults=", ".join(f"`{name}={value!r}`" for name, value in defaults.items()),
        )
    text = ""
    for part in ("transformer", "toast", "vqvae", ""):
        config = _read_config(folder, part, "config.json")
        if config:
            name, package = config["_class_name"], "diffusers" if config["_class_name"] == "VQModel" else "maskgit"
            subfolder = f', subfolder="{part}"' if part else ""
            variable = part or "model"
            text += f'from {package} import {name}\n\n{variable} = {name}.from_pretrained("{model_id}"{subfolder})\n'
    return f"```python\n{text}```\n"


def _parts(folder: Path) -> str:
    rows = []
    transformer = _read_config(folder, "transformer", "config.json")
    if transformer:
        rows.append(
            f"- Transformer: `{transformer['_class_name']}`, {transformer['num_layers']} layers of "
            f"{transformer['hidden_size']} channels and {transformer['num_attention_heads']} heads; "
            f"{_grid(transformer['sample_size'])} tokens of {transformer['codebook_size']} codes; "
            f"{transformer['num_classes']} classes."
        )
    toast = _read_config(folder, "toast", "config.json")
    if toast:
        rows.append(f"- Self-guidance adapter: `{toast['_class_name']}`, used where `self_guidance_scale` is above 0.")
    tokenizer = _read_config(folder, "vqvae", "config.json")
    if tokenizer:
        rows.append(f"- Tokenizer: `{tokenizer['_class_name']}`.")
        if "num_vq_embeddings" in tokenizer:
            factor = 2 ** (len(tokenizer["block_out_channels"]) - 1)
            rows[-1] = (
                f"- Tokenizer: `{tokenizer['_class_name']}`, {factor} x {factor} pixels a token, {tokenizer['num_vq_embeddings']} codes of "
                f"{tokenizer.get('vq_embed_dim') or tokenizer['latent_channels']} channels."
            )
    scheduler = _read_config(folder, "scheduler", "scheduler_config.json")
    if scheduler:
        rows.append(f"- Scheduler: `{scheduler['_class_name']}`.")
    return "\n".join(rows) + "\n"


def write_model_card(
    folder: str | Path,
    title: str,
    summary: str,
    sections: Mapping[str, str] | None = None,
    model_id: str = MODEL_ID,
    license: str | None = None,
    datasets: Sequence[str] = (),
    base_model: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Path:
    """
    Writes the model card README.md into a saved pipeline or model. How to load it and what it is made of are read from the
    folder; a picture `grid.png` in it is shown.

    Args:
        folder (`str` or `Path`): The saved folder.
        title (`str`): Heading of the card.
        summary (`str`): What the model does and where it comes from, in markdown.
        sections (`Mapping[str, str]`, *optional*): Further sections, heading to markdown: training, results, licence,
            citation.
        model_id (`str`, *optional*): The Hub repository; filled in when the folder is uploaded if left out.
        license (`str`, *optional*): Licence of the weights, by its identifier on the Hub.
        datasets (`Sequence[str]`): Hub ids of the training data.
        base_model (`Sequence[str]`): Hub ids of the models that this one was made from.
        metrics (`Sequence[str]`): Names of the metrics that the card reports.
    """
    folder = Path(folder)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=license,
        tags=["maskgit", "class-conditional", "image-generation"],
        datasets=list(datasets) or None,
        base_model=list(base_model) or None,
        metrics=list(metrics) or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{summary}\n"
    if (folder / "grid.png").is_file():
        text += "\n![samples](grid.png)\n"
    for heading, section in {
        "Use": _usage(folder, model_id),
        "Parts": _parts(folder),
        **(sections or {}),
    }.items():
        if section.strip():
            text += f"\n## {heading}\n\n{section.strip()}\n"
    path = folder / "README.md"
    ModelCard(text).save(path)
    return path
