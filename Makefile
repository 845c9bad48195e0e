# `make demo` shows the main job, `make test` passes the tests, `make docs` builds the documentation in site/.
# All use one environment, .venv, made on first use: with what the demo needs; the tests add the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
CPU := https://download.pytorch.org/whl/cpu

.PHONY: demo test pytest docs tutorials lint format bench dist constraints clean

# Where no GPU is, torch comes without CUDA (5 GB less) if its index can be reached.
$(VENV)/.demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1); remedy: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null && \
	    $(PYTHON) -c 'import urllib.request as web; web.urlopen("$(CPU)/torch/", timeout=5)' 2>/dev/null; \
	  then $(INSTALL) torch torchvision --index-url $(CPU); fi
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site
	@echo site/index.html

tutorials: $(VENV)/.installed
	$(BIN)/python docs/tutorials/run.py

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.speed.performance

# The wheel and the source distribution, and the wheel in a fresh environment with torch for the CPU.
dist: $(VENV)/.installed
	rm -rf dist && mkdir dist
	$(BIN)/hatchling build -d dist
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet torch torchvision --index-url $(CPU) --constraint constraints.txt
	dist/venv/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && venv/bin/bla --version && venv/bin/bla explain ../docs/cat.png --out why
	du -sh dist/venv

# The versions that were tested: those of this environment.
constraints: $(VENV)/.installed
	$(BIN)/python -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' > constraints.txt

clean:
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache
