# Everything from a fresh checkout: Python >= 3.10, a C++ compiler and make are all it takes.
#   make bench         build, run the quick benchmarks in six minutes, write bench-results/
#   make test          build, run the fast tests
# and: bench-full, test-all, test-sanitize, lint, format, wheel, clean
# CPU=avx2, avx512 or portable: as on a processor of that class, for bench and test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch for development; fastfuse itself runs on every torch from 2.10 on.
TORCH ?= torch==2.13.0
# Processes that share the tests; threads of one that wait for another's must not spin meanwhile.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# What makes fastfuse, oneDNN, PyTorch and MKL take a class of instructions.
ON_avx512 := FASTFUSE_ISA=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx512 \
    MKL_ENABLE_INSTRUCTIONS=AVX512
ON_avx2 := FASTFUSE_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
    MKL_ENABLE_INSTRUCTIONS=AVX2
ON_portable := FASTFUSE_ISA=portable ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default \
    MKL_ENABLE_INSTRUCTIONS=SSE4_2
ifneq ($(CPU),)
ifeq ($(ON_$(CPU)),)
$(error CPU must be one of avx2, avx512, portable; got $(CPU))
endif
endif
ON := $(ON_$(CPU))

READY := $(VENV)/.ready
BUILT := $(VENV)/.built
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: bench bench-full test test-all test-sanitize lint format wheel clean setup

setup: $(BUILT)

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.12" numpy
	touch $@

$(BUILT): $(READY) $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable ".[test,lint]"
	touch $@

bench: $(BUILT)
	$(ON) $(BIN)/python -m fastfuse bench --quick --out bench-results

bench-full: $(BUILT)
	$(ON) $(BIN)/python -m fastfuse bench --out bench-results

test: $(BUILT)
	$(ON) $(PYTEST) -m "not slow"

test-all: $(BUILT)
	$(ON) $(PYTEST)

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
