# Everything runs in .venv, installed under constraints.txt, versions that were tested together.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint plan-table benchmarks device clean

train: .venv/data
	$(BIN)/timesformer train --config=configs/demo.py --workdir=runs/demo

test: .venv/test
	$(BIN)/python -m pytest -q --durations=10 --numprocesses=2 --dist=loadfile

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For TPUs, on a machine that needs none; an hour of two cores.
plan-table: .venv/tpu
	$(BIN)/python experiments/plan_table.py

# What a GPU does, into benchmarks/results/$(DEVICE); an hour, or some of
# PARTS="kernels attention schemes model inference training flags", each of 9 minutes at most.
benchmarks: device .venv/test .venv/cuda13
	PYTHON=$(BIN)/python experiments/benchmarks.sh $(DEVICE) $(PARTS)

device:
	@test -n "$(DEVICE)" || { echo "say DEVICE=h100, or another folder of benchmarks/results"; exit 2; }

clean:
	rm -rf .venv build *.egg-info

# A file for each set of extras that is installed.
.venv/%: setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
