# The verbs of the lab. `make help` lists them; every target that needs the environment makes it, once.
#
#   make reproduce [PROFILE=smoke|full] [DATA=phantom|kaggle|pneumoniamnist|PATH] [NUM_SEEDS=n] [NOTEBOOKS="02 10"]

ifeq ($(filter oneshell,$(.FEATURES)),)
$(error GNU make 3.82 or newer is needed, this is $(MAKE_VERSION): an older one would take a failed notebook for a finished one)
endif

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PROFILE ?= smoke
DATA ?= phantom
SEED ?= 0
NOTEBOOKS ?=
BASE_PYTHON ?= python3

export TF_CPP_MIN_LOG_LEVEL ?= 2
export PYTHONHASHSEED ?= 0
# Freed memory stays with its process, for the next step to take: half of the time spent in the kernel was giving it back.
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export MALLOC_TOP_PAD_ ?= 67108864

# Small networks fill neither two cores nor a GPU: up to four notebooks run side by side, one for each core and, on a
# GPU, for each 16 GB of its memory, of which each then takes what it needs instead of all.
CORES := $(shell getconf _NPROCESSORS_ONLN)
ROOM := $(shell nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | awk 'NR == 1 {print $$1 + 0 < 32e3 ? 1 : int($$1 / 16e3)}')
JOBS ?= $(firstword $(shell printf '%s\n' 4 $(CORES) $(ROOM) | sort -n))
export TF_FORCE_GPU_ALLOW_GROWTH ?= true
export XLA_PYTHON_CLIENT_PREALLOCATE ?= false
MAKEFLAGS += --jobs=$(JOBS)
# What XLA compiles for a card, for as long as a training there, is kept for the next call.
ifneq ($(ROOM),)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/runs/cache/jax
endif

VENV := .venv
READY := $(VENV)/.ready
PYTHON := $(VENV)/bin/python
CODE := $(wildcard cxr/*.py)

# DATA=a/x:b/y is run in runs/<profile>-x+y; results are published under results/x+y.
empty :=
space := $(empty) $(empty)
SLUG := $(subst $(space),+,$(notdir $(patsubst %/,%,$(subst :,$(space),$(DATA)))))
RUN := runs/$(PROFILE)-$(SLUG)
PUBLISHED := results/$(patsubst kaggle,chest_xray,$(SLUG:.npz=))

ALL := $(sort $(basename $(notdir $(wildcard notebooks/[0-9]*.ipynb))))
CHOSEN := $(if $(NOTEBOOKS),$(foreach number,$(NOTEBOOKS),$(or $(filter $(number) $(number)_%,$(ALL)),\
  $(error No notebook matches $(number) of NOTEBOOKS="$(NOTEBOOKS)"; there are $(ALL)))),$(ALL))
EXECUTED := $(CHOSEN:%=$(RUN)/notebooks/%.ipynb)
REPORT := $(RUN)/notebooks/10_comparison_report.ipynb
OVERRIDES := $(foreach name,NUM_SEEDS IMAGE_SIZE EPOCHS,$(if $($(name)),-p $(name) $($(name))))
PARAMETERS := -p PROFILE $(PROFILE) -p DATA $(DATA) -p SEED $(SEED) $(OVERRIDES)
PAPERMILL := $(PYTHON) -m papermill --cwd notebooks --log-output --no-progress-bar --execution-timeout 86400

.PHONY: help setup reproduce test test-jax lint report demo bench publish notebooks clean FORCE

help:  ## list the verbs
	@echo "A chest X-ray lab for research and teaching, not for diagnosis."
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv with everything (GPU=1: with CUDA; KERAS_BACKEND=jax: JAX in place of TensorFlow)

# A .venv that is there already is filled up, so that one made with --system-site-packages keeps the JAX of its machine.
$(READY): requirements.txt requirements-dev.txt requirements-jax.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed and $$($(BASE_PYTHON) --version) was found; try make BASE_PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m pip --version > /dev/null 2>&1 || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet $(if $(filter jax,$(KERAS_BACKEND)), \
	  -r <(grep -hvE '^(-r|tensorflow)' requirements.txt requirements-dev.txt requirements-jax.txt) $(if $(GPU),'jax[cuda12]'), \
	  -r requirements-dev.txt $(if $(GPU),'tensorflow[and-cuda]'))
	$(PYTHON) -m pip install --quiet --no-deps --editable .
	@touch $@

# In this order two cores are busy to the end: 09 waits for 02 to 06 and runs beside 07, the report waits for all.
ORDER := $(foreach number,05 08 03 02 06 04 01 09 07,$(filter $(RUN)/notebooks/$(number)%,$(EXECUTED)))
reproduce: $(ORDER) $(EXECUTED)  ## run the notebooks end to end and write the report
	@echo "Done. Notebooks: $(RUN)/notebooks$(if $(filter %10_comparison_report.ipynb,$(EXECUTED)),   Report: $(RUN)/report.html)"

$(RUN)/notebooks/%.ipynb: export TF_NUM_INTRAOP_THREADS ?= $(shell echo $$(( $(CORES) / ($(words $(CHOSEN)) < $(JOBS) ? $(words $(CHOSEN)) : $(JOBS)) )))
$(RUN)/notebooks/%.ipynb: export OMP_NUM_THREADS ?= $(TF_NUM_INTRAOP_THREADS)

# The one rule: run beside, then rename. A failed notebook stays as *.failed.ipynb and never counts as done. Two calls at
# once take turns at a notebook: the lock lasts as long as this shell or its papermill, so a killed call leaves none.
$(RUN)/notebooks/%.ipynb: notebooks/%.ipynb $(CODE) $(RUN)/.parameters | $(READY)
	@mkdir -p $(@D)
	@echo "── $* ($(PROFILE), $(DATA))"
	@exec 9> $(@D)/.$*.lock; $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
	rm -f $(@:.ipynb=.failed.ipynb); \
	$(PAPERMILL) $(PARAMETERS) $< $(@D)/.$*.running.ipynb 2>&1 | sed -u 's/^/$(firstword $(subst _, ,$*)) │ /' || \
	  { mv -f $(@D)/.$*.running.ipynb $(@:.ipynb=.failed.ipynb); echo "Failed: look at $(@:.ipynb=.failed.ipynb)" >&2; exit 1; }; \
	echo '$(PARAMETERS)' | cmp -s - $(RUN)/.parameters || \
	  { echo "$@: a call with other parameters began meanwhile. Its turn first, then call again; records are kept." >&2; exit 1; }; \
	mv -f $(@D)/.$*.running.ipynb $@

# The report reads what the other notebooks wrote, and 09 probes the classifiers that 02 to 06 saved.
$(REPORT): $(filter-out $(REPORT),$(EXECUTED))
$(RUN)/notebooks/09_trust.ipynb: $(foreach number,02 03 04 05 06,$(filter $(RUN)/notebooks/$(number)%,$(EXECUTED)))

# Other parameters are another run: this file changes only when they do.
$(RUN)/.parameters: FORCE
	@test $(words $(DATA)) -eq 1 || \
	  { echo "DATA: '$(DATA)' holds a space, with which make cannot work. Link the folder under a name without: ln -s …" >&2; exit 2; }
	@for part in $(filter-out phantom phantom_covid kaggle pneumoniamnist,$(subst :,$(space),$(DATA))); do test -e "$$part" || \
	  { echo "DATA: $$part does not exist. Expected phantom, kaggle, pneumoniamnist or a folder, or several joined by ':'" >&2; exit 2; }; done
	@mkdir -p $(@D)
	@echo '$(PARAMETERS)' | cmp -s - $@ || echo '$(PARAMETERS)' > $@

test: $(READY)  ## unit tests, smoke run of all notebooks, nbval, tests on the smoke records
	$(PYTHON) -m pytest -m "not smoke"
	$(MAKE) reproduce PROFILE=smoke DATA=phantom SEED=0 NUM_SEEDS= IMAGE_SIZE= EPOCHS= NOTEBOOKS=
	$(PYTHON) -m pytest -m smoke
	$(PYTHON) -m pytest -p no:cacheprovider --nbval-lax --nbval-cell-timeout 900 notebooks

# What trains, once more on Keras's other backend. Two devices made of one processor also try keras.distribution.
$(VENV)/.jax: requirements-jax.txt | $(READY)
	$(PYTHON) -m pip install --quiet -r requirements-jax.txt
	@touch $@

test-jax: $(VENV)/.jax  ## the tests that train, on JAX
	KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=2 $(PYTHON) -m pytest \
	  $(addprefix tests/test_,train.py engine.py transfer.py explain.py gan.py generate.py anomaly.py lungs.py trust.py)

lint: $(READY)  ## ruff over package, tests, benchmarks and notebooks
	$(VENV)/bin/ruff check .

publish: $(READY)  ## copy the records, figures and exported models of a full run into the repository: make publish PROFILE=full DATA=…
	@test "$(PROFILE)" = full || { echo "A full run is what is published: make publish PROFILE=full DATA=…" >&2; exit 2; }
	@test -d $(RUN)/results/records || { echo "$(RUN)/results/records is missing: make reproduce PROFILE=$(PROFILE) DATA=$(DATA) first" >&2; exit 2; }
	@mkdir -p $(PUBLISHED)/records $(PUBLISHED)/predictions figures
	cp -n $(RUN)/results/predictions/*.csv.gz $(PUBLISHED)/predictions/
	cp -n $(RUN)/results/records/*.json $(PUBLISHED)/records/
	mkdir -p $(PUBLISHED)/models
	for about in $(wildcard $(RUN)/models/*.json); do cp -n $$about $${about%.json}.keras $(PUBLISHED)/models/; done
	$(if $(filter results/chest_xray%,$(PUBLISHED)),cp $(RUN)/figures/*.png figures/)
	$(MAKE) report

report: $(READY)  ## check every published number against its predictions; rewrite the tables of README and model card, and the reports
	$(PYTHON) -m cxr report $(wildcard results/*) --readme README.md --card MODEL_CARD.md --pages

demo: $(READY)  ## train a small model on phantoms and score a few of them: a page with heatmaps
	$(PYTHON) -m cxr.demo

# The plan of docs/scaling.md is made of what the others measured: last.
bench: $(READY)  ## run every benchmark, on one machine in one go (needs torch, imagededup, JAX; DATA=folder: audits that set)
	@$(PYTHON) -c 'import torch, jax, importlib.util; assert importlib.util.find_spec("imagededup")' || \
	  { echo "The other sides are missing: pip install torch==2.13.0 imagededup -r requirements-jax.txt" >&2; exit 2; }
	for script in $(filter-out %/scaling.py,$(wildcard benchmarks/*.py)) benchmarks/scaling.py; do \
	  $(PYTHON) $$script $$([ $$script != benchmarks/audit.py ] || echo $(wildcard $(DATA))); done

# Without parameters papermill adds no cell: the outputs committed are those of the defaults, smoke on the phantom.
notebooks: $(READY)  ## refresh the committed outputs from the smoke run
	$(MAKE) reproduce PROFILE=smoke DATA=phantom SEED=0 NUM_SEEDS= IMAGE_SIZE= EPOCHS= NOTEBOOKS=
	$(PYTHON) notebooks/refresh.py $(ALL)

clean:  ## remove smoke runs and caches; full runs and the environment stay
	rm -rf runs/smoke-* runs/cache .pytest_cache .ruff_cache .hypothesis
