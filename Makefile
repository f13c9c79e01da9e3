# make demo    set everything up in .venv and run the main job on the Auger data   (OUT=folder  QUICK=1  SEED=n)
# make test    set everything up in .venv and pass the tests                       (ARGS="-k store -x")
# make lint    ruff and mypy
# make bench   speed beside sbi and BayesFlow, which get .venv-bench to themselves   (QUICK=1  ARGS="--only step growth")
# make clean   remove the virtual environments and every cache; runs are kept

PYTHON ?= python3
OUT    ?= runs/demo
SEED   ?=
QUICK  ?=
ARGS   ?=

BIN   := .venv/bin
STAMP := .venv/.installed
PEERS := .venv-bench/bin

.PHONY: install demo test lint bench clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/sbi-phys demo --out "$(OUT)" $(if $(filter-out 0,$(QUICK)),--quick) $(if $(SEED),--seed $(SEED))

test: $(STAMP)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP) .venv-bench/.installed
	@$(BIN)/python benchmarks/run.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

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

# The peers' versions are their own: sbi and BayesFlow must not decide what the package is tested with.
.venv-bench/.installed: pyproject.toml benchmarks/constraints-bench.txt
	@test -x $(PEERS)/python || { echo "making .venv-bench"; $(PYTHON) -m venv .venv-bench; }
	@echo "installing the peers into .venv-bench (a few minutes the first time)"
	@$(PEERS)/python -m pip install -qq --disable-pip-version-check -c benchmarks/constraints-bench.txt torch $$($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
	@touch $@

clean:
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sbi_phys simulators tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
