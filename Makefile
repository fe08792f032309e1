# Every target works on a fresh clone: it makes or completes .venv first (scripts/setup_venv.sh) and finds it ready after that.

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean venv venv-dev horovod

PY := .venv/bin/python
export PYTHON TORCH_INDEX_URL

help:
	@echo 'Targets:'
	@echo '  make demo    draw the scenes dataset, train with and without IAIS, evaluate both; writes under demo/'
	@echo '  make test    run the tests'
	@echo '  make lint    check style, formatting and types'
	@echo '  make bench   speed beside a straightforward implementation and the machine'"'"'s peak, UNITER-base; takes 10 to 20 minutes'
	@echo '  make clean   remove demo/ and the caches; .venv stays'
	@echo '  make horovod build horovod for the torch in .venv, for horovodrun; takes minutes once, a C++ compiler and make'
	@echo '  make venv    set up .venv for running; make venv-dev adds what testing and linting need'
	@echo 'Variables (make demo SEED=1, make test ARGS="-k iais"):'
	@echo '  SEED=<n>              random seed of the demo'
	@echo '  ARGS="..."            further options for scripts/demo.py, pytest or benchmarks/run.py'
	@echo '  GOLDEN_DIR=<folder>   golden numbers that the tests compare with, instead of tests/golden'
	@echo '  PYTHON=<interpreter>  Python that .venv is made with; otherwise the first that works of'
	@echo '                        python3.12 python3.11 python3.10 python3 (tested: 3.10 to 3.12; newer ones are allowed)'
	@echo '  TORCH_INDEX_URL=<url> package index that torch comes from when it is installed. On Linux, PyPI has only the CUDA'
	@echo '                        build (gigabytes); https://download.pytorch.org/whl/cpu has the small one for machines'
	@echo '                        without a GPU. pip reads PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and its other settings as usual.'

demo: venv
	$(PY) scripts/demo.py $(if $(SEED),--seed $(SEED)) $(ARGS)

# Without a compiler (exit code 3) the tests that need horovod are skipped.
test: venv-dev
	@bash scripts/install_horovod.sh $(PY) || [ $$? -eq 3 ]
	$(PY) -m pytest $(ARGS)

bench: venv
	$(PY) benchmarks/run.py $(ARGS)

lint: venv-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -type d \( -name .venv -o -name .git \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

horovod: venv
	@bash scripts/install_horovod.sh $(PY)

venv:
	@bash scripts/setup_venv.sh run

venv-dev:
	@bash scripts/setup_venv.sh dev
