# `make demo` and `make test` need Python 3.11 or newer, make and git, nothing else: the rest goes into .venv.

.PHONY: install demo test style quality

install: .venv/installed

# Sample 40 images from the built-in model.
demo: .venv/installed
	.venv/bin/maskgit sample --model builtin --classes all --images_per_class 4 --output_dir outputs/demo --overwrite

# The whole suite.
test: .venv/installed-dev
	.venv/bin/python -m pytest

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
