# Each target works alone on a fresh checkout.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test check docs clean

demo: .venv/installed ## fuse and evaluate the embedded models
	$(BIN)/fusion_bench

test: .venv/installed-dev ## run the tests
	$(BIN)/pytest --processes=auto

check: .venv/installed-dev ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev ## build the site, strictly
	PYTHONPATH=tools $(BIN)/python -m zensical build --clean --strict

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; this takes a minute or two."
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev,docs]'
	touch $@

clean: ## remove what was built; the cache outside the checkout stays
	rm -rf .venv build dist site outputs multirun
