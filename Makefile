# The front door. Needs Python 3.11 or later, make, a C++ compiler and a package index; it makes
# .venv itself, with uv and nox in it, and nox makes one environment per job and package.
SHELL := /bin/sh
PYTHON ?= python3
P ?=
FULL ?=
VENV := .venv
RUN := $(VENV)/bin/python .github/scripts/run.py
MADE := $(VENV)/.made

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench wheels gpu clean

help: ## list the commands
	@echo "usage: make COMMAND [P=package]"
	@echo
	@sed -n 's/[$$][$$]/$$/; s/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '  %-8s %s\n' $$name "$$text"; done
	@echo
	@echo "packages:" $(sort $(notdir $(patsubst %/,%,$(dir $(wildcard packages/*/pyproject.toml)))))

demo: $(MADE) ## run every package's demo, one table, out/demo/index.html  [P=package] [FULL=1]
	@$(RUN) demo $(P) $(if $(filter 1 yes true,$(FULL)),--full)

test: $(MADE) ## lint, types, every suite, both install forms  [P=package]
	@$(RUN) test $(P)

lint: $(MADE) ## format, lint, spelling, import contracts, workflows
	@$(RUN) lint

types: $(MADE) ## pyright  [P=package]
	@$(RUN) types $(P)

bench: $(MADE) ## a package's CPU benchmarks, JSON in out/bench/  P=package
	@$(RUN) bench $(P)

wheels: $(MADE) ## wheels of all packages in dist/  [P=package]
	@$(RUN) wheels $(P)

gpu: ## a package's GPU tests and benchmarks with python3 as it is, JSON in $$OUT or out/gpu/  P=package
	@$(PYTHON) .github/scripts/run.py gpu $(P)

clean: ## remove .venv, .nox, out, dist and caches
	@rm -rf .venv .nox out dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find packages .github -name __pycache__ -type d -prune -exec rm -rf {} +
	@find packages \( -name .pytest_cache -o -name .hypothesis \) -type d -prune -exec rm -rf {} +

$(MADE): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than 3.11; say which to use: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "making $(VENV) (once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv nox
	@touch $@
