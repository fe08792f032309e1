# Every target works on a fresh clone: it creates or updates .venv first (scripts/setup_venv.sh).

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint bench clean venv venv-dev horovod horovod-for-tests

PY := .venv/bin/python
export PYTHON TORCH_INDEX_URL

help:
	@echo 'Targets:'
	@echo '  make demo       draw the scenes dataset, train with and without IAIS, evaluate both; writes to demo/'
	@echo '  make test       run the tests'
	@echo '  make test-long  run the long test campaigns (pytest marker "long") that "make test" leaves out'
	@echo '  make lint       check style, formatting and types'
	@echo '  make bench      compare the speed of UNITER-base with a plain implementation and the peak of the machine; 10 to 20 minutes'
	@echo '  make clean      remove demo/ and the caches; keeps .venv'
	@echo '  make horovod    build horovod for the torch in .venv; requires a C++ compiler and make, takes minutes the first time'
	@echo '  make venv       set up .venv for running; make venv-dev adds what tests and linters need'
	@echo 'Variables (make demo SEED=1, make test ARGS="-k iais"):'
	@echo '  SEED=<n>               random seed of the demo'
	@echo '  ARGS="..."             further options for scripts/demo.py, pytest or benchmarks/run.py'
	@echo '  GOLDEN_DIR=<folder>    golden numbers to test against, instead of tests/golden'
	@echo '  PYTHON=<interpreter>   Python to make .venv with; default: the first of python3.12 python3.11 python3.10 python3'
	@echo '                         that works (tested with 3.10 to 3.12; newer ones are allowed)'
	@echo '  TORCH_INDEX_URL=<url>  package index to install torch from. On Linux, PyPI has only the CUDA build (gigabytes);'
	@echo '                         https://download.pytorch.org/whl/cpu has the small build for machines without a GPU.'
	@echo 'pip reads PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and its other settings as usual.'

demo: venv
	$(PY) scripts/demo.py $(if $(SEED),--seed $(SEED)) $(ARGS)

test: horovod-for-tests
	$(PY) -m pytest $(ARGS)

test-long: horovod-for-tests
	$(PY) -m pytest -m long tests $(ARGS)

# Without a compiler (exit code 3) the tests that need horovod are skipped.
horovod-for-tests: venv-dev
	@bash scripts/install_horovod.sh $(PY) || [ $$? -eq 3 ]

bench: venv
	$(PY) benchmarks/run.py $(ARGS)

lint: venv-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
	find . -type d \( -name .venv -o -name .git \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

horovod: venv
	@bash scripts/install_horovod.sh $(PY)

venv:
	@bash scripts/setup_venv.sh run

venv-dev:
	@bash scripts/setup_venv.sh dev
