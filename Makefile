# Paths with `make -C` stay right because make changes directory first.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# The CPU build, without gigabytes of CUDA packages. Where this index cannot be reached, pip goes on without it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# What is installed of the library; workers that come and go need torchft, which needs torch 2.7.
EXTRAS ?= dev,elastic

.PHONY: demo test lint pytest test-integrations chaos tables docs docs-serve docs-check package release bench clean

$(VENV)/installed: pyproject.toml experiments/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --retries 0 --extra-index-url $(TORCH_INDEX) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]' -e 'experiments[tensorboard]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/distoptim compare

test: lint pytest

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# Whole files to a process: some have workers that run once for all their tests.
pytest: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The trainers that the library works inside of, installed and tried, also by their own launchers, and what others come from;
# `pytest` passes over those that are not there.
test-integrations: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[transformers,lightning]' torchdata hivemind
	$(BIN)/python -m pytest -m 'not package' tests/integrations tests/docs/test_coming_from.py tests/docs/test_examples.py

# What takes real processes many seconds: more faults, more seeds, more ranks than `make test` has. CASES=all strikes workers that
# come and go by every fault at every moment (hours), CASES=1, 2, ... by other ones than usual.
chaos: $(VENV)/installed
	$(BIN)/python -m pytest -m soak

# The tables that pages take from the CSV files in results/; sentences that differ are named.
tables: $(VENV)/installed
	$(BIN)/python results/check.py --write

# The site, in build/site. A link, a name or a formula that leads nowhere ends it.
docs: build/pages
	PYTHONPATH=. $(BIN)/zensical build --clean --strict

docs-serve: build/pages
	PYTHONPATH=. $(BIN)/zensical serve

# Looks at the site in Chromium, which with node must be there, and keeps some pictures of it.
docs-check: docs
	cd docs/check && npm ci --silent --no-audit --no-fund
	node docs/check/check.mjs build/site docs/pictures

.PHONY: build/pages
build/pages: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/gather_pages.py

# Wheels and sdists of both distributions, tried in environments with no more than they ask for.
package: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m build --no-isolation --outdir dist experiments
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -m package tests/unit

# What a version needs before it is published: an address, TAG=v0.1.0 as its number, and a place in the changelog.
release:
	! grep -n 'https://example.org' pyproject.toml experiments/pyproject.toml
	grep -q '"$(TAG:v%=%)"' src/distoptim/version.py
	grep -q '^## \[$(TAG:v%=%)\] - ' CHANGELOG.md
	$(MAKE) package

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist runs
