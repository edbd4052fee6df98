# make run: install, compute the default study, build the report pages.   make test: the tests.   See README.md.
# Whether a Python is one that pyproject.toml allows; the first on the PATH that is, or `make run PYTHON=...`.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(FITS)' 2> /dev/null && echo $$p && break; done)
# Processes of the tests.
WORKERS ?= 2
CORES ?= $(shell nproc 2>/dev/null || echo 2)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

MINUTES ?= 60

.PHONY: run test soak cluster-test lint clean install notebooks rulegraph

install: .venv/installed

.venv/installed: pyproject.toml
	@'$(PYTHON)' -c '$(FITS)' 2> /dev/null || { echo "make: PYTHON='$(PYTHON)' is no Python 3.11, 3.12 or 3.13; install one and give its path, make run PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

run: install
	snakemake --cores $(CORES) --quiet host rules reason
	@if [ ! results/workflow.html -nt results/report ]; then snakemake --report results/workflow.html --quiet all; fi
	@for page in results/report/default-*/index.html; do echo "results: $$page"; done
	@echo "workflow, with every job's cost: results/workflow.html"

test: install lint
	pytest -q --numprocesses $(WORKERS) --dist worksteal --durations=10

# Hours: kills over all stages, the tests of a failing machine, the default study with random stops (docs/reliability.md).
soak: install
	python tests/faults.py --kills 400
	pytest -q -m soak
	python tests/soak.py --minutes $(MINUTES)
	HYPOTHESIS_PROFILE=soak pytest -q -s tests/test_bad_input.py tests/test_security.py

# A sweep on a Slurm of two node daemons on this machine, one of them killed (needs Debian's slurm-wlm and munge); results in a
# bucket of an S3 server on loopback, the jobs in folders that stand for machines and pods (docs/scale.md).
cluster-test: install
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,cluster,cluster-test]'
	pytest -q -rs -m cluster tests/cluster

lint: install
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

# The notebooks on the newest report of results/, with their pictures, in results/notebooks/.
notebooks: install
	mkdir -p results/notebooks
	for notebook in notebooks/*.ipynb; do jupyter-execute $$notebook --output='../results/notebooks/{notebook_name}' || failed=1; done; exit $${failed:-0}
	@echo "executed: results/notebooks/*.ipynb"

# The picture of the stages in README.md, of two experiments that together have them all; needs graphviz.
rulegraph: install
	snakemake --rulegraph dot --config experiments='["allocation=global evaluation.decomposition=true", "pruning=odp"]' \
	  overrides=tracking=offline 2> /dev/null | sed -E 's/color = "[^"]*"/color = "#b84e00"/; /^    (graph|node)\[/d; /label = "all"|-> 0$$/d' \
	  | tred | dot -Tsvg -Grankdir=LR -Gbgcolor='#fbfaf8' -Gpad=0.15 -Granksep=0.25 -Nshape=box -Nfontname=Helvetica \
	  -Nmargin=0.08 -Nfontsize=14 -Nfontcolor='#1f2328' -Nheight=0.4 > docs/images/workflow.svg

# Downloads stay in the user's cache (paths.cache), the environment in .venv.
clean:
	rm -rf results/* .snakemake build
	git checkout -- results 2>/dev/null || true
