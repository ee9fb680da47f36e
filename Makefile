# Everything a contributor does, one target each; `make` lists them. Needs GNU make and Python >= 3.10 with `venv`.
#   make test PYTHON=python3.12               another interpreter for a new .venv
#   make test ARGS="tests/test_layering.py"   arguments for pytest
# Where the package index serves PyTorch only with CUDA and you want the smaller CPU build, set PIP_EXTRA_INDEX_URL to
# PyTorch's index of CPU builds.
PYTHON ?= python3
ARGS ?=
BENCH_THREADS ?= 1
# The demo's towers: tiny ones trained for it, or (BACKBONE=small) Whisper tiny.en and SmolLM2, from the Hub or from REAL_MODELS=DIR
BACKBONE ?= tiny
REAL_MODELS ?=
DEMO_OUT ?= runs/$(if $(VOICES),voices,demo$(if $(filter-out tiny,$(BACKBONE)),-$(BACKBONE)))
# People's voices instead, which lie in VOICES=DIR: docs/voices.md
VOICES ?=
SUITE := .cache/transformers-tests
VLLM := .cache/vllm
BIN := .venv/bin
DEMO_tiny := $(BIN)/relllm demo
DEMO_small := $(BIN)/python examples/pretrained/pretrained_demo.py
DEMO_voices := $(BIN)/python examples/pretrained/voices_demo.py $(VOICES)

# Two test processes of one thread each: several threads in each process would fight over the cores. Files keep the
# order of tests/conftest.py, which begins with slow ones, so that both processes end together.
TEST_ENV := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-all test-gpu test-transformers test-vllm test-real check check-releases format demo bench bench-gpu clean distclean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready  ## Make .venv from the pinned versions in constraints.txt

# `.installing` exists only while a set-up runs: one found here was interrupted, and its .venv is made anew.
.venv/.ready: pyproject.toml constraints.txt scripts/fix_torchaudio.py
	@if [ -e .venv/.installing ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.installing
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	$(BIN)/python scripts/fix_torchaudio.py
	@rm .venv/.installing && touch $@

test: .venv/.ready  ## Run the tests on two cores, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: .venv/.ready  ## Run the slow ones: fresh interpreters, compilers, launchers, the demo
	$(PYTEST) -m slow $(ARGS)

test-all: .venv/.ready  ## Run both in one go, which imports and collects once
	$(PYTEST) $(ARGS)

test-gpu: .venv/.ready $(SUITE)/.ready  ## Run those that compare a card with this machine's CPU, in float32 and bfloat16, and Transformers' own on it
	RELLM_TEST_DEVICE=cuda TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m gpu tests/test_card.py tests/transformers $(ARGS)

test-transformers: .venv/.ready $(SUITE)/.ready  ## Run Transformers' own model and processor tests on ours
	$(PYTEST) tests/transformers $(ARGS)

# Follows .venv/.ready, so that a new Transformers brings its own tests along.
$(SUITE)/.ready: .venv/.ready scripts/transformers_suite.py
	$(BIN)/python scripts/transformers_suite.py $(SUITE)
	@touch $@

test-vllm: $(VLLM)/.ready  ## Run the tests of serving through vLLM, in an environment of its own (4 GB in .cache)
	$(TEST_ENV) $(VLLM)/venv/bin/python -m pytest -q -p no:warnings tests/inference/in_vllm $(ARGS)

# Needs Python >= 3.11 as PYTHON.
$(VLLM)/.ready: pyproject.toml scripts/vllm_environment.py scripts/fix_torchaudio.py
	$(PYTHON) scripts/vllm_environment.py $(VLLM)/venv
	@touch $@

test-real: .venv/.ready  ## Run the tests on pretrained towers: REAL_MODELS=DIR has whisper-tiny.en and SmolLM2-135M-Instruct
	@test -n "$(REAL_MODELS)" || { echo "Say where the two models are: make test-real REAL_MODELS=DIR" >&2; exit 2; }
	RELLM_REAL_MODELS=$(abspath $(REAL_MODELS)) $(TEST_ENV) $(BIN)/python -m pytest -q -s -m real tests/test_real_models.py $(ARGS)

check: .venv/.ready  ## Check style, types and layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/test_layering.py

# Its own environments for the lowest and the newest releases are in .cache/releases; `newest` asks the package index each time.
check-releases: .venv/.ready  ## Run tests with the lowest, the pinned and the newest Transformers (ARGS="newest tests/modeling" for some)
	$(TEST_ENV) $(BIN)/python scripts/check_releases.py $(ARGS)

format: .venv/.ready  ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

demo: .venv/.ready  ## Train, evaluate and talk to a small RE-LLM on synthetic speech (BACKBONE=small: Whisper and SmolLM2)
	$(or $(DEMO_$(if $(VOICES),voices,$(BACKBONE))),$(error BACKBONE=$(BACKBONE): it is tiny or small)) --out $(DEMO_OUT) $(if $(REAL_MODELS),--real-models $(REAL_MODELS)) $(ARGS)

# One thread by default: then the clock is processor time, which a busy machine does not falsify.
bench: .venv/.ready  ## Measure speed and memory against docs/performance.md (ARGS="towers reply" for some)
	OMP_NUM_THREADS=$(BENCH_THREADS) MKL_NUM_THREADS=$(BENCH_THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python benchmarks/run_all.py $(ARGS)

bench-gpu: .venv/.ready  ## Measure the card that is here, with random weights at the paper's sizes: benchmarks/results/gpu.json
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu.py $(ARGS)

clean:  ## Remove caches and build products, keep .venv and runs/
	rm -rf build dist .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis relllm.egg-info
	find relllm tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv as well
	rm -rf .venv
