# Each target sets up what it needs: a Python 3.11+ with venv is all that must be there.
PYTHON ?= python3
BIN := .venv/bin
MAKEFLAGS += --jobs=2
# A hundred fresh processes of the tests import diffusers: what Python compiled for the first is kept for the rest.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

.PHONY: demo test coverage lint types fix wheel docs bench families train clean

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/installed

demo: .venv/installed  ## quantize and schedule the built-in emoji model, compare it with full precision, draw both
	$(BIN)/cemq quantize-and-schedule builtin:emoji --scheme w8a8 --budget 15 --effort quick -o out/emoji --overwrite
	$(BIN)/cemq evaluate out/emoji --samples 8 --picture out/side-by-side.png

test: lint types wheel docs  ## lint, check types, build the wheel and look into it, build the docs, run every test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --durations=20

coverage: .venv/installed-dev  ## the tests again, and which lines of cemq/ they never reach
	$(BIN)/python -m pytest -q -n auto --dist loadfile --cov=cemq --cov-report=term-missing:skip-covered

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev  ## what a type checker finds wrong, and how many public names have types that it knows
	$(BIN)/python tests/types_check.py

fix: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --quiet --wheel --no-isolation

docs: .venv/installed-dev  ## the site, into out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

bench: .venv/installed-dev  ## all figures of docs/benchmarks anew; takes hours
	$(BIN)/python docs/benchmarks/quantization.py
	$(BIN)/python docs/benchmarks/planning.py
	$(BIN)/python docs/benchmarks/efforts.py
	$(BIN)/python docs/benchmarks/estimate.py
	$(BIN)/python docs/benchmarks/fidelity.py
	$(BIN)/python docs/benchmarks/guidance.py
	$(BIN)/python docs/benchmarks/teacache.py
	$(BIN)/python docs/benchmarks/methods.py
	$(BIN)/python docs/benchmarks/sizes.py
	$(BIN)/python docs/benchmarks/constants.py
	$(BIN)/python docs/benchmarks/lora.py
	$(BIN)/python docs/benchmarks/memory.py
	$(BIN)/python docs/benchmarks/loading.py
	$(BIN)/python docs/benchmarks/building.py
	$(BIN)/python docs/benchmarks/speed.py
	$(BIN)/python docs/benchmarks/placement.py

families: .venv/installed-dev  ## the table of docs/families.md anew; about five minutes
	$(BIN)/python tests/families_page.py

train: .venv/installed-dev  ## train the built-in models anew, into out/trained
	$(BIN)/python -m cemq.builtin.training.train -o out/trained

clean:
	rm -rf .venv dist out
