# make env | demo | test | test-long | test-web | test-slow | test-kill | test-llm | test-slurm | lint | clean; see README.md
PYTHON ?= python3
SOURCE ?= configs/data/synthetic.yaml
BIN := .venv/bin
KILLS ?= 50

.PHONY: env demo test test-slow test-long test-web test-kill test-llm test-slurm lint clean

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
	$(BIN)/python -m pytest -m "not slow and not long and not hub and not browser and not llm and not slurm" -n 2 --dist loadfile

# Launchers, signals, another number of ranks, benchmarks: many processes, half a minute each.
test-long: env
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

# Publishing against a local server that speaks the Hub's protocol, and pages in Chromium where there is one.
test-web: env
	$(BIN)/python -m pytest -m "hub or browser" -rs -n 2 --dist loadfile

# Fifty real captions by a real small model (needs the network once, and DERMVLP_DATA); prints what was dropped and why.
test-llm: env
	$(BIN)/python -m pytest -m llm -s tests/llm

# The scripts of slurm/ on a real SLURM of two nodes, started here: Debian or Ubuntu, as root. See docs/slurm.md.
test-slurm: env
	command -v slurmctld >/dev/null && command -v munged >/dev/null || \
	  { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends slurm-wlm munge; } || \
	  echo "SLURM cannot be installed here"  # then the tests skip, and say so
	$(BIN)/python -m pytest -m "slurm and not slow" -rs tests/slurm

# SIGKILL at random moments, resumed each time; ends with 0 when losses and weights are bit-equal to uninterrupted runs.
test-kill: env
	$(BIN)/python -m tests.integration.kill_runs --kills $(KILLS)

# What needs minutes: the demo recipes to their promised accuracy (real images need DERMVLP_DATA).
test-slow: env
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv .cache data runs
