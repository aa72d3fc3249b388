PYTHON ?= python3
BIN := .venv/bin
# appears once everything is installed; after a change of dependencies, `make clean` first
READY := .venv/.ready

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, and exactly this version: a bare "torch" may fetch another one, in a CUDA build
$(READY):
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "torch==2.13.0"
	$(BIN)/pip install -e ".[dev]"
	touch $(READY)
