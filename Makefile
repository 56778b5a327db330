# make demo   a night in small, from nothing: set up, prepare, measure, run 4 experiments, draw; more options of the loop: OPTIONS=...
# make test   lint, types and the test suite, as CI runs them
# make test-torch   the PyTorch file, which needs a large download; test-slow, test-gpu, test-agents, test-browser: what CI leaves out
# make pin    after changing a train file or program.md by hand: copy it to where the tests of its text look
# All set up .venv first: with uv where it is installed, else with python3 -m venv and pip.

SHELL := /bin/bash
PY := .venv/bin/python
ENV := env -u AUTORESEARCH_DATA -u AUTORESEARCH_RUN_DIR -u AUTORESEARCH_BUDGET -u AUTORESEARCH_SEED -u AUTORESEARCH_SCORE -u AUTORESEARCH_TIER
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow test-gpu test-agents test-browser test-torch lint pin clean

demo: .venv/.ready  # one thread a training: for matrices this small more threads wait for each other, above all on a busy machine
	@tag=demo-$$(date +%m%d-%H%M%S); set -e; export $(ONE_THREAD); \
	$(ENV) $(PY) -m agent.loop --agent search --dataset stories --preset demo --baseline-seeds 3 --experiments 4 --tag $$tag $(OPTIONS); \
	echo; $(ENV) $(PY) scripts/sample.py --compare --tag $$tag --tokens 60; \
	printf '\nNext:\n    source .venv/bin/activate\n    %s\n    %s\n    %s\n' \
	    'python -m agent.doctor                    # is a coding agent there, is this machine ready?' \
	    'python -m agent.loop --agent claude       # a real night; or another agent, or --agent search' \
	    "python -m agent.loop --forget $$tag   # remove this demo"

test: lint  # one process more than cores, because tests wait a fifth of their time; so one thread in each
	$(ENV) MPLBACKEND=Agg $(ONE_THREAD) $(PY) -m pytest -q -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

lint: .venv/.dev
	$(PY) -m ruff check -q .
	$(PY) -m mypy

test-slow test-gpu test-browser: test-%: .venv/.dev
	$(PY) -m pytest -q -m $*

test-agents: .venv/.dev  # a process for each command line: they mostly wait
	$(PY) -m pytest -q -m agents -n 4 --dist loadgroup tests/coders

test-torch: .venv/.dev
	$(PY) -c "import torch" 2>/dev/null || scripts/setup.sh torch
	$(PY) -m pytest -q tests/train/test_torch.py

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

.venv/.dev: .venv/.ready
	@scripts/setup.sh dev
	@touch $@

pin:
	cp train_mlx.py train_torch.py program.md tests/pinned/

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
