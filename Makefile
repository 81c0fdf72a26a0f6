# Every target does its own set-up: `make quickstart` and `make test` work as the first command in a clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

SMOKE := data.max_train=300 data.max_validation=60 data.max_test=120 orders.limit=64 completion.num_images=16 \
	$(foreach stage,tokenizer features raster any-order random ordered,$(stage).train.steps=20 $(stage).train.warmup=5) \
	$(foreach order,raster random ordered,samples-$(order).num_images=64 eval-$(order).nll_images=32)

# Tests of what computes in bfloat16 where the hardware has it (ANYORDER_BF16=auto).
PRECISION := $(addprefix tests/test_,$(addsuffix .py,adapt bench completion_stage device grids runs trainer))

.PHONY: quickstart docs test test-precision lint format smoke bench gpu demo coverage shape hooks clean

quickstart: $(VENV)/.installed  ## the whole method on procedural sunsets, with a report
	$(BIN)/anyorder quickstart

test: $(VENV)/.installed-dev  ## all tests that need neither a GPU, nor weights, nor more than 5 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-precision: $(VENV)/.installed-dev  ## the tests that ANYORDER_BF16=on or off affects
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PRECISION)

lint: $(VENV)/.installed-dev  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

smoke: $(VENV)/.installed  ## every stage of the quickstart, at toy size
	rm -rf runs/smoke
	$(BIN)/anyorder quickstart out=runs/smoke $(SMOKE)

bench: $(VENV)/.installed
	$(BIN)/anyorder bench

LARGE = model.depth=24 model.width=1024 model.heads=16 'only=["training step","teacher-forced scoring","sampling, fixed order"]'
# SYSTEM=1 takes $(PYTHON) with the PyTorch that is installed there, instead of installing one into $(VENV).
GPU = $(if $(SYSTEM),PYTHONPATH=src $(PYTHON),$(BIN)/python)
gpu: $(if $(SYSTEM),,$(VENV)/.installed-dev)  ## on a GPU: its tests and the bench of 28 M and 300 M parameters, in float32 and bfloat16
	$(GPU) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device and a PyTorch that sees it')"
	$(GPU) -m pytest -m gpu
	$(GPU) -m anyorder bench batch_size=64 images=64 out=docs/results/gpu.json
	$(GPU) -m anyorder bench $(LARGE) batch_size=16 images=16 out=docs/results/gpu-300m.json
	$(if $(RANDAR)$(ARPG),$(GPU) experiments/adapter_speed.py docs/results/gpu-adapters.json --device cuda --rows 64 --bf16 $(if $(RANDAR),--randar $(RANDAR)) $(if $(ARPG),--arpg $(ARPG)),@echo "make gpu RANDAR=DIR ARPG=DIR also times checkouts of the published programs")

demo: $(VENV)/.installed  ## watch the model that comes with the package generate, in a browser
	$(INSTALL) -e '.[demo]'
	$(BIN)/anyorder demo pipeline=emoji64

coverage: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

shape: $(VENV)/.installed  ## lines, imports, sizes and frames beside their limits
	$(BIN)/python tools/shape.py

docs: $(VENV)/.installed-dev  ## the documentation site, in docs/_build/html; warnings are errors
	$(INSTALL) -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

hooks: $(VENV)/.installed-dev  ## check style and types before every commit
	git config core.hooksPath .hooks

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anyorder needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "installing about 1.3 GB into $(VENV), which takes some minutes"
	@begin=$$(date +%s); $(PYTHON) -m venv $(VENV) && $(INSTALL) -e . && echo "installed in $$(($$(date +%s) - begin)) s"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev,log,demo]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
