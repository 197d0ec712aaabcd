# make demo   edit a bundled scene with the bundled model
# make test   lint and the tests on small networks (minutes)
# make test-slow   the same proofs on full-size networks (minutes, 16 GB of memory, two processes)
# make bench  times and memory against diffusers
# make gpu    tests, times and memory on a GPU (9 minutes), into runs/gpu
# make mini   train the bundled models again, from nothing, into runs/mini (hours on a CPU)

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test test-slow bench gpu mini

demo: .venv/installed
	$(RUN) examples/demo.py
	@echo "runs/demo.png is there: a scene and seven edits of it. An edit of your own:"
	@echo '  $(RUN) sample.py --image examples/scene.png --instr "make it night" --weights mini'
	@echo "For edits of photographs, with the public weights (about 4 GB, fetched once):"
	@echo '  $(RUN) sample.py --image x.png --instr "make it night"'

test: .venv/installed-dev
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile

test-slow: .venv/installed-dev
	$(RUN) -m pytest -m slow --numprocesses 2 --dist loadfile

bench: .venv/installed-dev
	$(RUN) -m bench

gpu: .venv/installed-dev
	$(RUN) -m bench.gpu

# Every step resumes where it was stopped. models/mini/README.md says what each of them took and reached.
DEVICE ?= cpu
PROCESSES ?= $(if $(filter cpu,$(DEVICE)),2,1)
TORCHRUN = $(RUN) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES)
HERE = runs/mini
PAIRS = --edits $(HERE)/edits.jsonl --weights $(HERE)/sd_model --clip $(HERE)/clip_model --steps 12 --guidance 2 4 \
	--dtype bfloat16 --device $(DEVICE)
mini: .venv/installed
	$(TORCHRUN) -m mini.pretrain all --out $(HERE) --device $(DEVICE)
	$(RUN) -m mini.datagen text --count 7000 --out $(HERE)/edits.jsonl
	$(RUN) datagen.py calibrate $(PAIRS) --count 128 --fractions 0.1 0.05 0.1
	$(RUN) datagen.py images $(PAIRS) --samples 2 --keep 2 --batch-size 16 --out $(HERE)/pairs
	$(TORCHRUN) train.py --preset mini --resume --data $(HERE)/pairs --init $(HERE)/sd_model --out $(HERE)/editor \
		--device $(DEVICE) --total-batch-size 32 --batch-size 16 --sampling-steps 20 --cfg-text 2 --cfg-image 1.5
	$(RUN) evaluate.py pairs --sd $(HERE)/sd_model --judge $(HERE)/judge.safetensors --clip $(HERE)/clip_model --steps 12 \
		--device $(DEVICE) --out $(HERE)/evaluate
	$(RUN) evaluate.py world --model $(HERE)/editor/model --judge $(HERE)/judge.safetensors --clip $(HERE)/clip_model \
		--device $(DEVICE) --out $(HERE)/evaluate

.venv/installed: requirements.txt
	@echo "making .venv and installing the run-time packages (once)"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-dev-no-deps.txt requirements-parquet.txt
	@echo "installing the packages for tests (once)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev-no-deps.txt
	@touch $@
