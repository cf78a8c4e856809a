# Two commands on a fresh machine: `make quickstart` and `make test`.
#
#   PYTHON    the interpreter that makes .venv (3.11 or newer, with its venv module)
#   PIP_ARGS  passed on to pip install, e.g. PIP_ARGS="--index-url URL" for a CPU or CUDA build of torch
#   ARGS      passed on to the command, e.g. make quickstart ARGS="--json"
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt $(PIP_ARGS)

.PHONY: help quickstart test test-all lint format clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# Stamps are files, so that a second run installs nothing; a changed dependency list installs again.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.base

quickstart: $(VENV)/.base  ## text, tokenizer, shards, training on two processes, extrapolation report
	$(BIN)/roformer-dist quickstart $(ARGS)

test: $(VENV)/.dev  ## the tests, without a GPU, at most 20 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.dev  ## the tests and the full tables
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## ruff format and lint, pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the quickstart and the tools made, but not .venv
	rm -rf quickstart runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
