# PYTHON=python3.12 make ...   chooses the interpreter the environment is made with
BIN := .venv/bin

.PHONY: demo test lint gpu-test clean

demo:  ## start a cluster on this machine, ask it about pictures, show what was reused
	@scripts/setup_env.sh
	@$(BIN)/vlcache-dist demo

test:  ## all tests, two to four at a time; those that need a GPU are skipped without one
	@scripts/setup_env.sh test docs
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint:  ## style, types, import rules
	@scripts/setup_env.sh test docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-test:  ## only the tests that need a GPU
	@scripts/setup_env.sh test gpu
	@$(BIN)/python -m pytest -q -m gpu

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
