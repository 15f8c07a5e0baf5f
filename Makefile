# make demo: build, install into .venv, and watch real page faults being served.
# make test: the same with the test extras, then the whole test suite.
# make lint: formatting, types, stubs, and a build without warnings. make clean: start over.
# make lab: build and boot kernels that speak v1 and v2, and run the suite in them (LAB_APT=1 installs what it needs).
# make baseline: compare instruction counts with bench/baseline.json; make baseline-lab: those of the lab.

PYTHON ?= python3
CC ?= cc
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard pyx/*) $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.pxd')

.PHONY: demo test lint lab baseline baseline-lab clean tools

demo: $(VENV)/demo.stamp
	$(BIN)/userfault demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest --benchmark-disable

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(BIN):$$PATH" cython-lint pyx python
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest userfault --mypy-config-file pyproject.toml \
		--ignore-disjoint-bases --allowlist tests/stubtest-allowlist.txt
	CFLAGS='-Wall -Wextra -Werror' $(BIN)/python setup.py -q build_ext --build-temp $(VENV)/warnings \
		--build-lib $(VENV)/warnings --force

lab: $(VENV)/test.stamp
	$(BIN)/python bench/lab/suite.py --out build/lab

baseline: $(VENV)/test.stamp
	$(BIN)/python bench/baseline.py --check

baseline-lab: $(VENV)/test.stamp
	$(BIN)/python bench/baseline.py --lab --check

clean:
	rm -rf $(VENV) build dist python/*.egg-info

# Each extra is installed once, and again when a source file changes.
$(VENV)/demo.stamp: $(SOURCES) | tools $(BIN)/python
	$(BIN)/pip install -q '.[cli]'
	touch $@

$(VENV)/%.stamp: $(SOURCES) | tools $(BIN)/python
	$(BIN)/pip install -q '.[$*]'
	touch $@

$(BIN)/python: | tools
	$(PYTHON) -m venv $(VENV)

tools:
	@missing() { echo "make: $$1 is missing: $$2" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || missing "Python 3.11 or later" "apt-get install python3"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| missing "Python 3.11 or later" "$(PYTHON) is $$($(PYTHON) -V); set PYTHON=…"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing venv "apt-get install python3-venv"; \
	command -v $(CC) >/dev/null || missing "a C compiler" "apt-get install gcc libc6-dev"; \
	printf '#include <stdlib.h>\nint main(void) { return 0; }\n' | $(CC) -x c -fsyntax-only - 2>/dev/null \
		|| missing "the C library's headers" "apt-get install libc6-dev"; \
	$(PYTHON) -c 'import os, sys, sysconfig; p = sysconfig.get_path("include"); \
		sys.exit(not os.path.exists(os.path.join(p, "Python.h")))' \
		|| missing "Python.h" "apt-get install python3-dev"
