# `make quickstart` and `make test` do all the set-up they need on a machine with Python 3.11 or later and pip.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal
NEWEST := .venv-newest
DOCS := .venv-docs
# what a release of transformers can break
CONTRACT := tests/test_versions.py tests/test_compat*.py tests/models tests/trainer tests/pruning tests/rewrite \
	tests/publish/test_push.py tests/commands/test_clm.py

.PHONY: install quickstart test test-fast test-newest contract test-all test-oldest test-hf lint quality style tables notebooks docs soak gpu

install: $(VENV)/installed

# what the library needs to run
$(VENV)/usable: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

# what its tests need too
$(VENV)/installed: $(VENV)/usable
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

# Trains, evaluates, saves, reloads with AutoModel, samples, and says how good it is; replaces outputs/quickstart.
quickstart: $(VENV)/usable
	OMP_NUM_THREADS=1 $(BIN)/python scripts/quickstart.py

test: install
	$(PYTEST)

# What a change is checked with while it is written: the parts, without whole runs of the Trainer, commands and claims.
test-fast: install
	$(PYTEST) $(addprefix --ignore=tests/,commands reproduce publish trainer test_compatibility.py test_versions.py test_docs.py)

# Adds the checks marked slow.
test-all: install
	$(PYTEST) -m "not gpu"

# What a release can break, with the newest releases that pip finds in our ranges; only torch is held, to its CPU build.
test-newest: install
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint constraints-newest.txt \
		--editable '.[test]'
	$(NEWEST)/bin/python -m pip list | grep -iE "^(torch|transformers|huggingface_hub|accelerate|datasets|peft|safetensors) "
	HF_REZERO_OTHER_PYTHONS=$(abspath $(BIN))/python $(MAKE) contract VENV=$(NEWEST)

contract:
	$(PYTEST) $(CONTRACT)

# The same suite with the oldest supported versions, in an environment of its own; downloads several gigabytes.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# transformers' own common tests on our models, from the source archive of the installed release.
test-hf: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/upstream/run.py

# Attacks on runs for some minutes: kills, damaged checkpoints, lost processes, full disks, NaN, hostile inputs.
soak: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python scripts/reproduce/run.py soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

quality: lint
	$(BIN)/pyright --pythonpath $(BIN)/python

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Result files -> the tables of the README and of docs/, and the figures.
tables: install
	$(BIN)/python scripts/reproduce/render.py

# Runs the notebooks and writes their outputs into them.
notebooks: install
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_notebooks.py docs/notebooks/*.ipynb

# The site in site/, strictly: no warning, no dead link. Its environment reads the sources and needs neither torch nor this package.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "The site is built: open site/index.html, or serve it with $(DOCS)/bin/mkdocs serve"

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
		print(*extras['docs'], sep='\n')" > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --requirement $(DOCS)/requirements.txt
	touch $@

# Every figure that needs a device, in ten minutes at most: make gpu TRAIN_FILE=text.xz; without a device in small, to try it.
TRAIN_FILE ?= python-stdlib
gpu: install
	$(BIN)/python scripts/reproduce/run.py gpu --train_file $(TRAIN_FILE)
	$(BIN)/python scripts/reproduce/render.py
