# Everything one does with a checkout; `make help` lists it. Only make and Python 3.11 or newer need to be there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# Marks of what is installed: what serving needs, kernels for this processor, and what developing needs besides.
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
INSTALLED_DEV := $(VENV)/.installed-dev

CONFIG := configs/cpu.yaml
HOST :=
PORT :=
MODEL :=
ARGS :=
SETTINGS = --config $(CONFIG) $(if $(MODEL),--model '$(MODEL)')
PIP_FLAGS := -qq --disable-pip-version-check -c constraints.txt
PIP = $(BIN)/python -m pip install $(PIP_FLAGS)
# Test processes: one per core, and one more since those of e2e mostly wait. What runs in one process: tests/conftest.py.
WORKERS := $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))
# `model`, unless MODEL is a directory.
DEFAULT_MODEL = $(if $(filter-out default default-int4,$(MODEL)),,model)
PYTEST = $(BIN)/python -m pytest tests/e2e tests/parallel tests/unit -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: help setup setup-dev model serve test test-all lint format typecheck bench bench-compare gpu-kit test-gpu bench-gpu gpu-check test-clients clean

help: ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: CONFIG (deployment, $(CONFIG)), MODEL (directory), HOST, PORT, ARGS (more flags)."

setup: $(INSTALLED) $(KERNELS) ## Create .venv with what serving needs

$(INSTALLED): pyproject.toml constraints.txt
	@python=; for name in python3.13 python3.12 python3.11 python3; do \
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "error: Python 3.11 or newer is needed, and none was found" >&2; exit 1; }; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $$python cannot create environments; on Debian and Ubuntu install python3-venv" >&2; exit 1; }; \
	echo "setting up $(VENV) (the first time takes minutes)"; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	@$(PIP) -e .
	@touch $@

$(KERNELS): $(INSTALLED) $(wildcard kernels/cpu/csrc/*)
	@$(BIN)/magicdec kernels >/dev/null
	@touch $@

setup-dev: $(INSTALLED_DEV) ## Add what tests, checks and benchmarks need

# Python compiles what it imports of these packages: a small part.
$(INSTALLED_DEV): $(INSTALLED)
	@$(PIP) --no-compile -e '.[dev]'
	@touch $@

# Converting takes packages that serving does not: where they are missing, they go into an environment on top of .venv
# that is removed afterwards. Tests need packages that have them.
model: $(INSTALLED) $(if $(filter test test-all,$(MAKECMDGOALS)),$(INSTALLED_DEV)) ## Download and convert the default models, once per user
	@lacks() { $(BIN)/python -c 'import sys; from models import default as d; \
	    sys.exit(not set(sys.argv) & set(d.missing_models()))' "$$@"; }; \
	lacks default default-int4 || exit 0; \
	if $(BIN)/python -c 'import gguf, transformers' 2>/dev/null; then exec $(BIN)/magicdec fetch; fi; \
	top=$$(mktemp -d); trap 'rm -rf "$$top"' EXIT; \
	$(BIN)/python -m venv --without-pip "$$top"; \
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$(echo "$$top"/lib/python*/site-packages)/below.pth"; \
	$(BIN)/python -m pip --python "$$top/bin/python" install $(PIP_FLAGS) '.[convert]' || { \
	    if lacks default; then exit 1; fi; echo "default-int4 is not installed" >&2; exit 0; }; \
	"$$top/bin/magicdec" fetch

serve: $(INSTALLED) $(KERNELS) $(DEFAULT_MODEL) ## Serve the API on http://127.0.0.1:8000
	@exec $(BIN)/magicdec serve $(SETTINGS) $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)') $(ARGS)

test: $(INSTALLED_DEV) $(KERNELS) model ## Run the tests that need no GPU
	@$(PYTEST) $(ARGS)

test-all: $(INSTALLED_DEV) $(KERNELS) model ## Run them with all cases, and more random examples
	@$(PYTEST) --hypothesis-profile=all $(ARGS)

# One environment for clients that need version 2 of OpenAI's package, one for all others. All versions are pinned.
CLIENTS_VENV := .venv-clients

$(CLIENTS_VENV)/%/.installed: tests/clients/%.txt | $(INSTALLED)
	@echo "setting up $(@D) (the first time takes a minute)"
	@$(BIN)/python -m venv --clear --without-pip $(@D)
	@$(BIN)/python -m pip --python $(@D)/bin/python install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

.PRECIOUS: $(CLIENTS_VENV)/%/.installed

test-clients: $(CLIENTS_VENV)/openai2/.installed $(CLIENTS_VENV)/openai3/.installed $(KERNELS) model ## Run unmodified clients against real servers
	@for versions in openai2 openai3; do \
	    $(CLIENTS_VENV)/$$versions/bin/python -m pytest --confcutdir=tests/clients tests/clients $(ARGS); \
	done

lint: $(INSTALLED_DEV) ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED_DEV) ## Put style right where that can be done by machine
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

typecheck: $(INSTALLED_DEV) ## Check types
	@$(BIN)/mypy

bench: $(INSTALLED_DEV) $(KERNELS) $(DEFAULT_MODEL) ## Measure decoding with and without speculation
	@$(BIN)/magicdec bench decode $(SETTINGS) $(ARGS)

bench-compare: $(INSTALLED_DEV) $(KERNELS) $(DEFAULT_MODEL) ## Measure other engines beside this one, by turns, greedy and sampled
	@$(BIN)/python -m bench.peers.compare $(if $(MODEL),--model '$(MODEL)') $(ARGS)

# GPU_KIT_PYTHON: version of that machine's Python.
gpu-kit: $(INSTALLED_DEV) ## Gather what a GPU machine without a network lacks into build/gpu-kit
	@$(BIN)/python -m bench.gpu.kit --python $(GPU_KIT_PYTHON) $(ARGS)

test-gpu: gpu ## Run the tests that need a CUDA device
	@$(GPU_PYTHON) -m pytest tests/gpu tests/unit/kernels/test_gpu_kernels.py $(ARGS)

bench-gpu: gpu ## Measure rounds of large models, with random weights, on a CUDA device
	@$(GPU_PYTHON) -m bench.gpu $(ARGS)

gpu-check: gpu ## Check a machine with a CUDA device in eight minutes: tests and two bench points, one table
	@exec $(GPU_PYTHON) -m bench.gpu.check $(ARGS)

# GPU_PYTHON=python3 takes an environment that is there already, offline: torch for CUDA, Triton, perhaps FlashInfer.
GPU_PYTHON := $(BIN)/python
GPU_KIT_PYTHON := 3.12

.PHONY: gpu
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED_DEV))
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	    echo "error: no CUDA device is present" >&2; exit 1; }

clean: ## Remove .venv and everything built; downloaded models stay
	@rm -rf $(VENV) $(CLIENTS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
