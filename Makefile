PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without compiling 19,000 files, a minute of a processor: Python compiles those that it imports, as after uv.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# PyTorch in the build for this machine, which is far smaller where there is no GPU: uv knows where it is. TORCH_INDEX=URL
# names an index instead (such as the one that PyTorch's "Get Started" page shows for CPU). Where uv cannot reach its own,
# pip takes the build that its index has.
install = $(if $(TORCH_INDEX),\
  PIP_INDEX_URL=$(TORCH_INDEX) $(PIP) torch torchvision && $(PIP) -e ".[$(1)]",\
  $(PIP) uv && $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --torch-backend auto -e ".[$(1)]" || $(PIP) -e ".[$(1)]")

.PHONY: quickstart test pytest test-full lint docs notebooks picture tables results-check bundle clean

quickstart: $(VENV)/.quickstart   ## find a universal perturbation, harden the model, open report.html
	$(BIN)/gambeson quickstart --out runs/quickstart

# Compiled once, where the environment forbids it too, not by every worker and every command that a test starts.
test pytest test-full: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.dev               ## everything that must hold, in minutes
	$(MAKE) --jobs 2 lint pytest

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not full"  # neighbours share a worker and its fixtures

test-full: $(VENV)/.full lint     ## and the slow checks, and what is large to install
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

docs: $(VENV)/.docs                  ## the site, in site/; opens from disk, with its search
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(VENV)/.full             ## run docs/notebooks/, and store what they show
	$(BIN)/python docs/notebooks.py

picture: quickstart $(VENV)/.dev     ## the README's pictures and stored results, from the quickstart
	$(BIN)/python docs/picture.py
	for model in standard pgd-adversarial shared-adversarial; do \
	  mkdir -p results/quickstart/$$model; \
	  cp runs/quickstart/$$model-audit/result.json runs/quickstart/$$model-audit/run.yaml results/quickstart/$$model/; \
	done

tables: $(VENV)/.dev                 ## every table of README and docs, from the code and results/
	$(BIN)/python docs/tables.py

results-check: $(VENV)/.dev          ## results/ without contradictions, and a sample of it computed again, in minutes
	$(BIN)/python benchmarks/results_check.py

bundle: $(VENV)/.quickstart        ## all that a machine without network needs, in pieces under 60 MiB
	$(BIN)/python scripts/bundle.py pack

# A stamp a set of extras: made again only when pyproject.toml changes.
$(addprefix $(VENV)/.,quickstart dev full docs): $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(call install,$*)
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
