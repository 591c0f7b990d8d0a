# Every target sets up what it needs: a virtual environment of its own for each Python.
#   make demo                       train the digits VAE and draw its figures
#   make test                       the default tests
#   PYTHON=python3.13 make test     the same on another Python

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
DEFAULT := $(shell python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= $(if $(filter $(DEFAULT),$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest
WORKDIR ?= workdir/digits_vae

.PHONY: help demo test test-slow thorough doctest lint types layers format acceptance wheel clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/activate:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "gjflax needs Python 3.11 or later; $(PYTHON) is $(VERSION). Set PYTHON=python3.12, say."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-test: $(BIN)/activate pyproject.toml setup.cfg
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.ready-examples: $(BIN)/activate pyproject.toml setup.cfg
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-test
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/.ready-examples
	$(BIN)/python examples/digits_vae/main.py --workdir=$(WORKDIR)

test: $(VENV)/.ready-test
	$(PYTEST) -n 2 --dist worksteal -m 'not slow'

test-slow: $(VENV)/.ready-test
	$(PYTEST) -n 2 --dist worksteal -m 'slow and not timing and not thorough'
	$(PYTEST) -m timing

thorough: $(VENV)/.ready-test
	$(PYTEST) -n 2 --dist worksteal -m thorough

# The types in signatures are checked at run time here, where every public name is used. It doubles the cost of tracing.
CHECKED := --jaxtyping-packages=gjflax,beartype.beartype

doctest: $(VENV)/.ready-test
	$(PYTEST) -n 2 --dist worksteal $(CHECKED) --doctest-modules gjflax
	$(PYTEST) -n 2 --dist worksteal $(CHECKED) --doctest-glob='*.md' README.md docs

acceptance: $(VENV)/.ready-test
	$(PYTEST) -p no:cacheprovider -o filterwarnings=default ../shared/acceptance

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.ready-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/.ready-dev
	$(BIN)/lint-imports

wheel: $(VENV)/.ready-dev
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis workdir
