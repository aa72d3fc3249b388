PYTHON ?= python3
USUAL_TORCH := 2.13.0
TORCH ?= $(USUAL_TORCH)
# `make test TORCH=2.15.0` has an environment of its own
VENV := .venv$(addprefix -,$(filter-out $(USUAL_TORCH),$(TORCH)))
BIN := $(VENV)/bin
# appears once everything is installed; after a change of dependencies, `make clean` first
READY := $(VENV)/.ready

.PHONY: demo test lint check docs bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# each worker takes one file after another, because the tests of a file share fixtures
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test docs

# fills the generated parts of docs/*.md, then writes the site into site/; needs no network
docs: $(READY)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-* site .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Editors and mypy read no types of what is installed in the usual editable mode.
# torch first, and exactly this version: a bare "torch" may fetch another one, in a CUDA build
$(READY):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "torch==$(TORCH)"
	$(BIN)/pip install -e ".[dev]" --config-settings editable_mode=compat
	touch $(READY)
