# make demo   edit a bundled example
# make test   lint and the tests on small networks (minutes)
# make test-slow   the same proofs on full-size networks (tens of minutes, 16 GB of memory)
# make bench  times and memory against diffusers

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-slow bench

demo: .venv/installed
	@rm -rf runs/random_model && $(RUN) examples/random_model.py runs/random_model
	$(RUN) sample.py --image examples/scene.png --instr "make it night" --weights runs/random_model --out runs/demo.png
	@echo "runs/demo.png was made by RANDOM weights: it shows that everything runs, not what the method can do."
	@echo "For real edits, with the public weights (about 4 GB, fetched once):"
	@echo '  $(RUN) sample.py --image examples/scene.png --instr "make it night" --weights timbrooks/instruct-pix2pix'

test: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m pytest

test-slow: .venv/installed-dev
	$(RUN) -m pytest -m slow

bench: .venv/installed-dev
	$(RUN) bench.py

.venv/installed: requirements.txt
	@echo "making .venv and installing the run-time packages (once)"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-dev-no-deps.txt
	@echo "installing the packages for tests (once)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev-no-deps.txt
	@touch $@
