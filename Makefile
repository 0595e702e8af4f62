# Everything from a fresh checkout: Python >= 3.10, a C++ compiler and make are all it takes.
#   make bench         build, run the quick benchmarks, write bench-results/
#   make test          build, run the fast tests
# and: bench-full, test-all, test-sanitize, lint, format, wheel, clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch for development; fastfuse itself runs on every torch from 2.10 on.
TORCH ?= torch==2.13.0
# Python compiles what it imports; pip would compile all of torch.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Processes that share the tests; threads of one that wait for another's must not spin meanwhile.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: bench bench-full test test-all test-sanitize lint format wheel clean setup

setup: $(BUILT)

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.12" numpy
	touch $@

$(BUILT): $(READY) $(NATIVE)
	$(PIP) --no-build-isolation --editable ".[test,lint]"
	touch $@

bench: $(BUILT)
	$(BIN)/python -m fastfuse bench --quick --out bench-results

bench-full: $(BUILT)
	$(BIN)/python -m fastfuse bench --out bench-results

test: $(BUILT)
	$(PYTEST) -m "not slow"

test-all: $(BUILT)
	$(PYTEST)

test-sanitize: $(BUILT)
	$(BIN)/python tests/sanitizer.py

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(BUILT)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist bench-results fastfuse/_C*.so *.egg-info $(BUILT)
