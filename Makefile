# make test   sets up .venv, then lints, type-checks and tests
# make demo   sets up .venv, then trains softmax and three random-feature attentions on small ListOps, and writes a page
# make docs   rewrites the generated pages of variants and attentions
# make bench  measures CPU attention against torch's and performer-pytorch's, and rewrites results/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= auto

.PHONY: test demo docs bench lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --quiet

# One thread: at this size two wait for each other longer than they compute.
demo: $(VENV)/.installed
	$(BIN)/spectraformer train --task listops --size tiny --attention softmax posrf-orf oprf-orf oprf-fastfoodl \
		--threads 1 --data demo/data --runs demo/runs
	$(BIN)/spectraformer report demo/runs --out demo/report --least-margin 10

docs: $(VENV)/.installed
	$(BIN)/python -m spectraformer.catalogue --out docs

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/cpu_attention.py --out results/cpu_attention.json

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
