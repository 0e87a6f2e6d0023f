# Everything that a checkout needs. `make` lists the targets. Only Python 3.11, make and git must be installed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
VERSION_CHECK := import sys; sys.exit(sys.version_info[:2] != (3, 11))
ARCHIVE ?= tmp/auto-quantize-model.tar.gz
PROFILE ?= balanced
CONFIG ?=
VERBOSE ?=
SCRATCH := tmp/bench tmp/check_exports tmp/faults tmp/slurm tmp/auto-quantize-model.tar.gz

# The first of these that starts and is 3.11. A version manager's shim may exist and start nothing.
find_python = for python in $(or $(PYTHON),python3.11 python3 python); do \
	if "$$python" -c '$(VERSION_CHECK)' 2>/dev/null; then break; fi; python=; done; \
	if [ -z "$$python" ]; then \
	echo "error: no Python 3.11 found; install it, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; fi

# One line for each step, and the decision at the end. VERBOSE=1 shows all that Snakemake and the steps say.
define pipeline
@for file in $(CONFIG); do if [ ! -f "$$file" ]; then \
	echo "error: CONFIG=$$file: no such file; name a config file, such as config/qwen2_5_vl_3b.yaml" >&2; exit 2; fi; done; \
$(if $(VERBOSE),,PIPELINE_QUIET=1) $(BIN)/snakemake $(1) --cores 1 --resources gpu=1 \
	$(if $(CONFIG),--configfile $(CONFIG)) $(2)
endef

.PHONY: help setup run test test-slurm image lint quantize bench bench-3b bench-estimates bench-parts bench-memory bench-rivals bench-families bench-page bench-gpu bench-faults bench-tests check-exports standin-3b train-digits dag config archive lock clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-15s %s\n' "$$name" "$$text"; done

setup: $(READY) ## install everything into .venv from envs/requirements.lock

$(READY): envs/requirements.lock pyproject.toml
	@$(find_python); \
	if ! $(BIN)/python -c '$(VERSION_CHECK)' 2>/dev/null; then \
		if [ -e $(VENV) ] && [ ! -e $(VENV)/.made-by-make ] && [ ! -e $(READY) ]; then \
		echo "error: $(VENV) exists without Python 3.11; move it away, and make creates its own" >&2; exit 2; fi; \
		mkdir -p $(VENV); touch $(VENV)/.made-by-make; "$$python" -m venv --clear $(VENV); touch $(VENV)/.made-by-make; fi
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r envs/requirements.lock
	@# setuptools is in the lock, so building the package fetches nothing that is not pinned.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

run: $(READY) ## run the pipeline on config/config.yaml and CONFIG=FILE, one step at a time (VERBOSE=1 shows all)
	$(call pipeline)

# Two processes on two cores, with one thread each: more threads would wait for each other.
test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slurm: $(READY) ## run the pipeline on a SLURM of its own with kills and time limits (root, apt-get install munge slurm-wlm; 15 minutes)
	$(BIN)/python benchmarks/slurm.py

# The first that works: docker may be there without its daemon. BASE and PIP_ARGS are those of the Dockerfile.
image: ## build the image auto-quantize-model:VERSION from the Dockerfile (docker or podman)
	@for engine in docker podman; do if "$$engine" version >/dev/null 2>&1; then break; fi; engine=; done; \
	if [ -z "$$engine" ]; then \
	echo "error: neither docker nor podman works here; install podman, or start the daemon of docker" >&2; exit 2; fi; \
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	"$$engine" build $(if $(BASE),--build-arg BASE="$(BASE)") $(if $(PIP_ARGS),--build-arg PIP_ARGS="$(PIP_ARGS)") \
		--tag "auto-quantize-model:$$version" .; \
	echo "made the image auto-quantize-model:$$version"

lint: $(READY) ## check style, types and the workflow
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check workflow
	$(BIN)/snakemake --lint

quantize: $(READY) ## write the model of PROFILE (balanced) as a checkpoint, load it back, and compare its error with the profile's
	$(call pipeline,quantize_model,--config quantize='{profile: $(PROFILE)}')

bench: $(READY) ## measure equality with INC, speed next to INC, forwards in each scheme, and growth (20 minutes)
	$(BIN)/python benchmarks/bench.py

bench-3b: $(READY) ## measure the full Qwen2.5-VL-3B shape on the CPU (an hour, 24 GiB, 8 GB of disk)
	$(BIN)/python benchmarks/real_shape.py --device cpu

bench-estimates: $(READY) ## compare estimates with exact scores of SmolLM2-135M, and estimate the 3B shape (90 minutes, 24 GiB)
	$(MAKE) run CONFIG=config/smollm2_135m.yaml
	$(BIN)/python benchmarks/estimates.py
	$(BIN)/python benchmarks/real_shape.py --exact none --maps isolated --schemes inc_int8 W8A8 FP8_DYNAMIC W4A16 NVFP4

bench-parts: $(READY) ## share a capture among simulated nodes, and compare the bytes (5 minutes)
	$(BIN)/python benchmarks/parts.py --parts 1 2 4

bench-memory: standin-3b ## run the stand-in of the 3B in memory and within 10 GiB: seconds, memory, bytes (8 GB of disk; an hour)
	$(BIN)/python benchmarks/memory_limit.py

bench-rivals: $(READY) ## compare with ModelOpt and AutoRound on SmolLM2-135M (installs both into tmp/, 4 GB; two hours)
	$(MAKE) run CONFIG=config/smollm2_135m.yaml
	$(BIN)/python benchmarks/rivals.py

bench-families: $(READY) ## plan, measure and audit a tiny model of each architecture, and write docs/families.md (two hours)
	$(BIN)/python benchmarks/families.py

bench-page: $(READY) ## measure the size of the page of 417 ops in five schemes, and how fast a browser opens it (5 minutes)
	$(BIN)/python benchmarks/page_open.py

bench-gpu: run ## compare a GPU with the CPU, op for op, and measure the full Qwen2.5-VL-3B shape on it (8 GB of disk)
	$(BIN)/python benchmarks/gpu_check.py prepare results/digits_vlm/digits
	$(BIN)/python benchmarks/gpu_check.py trained
	$(BIN)/python benchmarks/gpu_check.py standin

bench-faults: $(READY) ## kill the pipeline and damage its inputs: configs, snapshots, files between steps (an hour)
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/fuzz_configs.py
	$(BIN)/python benchmarks/fuzz_snapshots.py

bench-tests: $(READY) ## run the tests that take minutes, such as the 3B's config from a local hub
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench

check-exports: run ## load every export in its own tool (installs five tools into tmp/, 6 GB)
	$(BIN)/python benchmarks/check_exports.py

standin-3b: $(READY) ## write a stand-in of Qwen2.5-VL-3B and photographs for config/standin.yaml (8 GB of disk)
	$(BIN)/python scripts/make_standin.py --snapshot resources/models/qwen2_5_vl_3b_standin --photos resources/photos

train-digits: $(READY) ## train the embedded model again in a temporary folder, and compare it with the shipped snapshot
	$(BIN)/python scripts/train_digits.py

dag: $(READY) ## draw the rule graph into docs/rulegraph.svg and README.md
	$(BIN)/python scripts/draw_rule_graph.py --svg docs/rulegraph.svg --readme README.md

config: $(READY) ## write config/config.yaml, its JSON schema and docs/config.md from the config models
	$(BIN)/python scripts/write_config.py

archive: $(READY) ## pack the workflow and the shipped model into ARCHIVE, without local samples and models
	@mkdir -p "$(dir $(ARCHIVE))"
	@# Snakemake does not replace an archive. Another kind of file is not removed.
	@if [ -e "$(ARCHIVE)" ] && ! tar -tzf "$(ARCHIVE)" 2>/dev/null | grep 'workflow/Snakefile$$' >/dev/null; then \
		echo "error: $(ARCHIVE) is not an archive of this workflow; move it away, or name another ARCHIVE=" >&2; exit 2; fi
	@rm -f "$(ARCHIVE)"
	$(BIN)/snakemake --archive "$(ARCHIVE)"

# The local label of a build (+cpu) belongs to this machine. The lock names the release, so each machine finds its build.
lock: ## write envs/requirements.lock from envs/requirements.in
	@$(find_python); \
	tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	"$$python" -m venv "$$tools"; \
	"$$tools/bin/pip" install --disable-pip-version-check --quiet pip-tools; \
	cd envs; \
	"$$tools/bin/pip-compile" --quiet --upgrade --allow-unsafe --strip-extras --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file="$$tools/lock" requirements.in; \
	{ printf '#\n# Written by `make lock` from requirements.in with pip-compile, Python 3.11\n#\n'; sed 's/+cpu$$//' "$$tools/lock"; } \
		> "$$tools/requirements.lock"; \
	mv "$$tools/requirements.lock" requirements.lock

# In results/ this removes the score store and the files that Snakemake has records of. In tmp/ it removes the names in
# SCRATCH. All else belongs to the user. Without records, only the store is known to be of this workflow.
clean: ## remove results that Snakemake has records of, scores and caches (not .venv, not models)
	@if [ ! -d .snakemake ]; then only=--scores; echo "no run is recorded in .snakemake, so results/ stays, except for the scores"; fi; \
	if [ ! -d .snakemake ] && [ ! -d results/scores ]; then true; \
	elif [ ! -x $(BIN)/python ]; then echo "error: without $(VENV) the files of the workflow are not known; run make setup" >&2; exit 2; \
	else $(BIN)/python scripts/clean_results.py $${only:-}; fi
	rm -rf .snakemake $(SCRATCH) .pytest_cache .mypy_cache .ruff_cache
	@if [ -d tmp ]; then rmdir --ignore-fail-on-non-empty tmp; fi
	@if [ -d tmp ]; then echo "tmp/ keeps files that no target of this Makefile wrote: $$(ls -A tmp | head -12 | tr '\n' ' ')"; fi
