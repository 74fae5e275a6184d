# make demo: the first look. make test: lint, types, tests. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
CONSTRAINTS := constraints.txt
SCHEMAS := .ci/torchvision_schemas
PYTEST := $(BIN)/pytest --numprocesses 2 --durations 10

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-slow coverage lint bench gpu docs readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(READY): pyproject.toml $(CONSTRAINTS) $(SCHEMAS)/pyproject.toml
	@echo "setting up .venv: torch and what the tests need (minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,vision]' ./$(SCHEMAS)
	touch $(READY)

demo: $(READY)  ## train on real data beside Adam and L-BFGS; writes figures/quickstart.png
	$(BIN)/python examples/quickstart.py

test: lint test-quick  ## lint, types and tests

test-quick: $(READY)  ## the tests alone
	@echo "tests: collecting, then running them (some three minutes on two quiet cores)"
	@$(PYTEST)

test-slow: $(READY)  ## the tests that take longer
	$(PYTEST) -m slow

coverage: $(READY)  ## the tests, and which lines of each file they run
	$(PYTEST) --cov --cov-report term-missing

lint: $(READY)  ## lint and types only
	@echo "lint: ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "types: pyright (about a minute)"
	@$(BIN)/pyright

bench: $(READY)  ## side by side with peers; writes benchmarks/results
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,vision,bench]'
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/minibatch.py
	$(BIN)/python benchmarks/iterations.py
	$(BIN)/python benchmarks/rl.py
	$(BIN)/python benchmarks/pinn.py
	$(BIN)/python benchmarks/goals.py

gpu:  ## what a GPU does, in eight minutes, with the python that is there; writes benchmarks/results
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

docs: $(READY)  ## build the site in site/, to read offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open site/index.html, or with search: $(BIN)/python -m http.server -d site"

readme: $(READY)  ## write the tables of what works into docs/what_works.md
	PYTHONPATH=tests $(BIN)/python -m helpers.what_works

clean:  ## remove the environment and caches
	rm -rf .coverage* .venv .pytest_cache .ruff_cache .hypothesis site
