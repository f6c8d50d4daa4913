# Everything one does with a checkout; `make help` lists it. Only make and Python 3.11 or newer need to be there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CONFIG := configs/cpu.yaml
HOST :=
PORT :=
MODEL :=
ARGS :=
SETTINGS = --config $(CONFIG) $(if $(MODEL),--model '$(MODEL)')

.PHONY: help setup model serve test lint format typecheck bench bench-compare test-gpu bench-gpu clean

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: CONFIG (deployment, $(CONFIG)), MODEL (directory), HOST, PORT, ARGS (more flags)."

setup: $(INSTALLED) ## Create .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	@python=; for name in python3.13 python3.12 python3.11 python3; do \
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "error: Python 3.11 or newer is needed, and none was found" >&2; exit 1; }; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $$python cannot create environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }; \
	echo "setting up $(VENV) (the first time takes minutes)"; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,convert]'
	@$(BIN)/magicdec kernels >/dev/null
	@touch $@

model: $(INSTALLED) ## Download and convert the default model, once per user
	@$(BIN)/magicdec fetch

serve: $(INSTALLED) $(if $(MODEL),,model) ## Serve the API on http://127.0.0.1:8000
	@exec $(BIN)/magicdec serve $(SETTINGS) $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)') $(ARGS)

test: $(INSTALLED) model ## Run all tests that need no GPU
	@$(BIN)/python -m pytest tests/unit tests/parallel tests/e2e $(ARGS)

lint: $(INSTALLED) ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED) ## Put style right where that can be done by machine
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

typecheck: $(INSTALLED) ## Check types
	@$(BIN)/mypy

bench: $(INSTALLED) $(if $(MODEL),,model) ## Measure decoding with and without speculation
	@$(BIN)/magicdec bench decode $(SETTINGS) $(ARGS)

bench-compare: $(INSTALLED) $(if $(MODEL),,model) ## Measure other engines beside this one, by turns
	@$(BIN)/python -m bench.peers.compare $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test-gpu: gpu ## Run the tests that need a CUDA device
	@$(GPU_PYTHON) -m pytest tests/gpu tests/unit/kernels/test_gpu_kernels.py $(ARGS)

bench-gpu: gpu ## Measure rounds of large models, with random weights, on a CUDA device
	@$(GPU_PYTHON) -m bench.gpu $(ARGS)

# GPU_PYTHON=python3 takes an environment that is there already, offline: torch for CUDA, Triton, perhaps FlashInfer.
GPU_PYTHON := $(BIN)/python

.PHONY: gpu
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED))
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	    echo "error: no CUDA device is present" >&2; exit 1; }

clean: ## Remove .venv and everything built; downloaded models stay
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
