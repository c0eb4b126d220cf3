# Each target does its own set-up in .venv*; a machine needs only make and Python 3.11 or newer (make PYTHON=python3.12).
PYTHON ?= python3
VENVS := .venv .venv-analysis .venv-plain
PEERS := .venv-nngeometry .venv-neural-tangents
SMOKE := .venv-plain/smoke

.DELETE_ON_ERROR:
.PHONY: help demo test reliability soak studies lint bench bench-kernels scaling constraints clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r target text; do \
	  printf '  make %-14s %s\n' "$$target" "$$text"; done

demo: .venv/.stamp ## train the digits study, judge its claims, write its report
	@.venv/bin/ntk-eos demo

# One BLAS thread: the runs of a sweep are the parallelism, and the last bits of a sum do not depend on the machine's cores.
test reliability soak studies bench scaling: export OMP_NUM_THREADS = 1
test reliability soak studies bench scaling: export OPENBLAS_NUM_THREADS = 1
test reliability soak studies bench scaling: export MKL_NUM_THREADS = 1

# Hypothesis' own profile ci: the same examples every time, no deadline on a busy machine. Plain pytest explores.
# One process per core; whoever is done takes tests from the others.
PYTEST := pytest -q --hypothesis-profile=ci --numprocesses=logical --dist=worksteal
# Tests that measure a promise of docs/reliability.md.
PROMISED := tests/reliability tests/golden tests/test_safety.py
# It measures a share of time, so nothing else runs beside it.
ALONE := tests/reliability/test_overhead.py
CI_SIZE := -m "not short and not soak and not slow" --measured docs/reliability.json

test: $(VENVS:=/.stamp) ## all tests; the analysis without torch; plain reads with xarray, zarr and dask alone
	@echo "test 1/3: everything but the analysis"
	@.venv/bin/$(PYTEST) --ignore tests/analysis
	@echo "test 2/3: the analysis, without torch"
	@.venv-analysis/bin/$(PYTEST) tests/analysis
	@echo "test 3/3: reading a store with xarray, zarr and dask alone"
	@rm -rf $(SMOKE)
	@.venv/bin/python tests/plain/make_store.py $(SMOKE)
	@NTK_EOS_STORE=$(SMOKE) .venv-plain/bin/pytest -q --confcutdir=tests/plain tests/plain

reliability: .venv/.stamp .venv-moto/.stamp ## the longer tests, which kill and damage: docs/reliability.md
	@.venv/bin/$(PYTEST) $(PROMISED) --ignore $(ALONE) $(CI_SIZE)
	@.venv/bin/$(PYTEST) $(ALONE) --numprocesses=0 $(CI_SIZE)
	@.venv/bin/python tests/promises.py docs/reliability.json > docs/.reliability.md
	@mv docs/.reliability.md docs/reliability.md

soak: .venv/.stamp .venv-moto/.stamp ## the same for hours; its figures join the page
	@.venv/bin/$(PYTEST) -m soak --measured docs/reliability.json
	@.venv/bin/python tests/promises.py docs/reliability.json > docs/.reliability.md
	@mv docs/.reliability.md docs/reliability.md

# All of them in under half an hour on two cores; SIZE=full takes an evening. A failed claim is a result, not an error.
STUDIES := paper_fig1 paper_architectures paper_datasets phases two_layer_linear central_flow sgd multi_class cross_entropy generalisation
SIZE ?= quick

studies: .venv/.stamp ## the paper's studies, judged: reports in data/stores, verdicts in docs/claims.md
	@for study in $(STUDIES); do \
	  .venv/bin/ntk-eos study $$study --size $(SIZE) || [ $$? -eq 1 ] || exit 1; done
	@.venv/bin/python -m analysis.verdicts $(STUDIES:%=data/stores/%-$(SIZE)) > docs/.claims.md
	@mv docs/.claims.md docs/claims.md

lint: .venv/.stamp ## style, docstrings and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

bench: .venv/.stamp ## costs as ratios, measured in one run
	@.venv/bin/python tests/bench/run.py

scaling: .venv/.stamp ## how time, memory and bytes grow: the tables of docs/scaling.md, three quarters of an hour
	@.venv/bin/python tests/bench/scaling.py

# It sets threads itself, 1 and then 2. BENCH passes options on: make bench-kernels BENCH='--rows cnn-500 --markdown t.md'.
# Where OPENBLAS_CORETYPE is set, env -u OPENBLAS_CORETYPE make bench-kernels measures what OpenBLAS would choose.
bench-kernels: .venv/.stamp $(PEERS:=/.stamp) ## kernels, eigenpairs and recording against peers, half an hour
	@.venv/bin/python tests/bench/kernels.py $(BENCH)

# A peer that cannot be installed is named in the table with pip's reason, and tried again the next time.
$(PEERS:=/.stamp): .venv-%/.stamp: tests/bench/peers/%.txt
	@echo "$(@D): installing the pinned packages (minutes the first time)"
	@$(PYTHON) -m venv --clear $(@D)
	-@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $< 2> $(@D)/error.txt && touch $@

# An S3 server for tests, apart from everything else: its pins of boto3 are not ours.
.venv-moto/.stamp: tests/reliability/moto.txt
	@echo "$(@D): installing the pinned packages (minutes the first time)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

.venv/.stamp:          packages = -e '.[train,netcdf,distributed,cloud,dev]'
.venv-analysis/.stamp: packages = -e '.[netcdf]' pytest pytest-xdist hypothesis
.venv-plain/.stamp:    packages = xarray zarr dask pytest

$(VENVS:=/.stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; try for example: make PYTHON=python3.12" >&2; exit 1; }
	@echo "$(@D): installing the pinned packages (minutes the first time)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(packages)
	@touch $@

# Run it on Python 3.11, whose newest releases install everywhere. The torch pin moves only by hand: another build gives
# other bits. A local version such as +cpu names one machine's build, so pins leave it out.
constraints: ## pin the newest releases that pyproject.toml allows (torch stays)
	@rm -rf .venv-pins
	@$(PYTHON) -m venv .venv-pins
	@grep '^torch==' constraints.txt > .venv-pins/torch.txt
	@.venv-pins/bin/python -m pip install -qq --disable-pip-version-check -c .venv-pins/torch.txt \
	  -e '.[train,netcdf,distributed,cloud,dev]'
	@echo "# What the tests pass with today; written by make constraints." > constraints.txt
	@.venv-pins/bin/python -m pip freeze --exclude-editable | sed 's/+.*//' >> constraints.txt
	@rm -rf .venv-pins

clean: ## remove environments and caches; stores and downloads stay
	@rm -rf $(VENVS) $(PEERS) .venv-moto .venv-pins .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
