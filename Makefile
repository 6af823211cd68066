# make demo   train ResNet-20 with DMA on the bundled digits, about two minutes on two cores
# make test   the test suite
# Both set up .venv first; PYTHON=python3.12 picks another interpreter for it.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python cifar.py --dataset digits --arch resnet --depth 20 --method dma --coef 0.5 \
		--epochs 15 --lr-schedule onecycle --train-batch 64 --manualSeed 1 --checkpoint checkpoints/demo --overwrite

test: .venv/installed
	.venv/bin/python -m pytest -q tests

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: demo test
