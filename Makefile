# Two commands do everything on a fresh machine with Python ≥ 3.11 and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DIGITS := ../examples/digits
EXTENSION := setup.py quantkit/statistics/_native.c

.DEFAULT_GOAL := help
.PHONY: help demo test lint types clean

help:
	@echo 'make demo    quantize the shipped digit classifier to INT8 and FP8 and compare accuracy (in demo-out/)'
	@echo 'make test    lint, types and tests; PYTEST_ARGS="-k entropy" goes to pytest'
	@echo 'make lint    ruff check and ruff format --check'
	@echo 'make types   mypy --strict on quantkit/'
	@echo 'make clean   remove $(VENV)/, demo-out/ and the caches of the tools'
	@echo 'PYTHON=...   the Python ≥ 3.11 that makes $(VENV)/ (default: python3)'

# A change of pyproject.toml makes the environment anew, so that nothing outlives its place in the list.
# Debian ships Python without ensurepip: there the pip outside puts one inside.
$(VENV)/made: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "quantkit needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "making $(VENV)/ with $$($(PYTHON) --version)"
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear $(VENV); \
	  else $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; fi
	@touch $@

$(VENV)/installed: $(VENV)/made $(EXTENSION)
	@echo 'installing quantkit (ONNX Runtime is about 250 MB)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/made $(EXTENSION)
	@echo 'installing quantkit and what its tests need'
	@$(PIP) --editable '.[test]'
	@touch $@

# $(call quantkit,arguments) shows a command as a user would type it, and runs it in demo-out/.
define quantkit
@echo; echo '$$ quantkit $(1)'
@cd demo-out && $(BIN)/quantkit $(1)
endef

demo: $(VENV)/installed
	@rm -rf demo-out && mkdir demo-out
	$(call quantkit,calibrate $(DIGITS)/model.onnx --data $(DIGITS)/calib --method entropy)
	$(call quantkit,export --int8)
	$(call quantkit,export --fp8)
	$(call quantkit,evaluate $(DIGITS)/model.onnx model.int8.onnx --data $(DIGITS)/eval.npz --labels $(DIGITS)/eval.npz)
	$(call quantkit,evaluate $(DIGITS)/model.onnx model.fp8.onnx --data $(DIGITS)/eval.npz --labels $(DIGITS)/eval.npz)
	@echo; echo 'The files lie in demo-out/.'

test: lint types
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-out dist build *.egg-info quantkit/statistics/_native*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
