# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
N      ?= 2
OUT    ?= runs/demo
export HF_HUB_OFFLINE ?= 1
export MPLBACKEND ?= Agg
export OMP_NUM_THREADS ?= 2
export RAY_USAGE_STATS_ENABLED ?= 0
ifneq ($(wildcard ../shared/data),)
export SYNAPSE_TEST_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help install demo test test-long lab fix docs bench clean
help:            ## this list
	@grep -hE '^[a-z-]+: .*## ' Makefile | sed -E 's/:.*## /\t/' | sort

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo "First time: about 3 GB of packages are downloaded into $(VENV) (torch is the largest; with a CPU-only package index it is smaller)."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)  ## the environment in .venv

demo: $(STAMP)   ## simulate, align, learn, draw: runs/demo/report.html
	$(BIN)/synapse demo --out $(OUT)

lab: $(STAMP)    ## JupyterLab on the tutorials
	$(BIN)/jupyter lab nbs/tutorials

fix: $(STAMP)    ## after editing a notebook: export, clean, README
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

test: $(STAMP)   ## everything CI runs
	$(BIN)/python -m pip check
	$(BIN)/python tools/drift.py
	$(BIN)/ruff check tests tools benchmarks setup.py
	OMP_NUM_THREADS=1 timeout 2700 $(BIN)/nbdev_test --n_workers $(N) --timing --do_print
	$(BIN)/python tools/docs_check.py
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; else echo 'quarto is not on PATH: the site is checked, not rendered'; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(N) -m "not slow" tests

test-long: $(STAMP)  ## the long grids, kills and slow cells too
	timeout 14400 $(BIN)/nbdev_test --n_workers $(N) --flags slow --timing
	$(BIN)/python -m pytest -q -n $(N) tests

docs: $(STAMP)   ## the site (needs Quarto), else its check
	@if command -v quarto >/dev/null; then $(BIN)/nbdev_docs; else $(BIN)/python tools/docs_check.py; fi

bench: $(STAMP)  ## every benchmark, peers in .venv-bench
	$(BIN)/python benchmarks/run_all.py $(BENCH_ARGS)

clean:           ## what can be made again (not .venv, not runs/)
	rm -rf build dist _docs _proc _site_check nbs/nbdev.yml *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
