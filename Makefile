# Plain `make` lists the recipes. Every recipe that needs the environment makes it first.

COHORT ?= builtin
PYTHON ?= python3
BIN := .venv/bin

# Where it is set, each process compiles every library it imports again: half of the tests' time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup cohort notebooks train report pack lab test test-browser check bench licences format lock clean

help:  ## list the recipes
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: .venv/.stamp  ## .venv with the locked dependencies, hashes checked, and this package

.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) -V 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
	$(BIN)/uv pip sync --python .venv --require-hashes requirements.lock
	$(BIN)/uv pip install --python .venv --quiet --no-deps --no-build-isolation -e .
	@touch $@

cohort: setup  ## make the built-in cohort of CT phantoms under data/builtin (skipped when complete)
	@case $(COHORT) in builtin|quick) $(BIN)/python -m cspine_helpers phantom --cohort $(COHORT);; esac

notebooks: cohort  ## run the notebooks in order (COHORT=rsna2022 for the RSNA data)
	$(BIN)/python notebooks/run.py --cohort $(COHORT)

train: cohort  ## train the cohort's run again: notebooks 01 to 03 with RETRAIN = True (SETTINGS=mine.json, see SETTINGS.md)
	$(BIN)/python notebooks/run.py --cohort $(COHORT) --retrain $(if $(SETTINGS),--settings $(SETTINGS)) 01 02 03

report: cohort  ## one patient's page: figures/<cohort>/patient_<uid>.png and .pdf (STUDY=<uid>; RUN=<run>, ARGS=--truth)
	$(BIN)/python -m cspine_helpers report --run $(or $(RUN),$(COHORT)) --study $(STUDY) $(ARGS)

pack: setup  ## pack a cohort's CT into sequences (COHORT=rsna2022): data/<cohort>/packed, contact sheets (ARGS="--only 1")
	$(BIN)/python -m cspine_helpers pack --cohort $(COHORT) $(ARGS)

lab: cohort  ## open JupyterLab on the first notebook
	$(BIN)/jupyter lab notebooks/00_pack_ct.ipynb

test: check-code  ## format, lint, types, layers, and every test but the browser's, the whole series included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: setup  ## drive the slider of notebook 04 in JupyterLab and Chromium (minutes; SCREENSHOTS=folder)
	$(BIN)/python -m pytest -m browser tests/browser

check: check-code  ## the same without the series and the slow tests (under 2 minutes)
	$(BIN)/python -m pytest -m "not series and not slow and not browser" --ignore=tests/browser -n 2 --dist loadfile

.PHONY: check-code
check-code: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## measure the package against its limits; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

licences: setup  ## list the licences of all dependencies; fails on GPL, AGPL and LGPL
	$(BIN)/pip-licenses

format: setup  ## let ruff format code and notebooks, and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup  ## resolve the newest allowed versions into requirements.lock and constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra ct --extra pretrained --extra tensorboard --group dev \
	    --universal --python-version 3.11 --generate-hashes --upgrade --no-header --no-annotate --quiet --output-file requirements.lock
	sed 's/ \\$$//; /^    --hash/d' requirements.lock > constraints.txt

clean:  ## remove what was made: environment, cohorts builtin and quick and their CT, caches, rendered copies
	rm -rf .venv data/builtin data/quick data/builtin_ct data/quick_ct notebooks/rendered .*_cache .hypothesis .import_linter_cache
	find cspine_helpers tests notebooks -name __pycache__ -prune -exec rm -rf {} +
