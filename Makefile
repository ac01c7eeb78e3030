# Everything runs in .venv, installed under constraints.txt, versions that were tested together.
PYTHON ?= python3
BIN := .venv/bin
# Two programs of JAX on two cores; a test says by its mark what makes it slow (pyproject.toml).
PYTEST := $(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal
SLOW := processes or compiles or training or decodes

.PHONY: train check test fast-tests format lint layers types packages plan-table tpu-test fuzz benchmarks device dist docs clean

train: .venv/data
	$(BIN)/timesformer train --config=configs/demo.py --workdir=runs/demo

# Before each commit.
check: lint types fast-tests

# Before each push: everything; 15 minutes on two cores.
test: .venv/test
	$(PYTEST) --durations=20

# Files that are marked as a whole are not even imported.
fast-tests: .venv/test
	$(PYTEST) -m "not ($(SLOW))" $$(grep -L '^pytestmark = ' tests/test_*.py)

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python experiments/packages.py --check

# No package imports from a package above it, and none in a circle.
layers: .venv/test
	$(BIN)/lint-imports

types: .venv/test
	$(BIN)/mypy

# The drawing of the packages in docs/design.md.
packages: .venv/test
	$(BIN)/python experiments/packages.py

# For TPUs, on a machine that needs none; an hour of two cores.
plan-table: .venv-tpu/installed
	.venv-tpu/bin/python experiments/plan_table.py

# What programs for TPUs cost, by the TPU compiler; 10 minutes of two cores, and no TPU.
tpu-test: .venv-tpu/installed
	.venv-tpu/bin/python -m pytest -q -c /dev/null -o markers=compiles --rootdir=. --noconftest \
		tests/test_tpu.py

# Hundreds of hostile videos, checkpoints and command lines, others each time; each night.
fuzz: .venv/test
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m fuzz $(KINDS)

# What a GPU does, into benchmarks/results/$(DEVICE); an hour, or some of
# PARTS="attention schemes model inference training flags", each of 9 minutes at most.
benchmarks: device .venv/test .venv/cuda13
	PYTHON=$(BIN)/python experiments/benchmarks.sh $(DEVICE) $(PARTS)

# A wheel and a source archive in dist/, as for a release (docs/releasing.md).
dist: .venv/dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# The site of docs/ into site/; a warning is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

device:
	@test -n "$(DEVICE)" || { echo "say DEVICE=h100, or another folder of benchmarks/results"; exit 2; }

clean:
	rm -rf .venv .venv-tpu build dist site *.egg-info

# A file for each set of extras that is installed.
.venv/%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

.venv-tpu/installed: setup.py constraints.txt
	test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu]' pytest
	touch $@
