# Everything here needs Python 3.11 or later and make, nothing else. All targets can be run again at no cost.
PYTHON ?= python3
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BIN := .venv/bin
PARITY := .venv-parity/bin

.PHONY: demo test parity lint wheel golden clean

# Installs the package and makes variations and an edit of the pictures in examples/.
demo: .venv/.demo
	$(BIN)/python scripts/demo.py

test: .venv/.test
	$(BIN)/python -m pytest

# Live comparison with PyTorch.
parity: .venv-parity/.done
	$(PARITY)/python -m pytest tests/parity --override-ini addopts= --override-ini filterwarnings=default

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the wheel, installs it into an empty environment and asks it for help.
wheel: .venv/.lint
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python $(PIP_INSTALL) build/wheel/*.whl
	cd build/wheel && venv/bin/sdipc --help

# The golden files that carry the comparison with PyTorch into `make test`.
golden: .venv-parity/.done
	$(PARITY)/python scripts/make_golden.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP_INSTALL) --editable .
	touch $@

.venv/.test: .venv/.demo
	$(BIN)/python $(PIP_INSTALL) --editable '.[test]'
	touch $@

.venv/.lint: .venv/.demo
	$(BIN)/python $(PIP_INSTALL) --editable '.[lint]'
	touch $@

.venv-parity/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PARITY)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-parity.txt --editable '.[parity]'
	touch $@

clean:
	rm -rf .venv .venv-parity build out
