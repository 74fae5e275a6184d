# make demo: the first look. make test: lint, types, tests. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,vision]'
	touch $(READY)

demo: $(READY)  ## train on real data beside Adam and L-BFGS; writes examples/quickstart.png
	$(BIN)/python examples/quickstart.py

test: lint  ## lint, types and tests
	$(BIN)/pytest --numprocesses 2

test-slow: $(READY)  ## the tests that take longer
	$(BIN)/pytest --numprocesses 2 -m slow

lint: $(READY)  ## lint and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(READY)  ## side by side with peers; writes benchmarks/results
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,vision,bench]'
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/rl.py
	$(BIN)/python benchmarks/goals.py

readme: $(READY)  ## write the table of what works into the README
	$(BIN)/python tests/what_works.py

clean:  ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
