PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: setup demo test bench lint format gpu wheel kernels clean
setup: $(STAMP)

# torch first and pinned: without the pin pip fetches gigabytes of CUDA. triton without its torch pin.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*) fastloss/_version.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools wheel pybind11 ninja
	-$(BIN)/pip install -q --no-deps -c constraints.txt triton
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev,train,bench]'
	touch $(STAMP)

demo: setup
	$(BIN)/fastloss demo

test: setup
	$(BIN)/python -m pytest -n 2 -q

bench: setup
	$(BIN)/fastloss bench

lint: setup
	$(BIN)/ruff check fastloss kernels tests benchmarks setup.py
	$(BIN)/mypy fastloss

format: setup
	$(BIN)/ruff format fastloss kernels tests benchmarks setup.py

wheel: setup
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

kernels: setup
	$(BIN)/python tools/kernel_report.py

gpu:
	bash tools/gpu.sh

clean:
	rm -rf build dist *.egg-info fastloss/*.so fastloss/_build_info.py
