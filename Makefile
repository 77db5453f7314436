# Metaloom: `make repro` and `make test` are all that a new machine needs (Python >= 3.11, git, make).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench-installed
CLUSTER_STAMP := $(VENV)/.cluster-installed
SIZE ?= ci
# pip compiles one file after the other; compileall does with all cores what it left out.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.PHONY: help setup repro test test-slow test-cluster cluster-up cluster-down chaos
.PHONY: audit lint format bench bench-check bench-serve fuzz-serve check-manifests ui clean doctor

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 17

setup: $(STAMP)  ## make .venv with the exact pins of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.12 or so" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[track,glyphs,serve,sign,traces,audit,dev]'
	$(COMPILE)
	touch $(STAMP)

repro: $(STAMP)  ## from nothing to a promoted model: runs every stage that has changed
	dvc repro
	metaloom release

test: $(STAMP)  ## the whole test suite, apart from the long campaigns
	python -m pytest -m 'not slow and not cluster and not chaos' --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/cluster --ignore tests/chaos

test-slow: $(STAMP)  ## the long campaigns
	python -m pytest -m 'slow and not cluster and not chaos'

cluster-up: $(CLUSTER_STAMP)  ## PostgreSQL, S3, MLflow and two Ray nodes on this machine alone
	python -m infra.local up

cluster-down:  ## stop them; their data stays in .metaloom/cluster
	if [ -x $(BIN)/python ]; then python -m infra.local down; fi

test-cluster: $(CLUSTER_STAMP)  ## tests against those servers, and of what may break
	METALOOM_CHAOS_SIZE=$(SIZE) python -m pytest tests/contract tests/cluster tests/chaos --numprocesses 2 --dist loadfile --no-loadscope-reorder -m '(cluster or chaos)$(if $(filter full,$(SIZE)),, and not slow)'

chaos: $(CLUSTER_STAMP)  ## break everything (SIZE=full: the nightly size): results/chaos.json
	METALOOM_CHAOS_SIZE=$(SIZE) python -m pytest tests/chaos tests/cluster/test_hosts.py

$(CLUSTER_STAMP): $(STAMP)
	$(INSTALL) '.[ray,s3,servers,onnx]'
	$(COMPILE)
	touch $(CLUSTER_STAMP)

lint: $(STAMP)  ## ruff, mypy --strict, import-linter
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: $(STAMP)  ## let ruff put the code in order
	ruff check --fix .
	ruff format .

bench: $(BENCH_STAMP)  ## meta-gradients per second, beside other libraries: docs/results.md
	python -m benchmarks.contest
	python -m benchmarks.report

bench-check: $(BENCH_STAMP)  ## fail if ours became slower against the eager loop
	python -m benchmarks.check

$(BENCH_STAMP): $(STAMP)
	$(INSTALL) '.[bench]'
	$(COMPILE)
	touch $(BENCH_STAMP)

bench-serve: $(STAMP)  ## load on the service beside a bare handler and MLflow's: results/serve/load.json
	python -m benchmarks.serving

fuzz-serve: $(STAMP)  ## made-up and damaged requests to the service: results/serve/fuzz.json
	python -m tests.serve.fuzz --cases 5000 --mutations 2000

check-manifests: $(STAMP)  ## render and check every overlay of infra/kubernetes, and plant mistakes
	python -m infra.manifests --planted

audit: $(STAMP)  ## the images' bills of materials, and what is known against their packages
	python -m infra.audit

ui: $(STAMP)  ## MLflow's page, on this machine only
	metaloom ui

doctor: $(STAMP)  ## what this machine has and lacks
	metaloom doctor

clean:  ## remove what runs leave, apart from DVC's cache and the registry
	rm -rf data/store data/tasks models results .metaloom/checkpoints .metaloom/launch .metaloom/join
	rm -rf .metaloom/incidents .metaloom/runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
