"""Packaging: `pip install .` for sampling, `pip install .[train,eval,app]` for the rest, `pip install -e .[dev]` to work on it."""

from setuptools import find_packages, setup


INSTALL_REQUIRES = [
    "torch>=2.6",
    "diffusers>=0.42,<0.44",
    "transformers>=4.41.2",  # the text encoder of aMUSEd, whose pipelines run with our schedulers
    "accelerate>=1.0",
    "huggingface_hub>=1.32",
    "safetensors>=0.8",
    "requests",  # `import diffusers` fails without it, and nothing else brings it any more
    "numpy",
    "pillow",
    "tqdm",
    "pyyaml",
]
EXTRAS = {
    "train": ["datasets>=4.0", "tensorboard"],
    "eval": ["torch-fidelity>=0.4", "scipy", "matplotlib"],
    "app": ["gradio"],
    "convert": ["msgpack"],  # Flax files
}
EXTRAS["dev"] = [
    *EXTRAS["train"],
    *EXTRAS["eval"],
    *EXTRAS["convert"],
    "peft>=0.17",
    "Jinja2",  # model cards
    "pytest",
    "ruff",
]

setup(
    name="maskgit",
    version="0.1.0.dev0",
    description="Masked generative image transformers for diffusers: models, schedulers, pipelines, training and conversion",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    py_modules=["maskgit_cli"],
    package_data={"maskgit": ["builtin_models/**/*", "imagenet_classes.txt", "preset_files/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["maskgit=maskgit_cli:main"]},
)
