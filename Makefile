# make env | demo | test | lint | clean; see README.md
PYTHON ?= python3
SOURCE ?= configs/data/synthetic.yaml
BIN := .venv/bin

.PHONY: env demo test test-slow lint clean

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dermvlp needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

# The main job end to end, by default on synthetic pairs: no key, no download, no GPU.
demo: env
	@$(BIN)/dermvlp demo --source $(SOURCE)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy data_prep pretrain
	$(BIN)/lint-imports

test: env lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# What needs minutes: the demo recipes to their promised accuracy (real images need DERMVLP_DATA).
test-slow: env
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv data runs
