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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 --dist loadfile --durations=15

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright

# Every op, a training step of the digits network, and the tables of README made anew. (A GPU: bench/gpu.sh.)
OPS := $(filter-out bench_train_step,$(patsubst bench/%.py,%,$(wildcard bench/bench_*.py)))
bench: install
	set -e; for op in $(OPS); do $(BIN)/python -m bench.$$op; done
	$(BIN)/python -m bench.bench_train_step --model uvit_digits
	$(BIN)/python -m bench.aot --save
	$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
