# Everything from a fresh checkout: Python >= 3.10, a C++ compiler and make are all it takes.
#   make bench         build, run the quick benchmarks in six minutes, write bench-results/
#   make test          build, run the fast tests
# and: bench-full, test-all, test-triton, test-gpu-proof, gpu-report, test-avx512,
#   test-sanitize, test-torch, lint, format, wheel, clean
# CPU=avx2, avx512 or portable: as on a processor of that class, for bench and test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch for development; fastfuse itself runs on every torch from 2.10 on.
TORCH ?= torch==2.13.0
# The triton that its CUDA build brings, by torch. A CPU build brings none.
TRITON_OF := torch==2.10%:3.6.0 torch==2.11%:3.6.0 torch==2.12%:3.7.0 torch==2.13%:3.7.1 \
    torch==2.14%:3.8.0
TORCH_TRITON := $(strip $(foreach pair,$(TRITON_OF),\
    $(if $(filter $(firstword $(subst :, ,$(pair))),$(TORCH)),$(lastword $(subst :, ,$(pair))))))
# Those that `make test-triton` tests, or one of them.
TRITONS := 3.6.0 3.7.1 3.9.0
TRITON ?= $(TRITONS)
ifneq ($(filter-out $(TRITONS),$(TRITON)),)
$(error TRITON: expected one of $(TRITONS); got $(TRITON))
endif
# CUDA kernels are built for one capability here, in a quarter of the time, and the CPU's for what
# this processor has; `make wheel` builds all.
FASTFUSE_CUDA_ARCHS ?= 90a
FASTFUSE_ISAS ?= native
# Python compiles what it imports, if it may keep it; pip would compile all of torch.
unexport PYTHONDONTWRITEBYTECODE
# What a shell may have left set would narrow the tests, or be installed.
unexport CUDA_TESTS_ON FASTFUSE_EMULATE_AVX512
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Processes that share the tests; threads of one that wait for another's must not spin meanwhile.
JOBS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# On Linux, tensors of tests that walk memory lie between pages that nobody may touch; not where a
# path would be two to the loader.
ifeq ($(shell uname -s) $(words $(subst :, ,$(CURDIR))),Linux 1)
GUARDED := build/guarded_memory.so
PYTEST := LD_PRELOAD=$(CURDIR)/$(GUARDED)$(LD_PRELOAD:%=:%) $(PYTEST)
endif
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
# Inductor's cache does not tell the classes apart.
ON := $(if $(CPU),$(ON_$(CPU)) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.cache/inductor-$(CPU))

READY := $(VENV)/.ready
# An editable installation is of one place: a tree that was moved builds again.
BUILT := $(VENV)/.built$(subst /,-,$(subst $() ,-,$(CURDIR)))
# test-torch: the torch that runs what TORCH has built, in an environment of its own.
WITH ?=
WITH_VENV := $(VENV)-$(subst ==,-,$(WITH))
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: bench bench-full test test-all test-triton test-gpu-proof gpu-report test-avx512 test-sanitize test-torch lint format wheel clean setup

setup: $(BUILT)

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_TRITON),,@echo "TORCH: the triton of a CUDA build is known for" \
	    "$(foreach pair,$(TRITON_OF),$(firstword $(subst %, ,$(pair)))); got $(TORCH), taking any triton")
	$(PIP) "$(TORCH)" "setuptools>=77" wheel "cmake>=3.22" ninja "pybind11>=2.12" \
	    "triton$(TORCH_TRITON:%===%); sys_platform == 'linux'" "numpy<2.4" # triton 3.6's interpreter
	touch $@

$(BUILT): $(READY) $(NATIVE)
	FASTFUSE_CUDA_ARCHS="$(FASTFUSE_CUDA_ARCHS)" FASTFUSE_ISAS="$(FASTFUSE_ISAS)" \
	    $(PIP) --no-build-isolation --editable ".[test,lint]"
	touch $@

ifneq ($(GUARDED),)
$(GUARDED): tests/support/guarded_memory.cpp | $(READY)
	$(BIN)/python tests/support/guarded_memory.py $@
endif

bench: $(BUILT)
	$(ON) $(BIN)/python -m fastfuse bench --quick --out bench-results

bench-full: $(BUILT)
	$(ON) $(BIN)/python -m fastfuse bench --out bench-results

# CUDA C++ as PTX of one GPU; the other one's in test-all and test-gpu-proof.
test: $(BUILT) $(GUARDED)
	$(ON) CUDA_TESTS_ON=sm_90a $(PYTEST) -m "not slow"

test-all: $(BUILT) $(GUARDED)
	$(ON) $(PYTEST)

test-triton: $(BUILT) $(GUARDED) $(TRITON:%=.venv-triton/%/.ready)
	@for version in $(TRITON); do \
	    echo "triton $$version"; PYTHONPATH=$(CURDIR)/.venv-triton/$$version \
	    $(PYTEST) tests/triton || exit; \
	done

# Only the package, put before the one of the environment.
.venv-triton/%/.ready: | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --upgrade --target $(@D) triton==$*
	touch $@

# The fast Triton tests again, on the PTX that kernels compile to for each of these GPUs; CUDA C++.
GPUS := sm_80 sm_90
test-gpu-proof: $(BUILT) $(GUARDED)
	@for gpu in $(GPUS); do \
	    echo "PTX for $$gpu"; TRITON_TESTS_ON=$$gpu $(PYTEST) tests/triton -m "not slow" || exit; \
	done
	$(PYTEST) tests/triton/test_ptx_mutations.py
	$(PYTEST) tests/cuda

# What can be counted of the GPU kernels without a device; the host's time is printed alone.
gpu-report: $(BUILT)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/support $(BIN)/python benchmarks/gpu_report.py
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/host_time.py

# AVX-512's kernels and routes on a processor that has AVX2.
test-avx512: $(BUILT) $(GUARDED)
	emulated=$$($(BIN)/python tests/support/native.py) && \
	    FASTFUSE_EXTENSION=$$emulated $(PYTEST) -m "not slow" tests/ops tests/nn tests/models

test-sanitize: $(BUILT)
	$(BIN)/python tests/support/sanitizer.py

$(WITH_VENV)/.ready: pyproject.toml
	@case "$(WITH)" in torch==?*) ;; *) \
	    echo "make test-torch: expected WITH=torch==VERSION; got WITH=$(WITH)" >&2; exit 1;; esac
	$(PYTHON) -m venv $(WITH_VENV)
	$(WITH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    "$(WITH)" torchvision "setuptools>=77" wheel || { rm -rf $(WITH_VENV); \
	    echo "make test-torch: pip cannot install $(WITH) and its torchvision" >&2; exit 1; }
	FASTFUSE_SKIP_NATIVE=1 $(WITH_VENV)/bin/python -m pip install --quiet \
	    --disable-pip-version-check --no-build-isolation --editable ".[test]" peft accelerate
	touch $@

test-torch: $(WITH_VENV)/.ready $(BUILT) $(GUARDED)
	$(WITH_VENV)/bin/python -m fastfuse info
	$(subst $(BIN),$(WITH_VENV)/bin,$(PYTEST)) -m "not slow" \
	    --ignore tests/triton --ignore tests/tools/test_sanitizer.py

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/support -name '*.cpp' -o -name '*.h')

format: $(BUILT)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/support -name '*.cpp' -o -name '*.h')

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist bench-results fastfuse/_C*.so fastfuse/lib *.egg-info $(VENV)/.built*
