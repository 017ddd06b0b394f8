# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi 2>/dev/null)
# The CPU build of torch comes from PyTorch's own index: the default one has only CUDA's, gigabytes.
# Where that index cannot be reached, pip goes on with the sources that it is configured with.
TORCH ?= torch==2.13.0
CPU_TORCH := --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH)
MODEL ?=
ARGS ?=
PYTEST := $(BIN)/python -m pytest
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install serve dev test test-long test-gpu test-faults test-clients lint house bench soak clean

help:
	@echo 'make serve [MODEL=...] [ARGS=...]   install, then serve on 127.0.0.1:8000'
	@echo 'make install                        .venv with the program .venv/bin/llmserve'
	@echo 'make test | test-long | test-gpu    tests without a GPU | also the long ones | with one'
	@echo 'make test-faults                    every fault row: what is done to a server, and what holds'
	@echo 'make test-clients                   other clients, in an environment of their own'
	@echo 'make lint | house | bench           checks | numbers to judge by | offline throughput'
	@echo 'make soak [ARGS="--requests 5000"]  200,000 mixed requests: does anything grow?'

install: $(VENV)/.installed

serve: install
	@exec $(BIN)/llmserve serve $(MODEL) $(ARGS)

dev: $(VENV)/.installed-dev

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'Python with its venv module is missing. On Debian and Ubuntu:'; \
	  echo '  sudo apt-get install -y python3 python3-venv'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmserve needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	    'name another one: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo 'Installing into $(VENV) $(if $(GPU),with CUDA kernels,for the CPU)...'
ifeq ($(GPU),)
	@$(BIN)/pip install --quiet $(CPU_TORCH)
	@$(BIN)/pip install --quiet --editable .
else
	@$(BIN)/pip install --quiet --editable '.[cuda]'
endif
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/pip install --quiet --editable '.[dev$(if $(GPU),$(comma)cuda)]'
	@touch $@

comma := ,

# Fault rows have deadlines: they run alone, after all others have run two at a time.
QUICK := not gpu and not multi_gpu and not long and not faults
test: dev
ifeq ($(ARGS),)
	@$(PYTEST) -n 2 --dist loadfile -m '$(QUICK)' --ignore tests/faults
	@$(PYTEST) -m '$(QUICK)' tests/faults
else
	@$(PYTEST) -m '$(QUICK)' $(ARGS)
endif

test-long: dev
	@$(PYTEST) -m 'not gpu and not multi_gpu and not faults' $(ARGS)

test-faults: dev
	@$(PYTEST) -m 'not gpu and not multi_gpu' tests/faults $(ARGS)

test-gpu: dev
	@$(PYTEST) -m 'gpu or multi_gpu' $(ARGS)

# Clients whose requirements contradict ours (instructor wants an older openai) or are not Python's.
CLIENTS := .venv-clients
$(CLIENTS)/.installed: pyproject.toml | $(BIN)/pip
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install --quiet instructor litellm
	@npm install --silent --no-audit --no-fund --prefix $(CLIENTS) openai
	@touch $@

test-clients: dev $(CLIENTS)/.installed
	@$(PYTEST) tests/clients/others.py $(ARGS)

lint: dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports

house: dev
	@$(PYTEST) -q tests/house
	@PYTHONPATH=src:. $(BIN)/python -m tests.house.report

soak: dev
	@PYTHONPATH=src:. $(BIN)/python -m benchmarks.soak $(ARGS)

bench: install
	@$(BIN)/llmserve bench throughput $(if $(MODEL),--model $(MODEL)) $(ARGS)

clean:
	@rm -rf $(VENV) build dist src/*.egg-info
