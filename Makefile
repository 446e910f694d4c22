# make quickstart - set up and run the main job    make test - set up and run the tests    make bench - benchmarks    make docs - the site
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
DONE = $(VENV)/.installed

.PHONY: setup quickstart test bench docs clean

setup: $(DONE)

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(DONE)

quickstart: setup
	$(BIN)/enhancer run recipes/quickstart.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info
