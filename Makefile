# Recipes for people and for CI. `make check` wants `pip install '.[dev]'`.
.PHONY: check lint types test fresh bench

check: lint types test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest
	pytest -m slow

# The README's two commands in a fresh virtual environment, with the CPU build of torch where one is at hand.
fresh:
	python3 -m venv --clear .venv
	. .venv/bin/activate && pip install -q 'torch>=2.13,<2.14'
	. .venv/bin/activate && pip install . && causalrt demo
	. .venv/bin/activate && pip install '.[test]' && pytest
	. .venv/bin/activate && pytest -m slow
	. .venv/bin/activate && pip install -q '.[dev]' && $(MAKE) lint types

bench:  # engines of full size: see benchmarks/engine_build.py
	causalrt bench --executors eager,onnxruntime
	python benchmarks/precision.py

constraints:  # the versions that CI installs; torch brings its own CUDA libraries
	{ echo "# What CI installs, for Python 3.11: made by \`make constraints\`." && \
	  uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform linux --extra dev \
	    pyproject.toml | grep -Ev '^(nvidia|cuda)-'; } > .ci/constraints.txt
