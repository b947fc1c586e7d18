PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# One process a core (four at most: each takes up to 3 GB), one thread each: tiny models gain nothing from two.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
# Without a display of the installation's details; remove -q to see them.
PIP = $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help install demo test test-all lint clean

help:
	@echo "make demo      install, then fine-tune a sentence classifier in full and with LoRA, and compare (offline)"
	@echo "make test      install, then run the tests that CI runs"
	@echo "make test-all  the same with the long ones"
	@echo "make lint      ruff and mypy"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-demo.txt
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found; set PYTHON=/path/to/python (3.11 or later)"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps --require-hashes -r requirements-demo.txt
	touch $@

# The tests cover the extras, too; the demo does without them.
$(VENV)/.extras: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev,quant,onnx,tune,gguf,feedback,ray]'
	touch $@

demo: install
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: $(VENV)/.extras
	$(PYTEST) -m "not slow and not requires_cuda"

test-all: $(VENV)/.extras
	$(PYTEST) -m "not requires_cuda"

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/ptft validate $$(find adapters tasks -name '*.yaml')

clean:
	rm -rf $(VENV) demo-runs build dist
