# make demo: build, install into .venv, and watch real page faults being served.
# make test: the same with the test extras, then the whole test suite.
# make lint: formatting, types, stubs, and a build without warnings. make clean: start over.
# make lab: build and boot kernels that speak v1 and v2, and run the suite in them (LAB_APT=1 installs what it needs).
# make sanitize: build with AddressSanitizer and UndefinedBehaviorSanitizer, and run the suite under them.
# make delays: the suite with threads that are late at random (DELAYS=3: after one call in three).
# make soak: everything at once on the real kernel, every byte checked (SOAK='--seconds 3600 --seed 7').
# make baseline: compare instruction counts with bench/baseline.json; make baseline-lab: those of the lab.

PYTHON ?= python3
CC ?= cc
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard pyx/*) $(shell find python -name '*.py' -o -name '*.pyi' -o -name '*.pxd')

SOAK ?= --seconds 300
DELAYS ?= 8
TESTS ?= tests

# Signals: the suite expects deaths by SIGBUS and SIGSEGV. Leaks: CPython leaves memory behind at its end. malloc: so
# that Python objects, which the engine lives in, are watched one by one. Reports go to files, as many tests run
# children and keep what those print.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED = LD_PRELOAD="$$asan" PYTHONPATH=$(CURDIR)/build/sanitize/lib PYTHONMALLOC=malloc \
	ASAN_OPTIONS=handle_segv=0:handle_sigbus=0:detect_leaks=0:log_path=$(CURDIR)/build/sanitize/report \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/sanitize/report
# Not tested: test_no_python reads the compiled code, and would find the sanitizers' calls; test_build makes
# distributions with flags of their own; test_bench_cli and test_lab_unit run nothing of what is compiled. The
# sanitizer's mlock does nothing, it ends where there is no mapping to be had, and it keeps what was freed in memory.
NOT_SANITIZED := no_python build bench_cli lab_unit

.PHONY: demo test lint lab sanitize delays soak baseline baseline-lab clean tools

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

sanitize: $(VENV)/test.stamp
	CFLAGS='$(SANITIZE) -Og -g' LDFLAGS='$(SANITIZE)' $(BIN)/python setup.py -q build \
		--build-temp build/sanitize/temp --build-lib build/sanitize/lib
	rm -f build/sanitize/report.*
	@asan=$$($(CC) -print-file-name=libasan.so); status=0; \
	test -e "$$asan" || { echo "make: libasan is missing: CC=gcc, apt-get install gcc" >&2; exit 1; }; \
	$(SANITIZED) $(BIN)/python -m pytest $(TESTS) -p no:cacheprovider $(NOT_SANITIZED:%=--ignore tests/test_%.py) \
		-k 'not locked and not out_of_mappings and not ten_times_larger and not memory_cgroup' \
		|| status=$$?; \
	! cat build/sanitize/report.* 2>/dev/null || status=1; exit $$status

# Not tested: what needs threads that are quick, and distributions.
delays: $(VENV)/test.stamp
	mkdir -p build
	$(CC) -O2 -Wall -Wextra -Werror -shared -fPIC -o build/delays.so tests/native/delays.c -ldl
	DELAYS=$(DELAYS) LD_PRELOAD=$(CURDIR)/build/delays.so $(BIN)/python -m pytest $(TESTS) -p no:cacheprovider \
		--benchmark-disable --ignore tests/test_build.py -k 'not a_pair_shares'

soak: $(VENV)/test.stamp
	$(BIN)/python tests/soak.py $(SOAK)

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
