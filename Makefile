# `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: venv venv-dev demo test test-extras test-slurm test-browser lint bench docs clean

# A stamp holds what was installed: the target runs again only when setup.py or the versions change.
venv: $(VENV)/.core

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "brgsa_jax needs Python 3.11 or newer; run make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

venv-dev: $(VENV)/.dev

$(VENV)/.dev: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.core $@

demo: venv
	$(BIN)/brgsa demo

test: venv-dev
	$(BIN)/python -m pytest

# PyTorch and Apache Beam want other versions of some packages: an environment of their own.
test-extras: $(VENV)-extras/.ready
	$(VENV)-extras/bin/python -m pytest -o addopts="-q --durations=5" tests/extras

$(VENV)-extras/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-extras
	$(VENV)-extras/bin/python -m pip install -q -e '.[beam,dicom,summarize]' torch==2.13.0 'pytest>=8'
	@touch $@

# A Slurm of one node on this machine; as root where Debian's packages of it are still to be installed.
test-slurm: venv-dev
	tests/slurm/setup.sh install
	$(BIN)/python -m pytest -o addopts="-q --durations=5" tests/slurm

# The report in a real Chromium; as root where Debian's package of it is still to be installed.
test-browser: venv-dev
	tests/browser/setup.sh install
	$(BIN)/python -m pytest -o addopts="-q --durations=5" tests/browser

lint: venv-dev
	$(BIN)/ruff check .

bench: venv-dev
	$(BIN)/python -m benchmarks

docs: venv-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-extras build dist site *.egg-info .pytest_cache .ruff_cache
