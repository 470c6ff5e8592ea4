# Every target works from a clean clone with Python >= 3.10, pip and make.
PYTHON ?= python3

demo: .venv/ready  ## teacher, one-step student and RL on the built-in shapes, into runs/demo
	.venv/bin/python train_rl.py --preset tiny --out runs/demo --resume

test: .venv/ready  ## the test suite
	.venv/bin/python -m pytest -q

test-long: .venv/ready  ## what `make test` does only briefly: kills and broken files
	.venv/bin/python -m pytest -q -m long

lint: .venv/ready  ## style, as CI checks it
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

results: .venv/ready  ## assets/results.md and the README's table from assets/results/*.json
	.venv/bin/python -m workbench.studies

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e ".[test,notebook]"
	touch .venv/ready

.PHONY: demo test test-long lint results
