# `make demo` and `make test` need Python >= 3.11, pip and a package index; nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=
# One thread for each of two processes: the tests' models are too small to gain from more.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-slow check docs fmt clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'moefy needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)  ## create .venv with the pinned versions

demo: $(READY)  ## the main job on a real model: convert, train, compare (minutes; see README)
	$(BIN)/moefy demo --overwrite $(ARGS)

test: check  ## lint, types, layers and the tests of minutes
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(READY)  ## the tests that take longer: real models, kills at every moment
	$(PYTEST) -m slow $(ARGS)

check: $(READY)  ## lint, types and layers only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## the documentation as a site that needs no network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

fmt: $(READY)  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, the site and the tools' caches
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
