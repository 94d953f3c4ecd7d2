# Each target sets up what it needs: .venv is made on first use and left alone afterwards.
PYTHON ?= python3
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NOT_LOCKED := ^(nvidia-|cuda-|triton==)

.DEFAULT_GOAL := help
.PHONY: help reproduce test lab lint figures zoo bench bench-training lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

reproduce: $(INSTALLED)  ## run every notebook; other settings: make reproduce ARGS="--profile desk --data DIR"
	@$(BIN)/ibau reproduce $(ARGS)

test: lint  ## check the code, then run the unit tests and every notebook
	@rm -rf runs/test
	IBAU_RUNS="$(CURDIR)/runs/test" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
		-n $(JOBS) --dist loadscope --nbval-lax tests notebooks $(ARGS)

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

lint: $(INSTALLED)  ## check style, format and which folder imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(BIN)/lint-imports --no-cache --no-logo

figures: $(INSTALLED)  ## redraw figures/ and the README's results from figures/data
	@$(BIN)/python -m ibau.report.figures

zoo: $(INSTALLED)  ## write zoo/, the poisoned models behind the tables, from runs/models
	@$(BIN)/python -m ibau.study.zoo

bench: $(INSTALLED)  ## time I-BAU beside the textbook's hypergradient, into figures/data
	@$(BIN)/python -m benchmarks.speed $(ARGS)

bench-training: $(INSTALLED)  ## time a training epoch, variant by variant, into figures/data
	@$(BIN)/python -m benchmarks.training

# torch itself pins the CUDA packages it needs, and other platforms lack them: they stay out of the lock.
# Python 3.11 needs all that newer ones need and a little more.
lock: $(INSTALLED)  ## write constraints.txt from what is installed in .venv (Python 3.11)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "make lock needs a .venv of Python 3.11")'
	@{ echo "# Exact versions for Python 3.11 to 3.13, written by 'make lock'."; \
	  $(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip \
	  | grep -Ev '$(NOT_LOCKED)' | sed 's/+.*//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@touch $(INSTALLED)

clean:  ## remove .venv, caches and the tests' runs; keep the results in runs/
	rm -rf $(VENV) runs/test .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find ibau benchmarks tests notebooks -name __pycache__ -prune -exec rm -rf {} +

# A kept .venv is judged by its own Python, a missing one by $(PYTHON). An interrupted call goes on from here.
$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo "$(PYTHON)"); \
	$$python -c pass 2>/dev/null || { \
	  echo "$$python cannot be run; name another: make PYTHON=python3.12" >&2; exit 1; }; \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, but $$python is $$($$python -V 2>&1); remove any old $(VENV)" \
	       "and name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; some minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
