.PHONY: install train check test coverage fuzz lint types bench bench-gpu first-gpu report \
	builtin-model real-models options figures docs kernels-report clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3

install: $(VENV)/.installed

# torch first and pinned: whatever asks for a looser one afterwards is already satisfied.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: install
	$(BIN)/abft-fast train

# A process a core; each computes on one. Files go in order of their names: by default xdist would leave
# the files of few but long tests to the end, when one process has nothing left to do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Run it before every commit: lint, types and the unit tests that are quick.
check: install lint types
	$(PYTEST) -m 'unit and not slow'

test: install lint
	$(PYTEST) -m 'not (real and slow)'

# Every test, also in the processes that tests start; it takes longer than `make test`.
coverage: install
	$(PYTEST) --cov --cov-report=term

# Any bytes into the readers of files, about five minutes; FUZZ_EXAMPLES=100000 for a night.
fuzz: export FUZZ_EXAMPLES ?= 2000
fuzz: install
	$(PYTEST) --dist load -m fuzz tests/fuzz

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff check --select ANN201 --config lint.flake8-annotations.ignore-fully-untyped=false \
		abft_fast kernels
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# Rows go to benchmarks/results as they are measured. What takes longer is `pytest benchmarks -m long`.
BENCH := $(BIN)/pytest -m 'not long' --benchmark-json=benchmarks/results/last_run.json
bench: install
	$(BENCH) $(addprefix benchmarks/,train_step.py last_row_loss.py fused_attention.py scaling.py \
		large_models.py evaluation.py end_to_end.py)

# The most telling first.
bench-gpu: install
	$(BENCH) $(addprefix benchmarks/,train_step.py large_models.py last_row_loss.py \
		fused_attention.py scaling.py evaluation.py shared_prefix.py end_to_end.py \
		unsloth_step.py)

# Right or wrong, and the figures that matter, in ten minutes; the rest is `make bench-gpu`. It needs
# no installation: PYTHON has torch, triton, transformers, peft and accelerate.
first-gpu:
	$(PYTHON) benchmarks/first_gpu.py --results benchmarks/results/first_gpu

# About half an hour on two cores; replaces abft_fast/builtin/model. Memory freed between steps is
# kept by the process: giving it back and faulting it in again took up to half of the time.
builtin-model: export MALLOC_MMAP_THRESHOLD_ = 17179869184
builtin-model: export MALLOC_TRIM_THRESHOLD_ = 17179869184
builtin-model: install
	$(BIN)/python -m abft_fast.builtin.recipe

# Real pretrained weights in .models/, two minutes; MODELS=gemma-3-270m picks. `pytest -m real` uses
# them, as does `abft-fast train --model .models/gemma-3-270m.gguf`.
real-models: install
	$(BIN)/python -m tests.real.fetch $(MODELS)

# The table of docs/reference/options.md, from the definitions in abft_fast/options.
options: install
	$(BIN)/python -m abft_fast.cli.options_table docs/reference/options.md

# The pages of docs/performance and their plots, from benchmarks/results/.
report: install
	$(BIN)/python -m benchmarks.report

# The drawings of the documentation; the standard library is enough.
figures:
	$(PYTHON) docs/figures/draw.py

# The site, in site/. Its virtual environment has the extra `docs` alone: no torch is needed.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))\
		['project']['optional-dependencies']['docs'], sep='\n')" > .venv-docs/docs.txt
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r .venv-docs/docs.txt
	touch $@

# Every variant of the kernels for every GPU target; no GPU needed, an hour on two cores.
kernels-report: install
	$(BIN)/python kernels/compile_report.py --output docs/performance/kernels.md

clean:
	rm -rf $(VENV) .venv-docs site *.egg-info .*_cache .hypothesis .coverage*
