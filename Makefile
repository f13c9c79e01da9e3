# make demo    set everything up in .venv and run the main job on the Auger data   (OUT=folder  QUICK=1  SEED=n)
# make test    set everything up in .venv and pass the tests                       (ARGS="-k store -x")
# make lint    ruff and mypy
# make clean   remove the virtual environment and every cache; runs are kept

PYTHON ?= python3
OUT    ?= runs/demo
SEED   ?=
QUICK  ?=
ARGS   ?=

BIN   := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/sbi-phys demo --out "$(OUT)" $(if $(filter-out 0,$(QUICK)),--quick) $(if $(SEED),--seed $(SEED))

test: $(STAMP)
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

install: $(STAMP)

# The stamp is newer than both files once their packages are in; the build needs no network of its own (setuptools is pinned too).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sbi_phys needs Python >= 3.11, and $(PYTHON) is " \
	  + sys.version.split()[0] + ": name a newer one with  make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing the pinned packages into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sbi_phys simulators tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
