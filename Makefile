# `make demo`, `make evaluate` and `make test` need Python 3.11 or newer, make and git, nothing else: the rest goes into .venv.

# Generated images of `make evaluate`, at least 1000; more take longer and are nearer to the published protocols.
NUM_IMAGES ?= 2000

.PHONY: install demo evaluate test builtin style quality

install: .venv/installed

# Sample 40 images from the built-in model.
demo: .venv/installed
	.venv/bin/maskgit sample --model builtin --classes all --images_per_class 4 --output_dir outputs/demo --overwrite

# FID, KID, precision, recall, density and coverage of the built-in model against the real test images: twenty minutes on two CPU
# cores, most of it for the 10,000 real images, whose features are kept. It goes on where it was stopped; after a change of the model or of libraries,
# delete outputs/evaluation.
evaluate: .venv/installed-dev
	test -d data/fashion_mnist || .venv/bin/python scripts/prepare_fashion_mnist.py --output_dir data/fashion_mnist
	test -f outputs/inception.pth || .venv/bin/python scripts/prepare_inception_weights.py --output outputs/inception.pth
	.venv/bin/python evaluations/generate.py --model builtin --num_images $(NUM_IMAGES) --output_dir outputs/evaluation/$(NUM_IMAGES)
	.venv/bin/python evaluations/evaluate.py --generated outputs/evaluation/$(NUM_IMAGES) --reference data/fashion_mnist --reference_split test \
		--feature_extractor_weights outputs/inception.pth --features_cache outputs/evaluation/features \
		--output outputs/evaluation/$(NUM_IMAGES)/result.json --overwrite

# The whole suite.
test: .venv/installed-dev
	.venv/bin/python -m pytest

# Train the built-in models again, from the images on, and put them into the package: about three hours on two CPU cores. It goes on
# where it was stopped. On short sequences the plain attention of PyTorch trains faster on a CPU than its fused one.
builtin: .venv/installed-dev
	test -d data/fashion_mnist || .venv/bin/python scripts/prepare_fashion_mnist.py --output_dir data/fashion_mnist
	.venv/bin/python training/train_vqgan.py --config configs/vqgan_fashion_mnist.yaml
	for split in train test; do .venv/bin/python training/encode_dataset.py --tokenizer outputs/vqgan_fashion_mnist/vqvae \
		--data data/fashion_mnist --split $$split --image_size 32 --output_dir data/fashion_mnist_tokens || exit 1; done
	DIFFUSERS_ATTN_BACKEND=_native_math .venv/bin/python training/train_maskgit.py --config configs/maskgit_fashion_mnist.yaml
	.venv/bin/python scripts/ship_builtin_model.py outputs/maskgit_fashion_mnist/pipeline fashion-mnist --overwrite
	DIFFUSERS_ATTN_BACKEND=_native_math .venv/bin/python training/train_toast.py --config configs/toast_fashion_mnist.yaml
	.venv/bin/python scripts/ship_builtin_model.py outputs/toast_fashion_mnist/pipeline fashion-mnist --toast_only
	DIFFUSERS_ATTN_BACKEND=_native_math .venv/bin/python training/train_maskgit.py --config configs/pgm_fashion_mnist.yaml
	.venv/bin/python scripts/ship_builtin_model.py outputs/pgm_fashion_mnist/pipeline partition --overwrite

# Format the code and mend what can be mended.
style: .venv/installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Only tell what `make style` would do.
quality: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: setup.py pyproject.toml | .venv/bin/python
	@echo "Installing maskgit into .venv (PyTorch is large: some minutes) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: setup.py pyproject.toml | .venv/bin/python
	@echo "Installing maskgit and what its tests need into .venv (PyTorch is large: some minutes) ..."
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .[dev]
	@touch $@

.venv/bin/python:
	@for python in python3.11 python3 python3.12 python3.13 python3.14; do \
		if $$python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then \
			echo "Making .venv with $$($$python --version) ..."; \
			$$python -m venv .venv || { rm -rf .venv; exit 1; }; \
			exit 0; \
		fi; \
	done; \
	echo "maskgit needs Python 3.11 or newer, and found none under the names python3.11 and python3: install it." >&2; \
	exit 1
