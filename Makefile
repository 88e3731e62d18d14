# Everything a fresh machine needs: Python 3.10 or later, a C++ compiler, make.
#   make train    installs, then trains the handwritten digits and draws a summary
#   make test     installs, then runs all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) $(wildcard erdfast/__init__.py erdfast/*/__init__.py)

.PHONY: install train test lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt .ci/install.sh $(SOURCES)
	PYTHON=$(PYTHON) .ci/install.sh

train: install
	$(BIN)/python -m erdfast.train

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --durations=15

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: install
	$(BIN)/python -m bench.bench_diffusion_loss

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
