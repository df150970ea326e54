# Two commands: make run, make test. Each builds .venv by itself when it is missing or its lock has changed.
#   make run ARGS="quant=kv4 dist=tp2pp2"     any options of run.py
#   make run PYTHON=python3.12                another Python to build .venv with (3.11 or 3.12)

# The first that SGLang's pins can be installed for; the one .venv was built with if there is one.
PYTHON ?= $(or $(shell for python in .venv/bin/python python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$python && break; done),python3)
ARGS ?=

.PHONY: run test test-slow test-gpu lint setup clean
.DEFAULT_GOAL := run

run: setup
	@.venv/bin/python run.py $(ARGS)

# First what can share the machine, two tests at a time; then what serves or waits for processes, one by one.
# pytest's exit code 5 says that ARGS chose no test of a part; that neither has one is an error.
test: setup
	.venv/bin/ruff check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow and not alone" $(ARGS); \
	shared=$$?; test $$shared = 0 || test $$shared = 5 || exit $$shared; \
	.venv/bin/python -m pytest -m "not gpu and not slow and alone" $(ARGS); \
	alone=$$?; test $$alone = 5 && test $$shared = 0 || exit $$alone

test-slow: setup
	.venv/bin/python -m pytest -m "not gpu and slow" $(ARGS)

# On a machine with an NVIDIA GPU; elsewhere each says why it is skipped.
test-gpu: setup
	.venv/bin/python -m pytest -m "gpu and not slow" $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

setup:
	@$(PYTHON) requirements/setup_venv.py

clean:
	rm -rf .venv .venv.lock build dist
