# Two commands for newcomers: `make demo` and `make test`. Each sets up what it needs, in .venv.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
PYTEST_ARGUMENTS ?= -n 2

.PHONY: demo test check test-slow test-vllm bench bench-contexts bench-serving gpu train clean help

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(VENV)/.installed ## answer questions from evicted caches with the packaged model (two minutes)
	$(VENV)/bin/defensivekv demo

test: $(VENV)/.installed-dev check ## lint, types and tests (under fifteen minutes on two cores)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGUMENTS) -m "not slow"

test-slow: $(VENV)/.installed-dev ## the tests that take longer: a local Ray cluster, the harness's command line
	$(VENV)/bin/python -m pytest -m slow

test-vllm: $(VLLM_VENV)/.installed ## the tests inside vLLM, on its CPU build, in an environment of its own (half an hour)
	$(VLLM_VENV)/bin/python -m pytest -W default tests/integrations/vllm

check: $(VENV)/.installed-dev ## lint, format, types, import direction
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev ## the figures of speed and memory of the README (half an hour; wants a quiet machine)
	$(VENV)/bin/python -m benchmarks

bench-contexts: $(VENV)/.installed-dev ## time to the first answer from documents kept in files (half an hour, quiet)
	$(VENV)/bin/python -m benchmarks.contexts

bench-serving: $(VLLM_VENV)/.installed ## throughput and latency inside vLLM, beside vLLM's own cache (half an hour, quiet)
	$(VLLM_VENV)/bin/python -m benchmarks.serving

gpu: ## on a machine with one CUDA GPU, torch, transformers, pytest and hypothesis: tests on CUDA, then benchmarks
	$(PYTHON) -m benchmarks.gpu

train: $(VENV)/.installed-dev ## train the packaged model again (up to ninety minutes on two cores, resumable)
	$(VENV)/bin/python -m training.train
	$(VENV)/bin/python -m training.export

clean: ## remove the environment and what the commands made
	rm -rf $(VENV) $(VLLM_VENV) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once; PyTorch is large)"
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	@echo "installing vLLM's CPU build into $(VLLM_VENV) (once; it is large)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints-vllm.txt --editable ".[test-vllm]"
	$(VLLM_VENV)/bin/python -m tests.integrations.vllm.environment
	touch $@
