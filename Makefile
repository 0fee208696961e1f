# Every target sets itself up in .venv; nothing else is needed first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

RUN_STAMP := $(VENV)/.installed-test
DOCS_STAMP := $(VENV)/.installed-docs
DEV_STAMP := $(VENV)/.installed-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Data sets already on disk beside the checkout are used where they are.
ifeq ($(origin VARPROX_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export VARPROX_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: help demo test docs notebooks lint clean distclean FORCE

help:
	@echo "make demo       train on Indian Pines and write results/indian_pines"
	@echo "make test       run the tests"
	@echo "make docs       build the site into docs/_build/html"
	@echo "make notebooks  run the scripts in notebooks/ and write their .ipynb"
	@echo "make lint       ruff, mypy and the import rules"
	@echo "make clean      remove caches and built files"
	@echo "make distclean  the same, and .venv"
	@echo
	@echo "PYTHON=...        the Python (3.11 or newer) that .venv is made with; now $(PYTHON)"
	@echo "VARPROX_DATA=...  a folder that holds data sets; now $(or $(VARPROX_DATA),not set)"

demo: $(RUN_STAMP)
	@$(PY) -m benchmarks indian_pines --quick --output results/indian_pines

# Workers share the cores, and OpenBLAS's threads would take them up waiting for one another. The
# tests mostly compile, which takes half the time without XLA's fusion emitters, and a fifth less
# again in one piece; a JAX that does not know the flags would not start with them.
QUICK_TO_COMPILE := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1

test: $(RUN_STAMP)
	@if XLA_FLAGS="$(QUICK_TO_COMPILE)" $(PY) -c 'import jax; jax.devices()' >/dev/null 2>&1; \
	then export XLA_FLAGS="$$XLA_FLAGS $(QUICK_TO_COMPILE)"; fi; \
	OPENBLAS_NUM_THREADS=1 $(PY) -m pytest

docs: $(DOCS_STAMP)
	@$(PY) -m sphinx --fail-on-warning --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

# ONE=07_pinn runs only this one.
notebooks: $(DOCS_STAMP)
	@for script in notebooks/$(or $(ONE),*).py; do \
	  echo "$$script"; \
	  OPENBLAS_NUM_THREADS=1 $(PY) -m jupytext --quiet --to ipynb --execute "$$script" || exit 1; \
	done

lint: $(RUN_STAMP) $(DEV_STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy varprox
	@$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'

clean:
	rm -rf build dist docs/_build docs/notebooks .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# A stamp left in a .venv whose Python is gone says nothing: then install again,
# whatever the dates are.
NO_VENV := $(shell test -x $(PY) || echo FORCE)

$(RUN_STAMP): pyproject.toml $(NO_VENV)
	$(call install,test)

$(DOCS_STAMP): pyproject.toml $(RUN_STAMP)
	$(call install,docs)

$(DEV_STAMP): pyproject.toml $(RUN_STAMP)
	$(call install,dev)

FORCE:

define install
@set -e; \
if ! test -x $(PY); then \
  if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
    echo "varprox needs Python 3.11 or newer, and '$(PYTHON)' is not one. Install it" >&2; \
    echo "(Debian, Ubuntu: apt-get install python3 python3-venv) or say which: make PYTHON=python3.12 ..." >&2; \
    exit 1; \
  fi; \
  if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
    echo "'$(PYTHON)' cannot make a virtual environment: its venv and ensurepip modules are" >&2; \
    echo "packaged apart. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
    exit 1; \
  fi; \
  $(PYTHON) -m venv --clear $(VENV); \
fi; \
$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null; \
echo "Installing varprox [$(1)] into $(VENV) (a few minutes the first time)" >&2; \
$(PY) -m pip install -qq -e '.[$(1)]'; \
touch $@
endef
