# make demo   edit a bundled scene with the bundled model
# make test   lint and the tests on small networks (minutes)
# make test-slow   the same proofs on full-size networks (tens of minutes, 16 GB of memory)
# make bench  times and memory against diffusers
# make mini   train the bundled models again, from nothing, into runs/mini (hours on a CPU)

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-slow bench mini

demo: .venv/installed
	$(RUN) examples/demo.py runs/demo.png
	@echo "runs/demo.png is there. Your own edit:"
	@echo '  $(RUN) sample.py --image examples/scene.png --instr "make it night"'

test: .venv/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m pytest

test-slow: .venv/installed-dev
	$(RUN) -m pytest -m slow

bench: .venv/installed-dev
	$(RUN) bench.py

# Every step goes on where it was stopped. models/mini/README.md says what each of them took and reached.
DEVICE ?= cpu
mini: .venv/installed
	$(RUN) pretrain.py all --out runs/mini --device $(DEVICE)
	$(RUN) pretrain.py filter --out runs/mini --device $(DEVICE)
	$(RUN) datagen.py text --count 5000 --out runs/mini/edits.jsonl
	$(RUN) datagen.py images --edits runs/mini/edits.jsonl --out runs/mini/pairs --weights runs/mini/sd_model \
		--clip runs/mini/clip_model --samples 3 --keep 2 --steps 12 --guidance 3 6 --device $(DEVICE)
	$(RUN) train.py --data runs/mini/pairs --init runs/mini/sd_model --out runs/mini/editor --preset mini --device $(DEVICE)

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
