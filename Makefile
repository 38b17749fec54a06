# `make quickstart` and `make test` do all the set-up they need on a machine with Python 3.11 or later and pip.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: install quickstart test test-all test-oldest lint quality style tables

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

# Trains, evaluates, saves, reloads with AutoModel and samples; replaces outputs/quickstart.
quickstart: install
	rm -rf outputs/quickstart
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_clm.py scripts/configs/quickstart.yaml
	OMP_NUM_THREADS=1 $(BIN)/python scripts/generate.py outputs/quickstart --prompt "def "

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Adds the checks marked slow.
test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

# The same suite with the oldest supported versions, in an environment of its own; downloads several gigabytes.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

quality: lint
	$(BIN)/pyright --pythonpath $(BIN)/python

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Result files -> the tables and figures of the README.
tables: install
	$(BIN)/python scripts/reproduce/tables.py
	$(BIN)/python scripts/reproduce/figures.py
