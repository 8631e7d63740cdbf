# Recipes for people and for CI. `make check` wants `pip install '.[dev]'`.
.PHONY: check lint types test fresh lowest bench constraints

COMPILE = --quiet --no-header --no-annotate
LOWEST_TESTS = tests/unit/engines tests/unit/export tests/unit/model tests/unit/runtime tests/numerics/test_golden.py

check: lint types test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest
	pytest -m slow

# Lint and types, which fail soonest; then the README's two commands, and its command for the tests, in a fresh virtual
# environment, with the CPU build of torch where that is at hand.
fresh:
	python3 -m venv --clear .venv
	. .venv/bin/activate && pip install -q 'torch>=2.13,<2.14' && pip install -q '.[dev]' && $(MAKE) lint types
	python3 -m venv --clear .venv
	. .venv/bin/activate && pip install -q 'torch>=2.13,<2.14'
	. .venv/bin/activate && pip install . && causalrt demo
	. .venv/bin/activate && pip install '.[test]' && pytest

# The lowest versions of what pyproject.toml names, in an environment of their own. `fresh` comes first: it brings uv.
lowest:
	python3 -m venv --clear .lowest
	.venv/bin/uv pip compile $(COMPILE) --resolution lowest-direct --python .lowest/bin/python --extra test pyproject.toml \
	    > .lowest/constraints.txt
	. .lowest/bin/activate && export PIP_CONSTRAINT=$$PWD/.lowest/constraints.txt && \
	    pip install -q 'torch>=2.13,<2.14' && pip install -q '.[test]'
	. .lowest/bin/activate && causalrt demo --out .lowest/demo
	. .lowest/bin/activate && pytest $(LOWEST_TESTS)

bench:  # engines of full size: see benchmarks/engine_build.py
	causalrt bench --executors eager,onnxruntime
	PYTHONPATH=tests python benchmarks/precision.py

constraints:  # what CI installs; the libraries of CUDA are left to torch, of which CI takes the CPU build
	uv pip compile $(COMPILE) --python-version 3.11 --python-platform linux --extra dev pyproject.toml > .ci/constraints.txt
	sed -Ei '/^(nvidia|cuda)-/d' .ci/constraints.txt
