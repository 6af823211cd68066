# make demo   train ResNet-20 with DMA on the bundled digits, about two minutes on two cores
# make test   the test suite
# make results   the tables and pictures of docs/, from the runs in results/
# make figures   the small figures of README's methods, from the measurements in results/figures/
# make scripts-check   every run of scripts/ for one epoch of digits, half an hour or more on two cores
# All set up .venv first; PYTHON=python3.12 picks another interpreter for it.
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/python cifar.py --dataset digits --arch resnet --depth 20 --method dma --coef 0.5 \
		--epochs 15 --lr-schedule onecycle --train-batch 64 --manualSeed 1 --checkpoint checkpoints/demo --overwrite

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist loadfile tests

results: .venv/installed
	.venv/bin/python scripts/results.py docs/results.md docs/tables.md docs/mechanisms.md

figures: .venv/installed
	mkdir -p docs/figures
	.venv/bin/python scripts/figures.py

# The largest networks see the fewest images; lsoftmax_imbalanced.sh and smoothout_large_batch.sh need enough for a batch.
scripts-check: .venv/installed
	rm -rf checkpoints/scripts-check
	$(call check,all_methods,--train-fraction 0.1)
	$(call check,large_margin_mnist)
	$(call check,lsoftmax_imbalanced,--train-fraction 0.5)
	$(call check,smoothout_large_batch)
	$(call check,dma_cifar,--train-fraction 0.1)
	$(call check,amp_cifar,--train-fraction 0.05)
	$(call check,search,--train-fraction 0.5)
	$(call check,amp_table1,--train-fraction 0.1)
	$(call check,ldam_cifar)
	$(call check,large_margin_authors)

check = @start=$$(date +%s) && PYTHON=.venv/bin/python OUT=checkpoints/scripts-check/$(1) DATASET=digits EPOCHS=1 SEEDS=1 \
	scripts/$(1).sh --precision bf16 $(2) && echo "$(1).sh: $$(($$(date +%s) - start)) seconds"

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.PHONY: demo test results figures scripts-check
