#!/usr/bin/env bash
# Large Margin Deep Networks (Elsayed et al., NeurIPS 2018, arXiv 1803.05598) as in the authors' released configuration
# for MNIST, beside cross-entropy with the same optimizer: the margin alone, in the maximum norm, at the input and both
# convolutions, each layer weighed by its number of elements, gamma 10000, alpha 4; RMSProp without momentum, epsilon
# 0.01, a rate of 0.1 that falls by 0.96 about every 2000 steps, L2 0.0005, the gradient clipped at 5, batches of 256.
# Their network has 32 and 64 channels, BatchNorm and 512 hidden units; this LeNet has 20 and 50, none, and 500, and
# without BatchNorm the rate is too high for it: in 6 epochs of 9000 images of Fashion-MNIST neither loss began to
# learn. large_margin_mnist.sh has a rate at which they do.
#
# 2 losses = 2 runs for each seed, of 200 epochs.
#
#   scripts/large_margin_authors.sh [flags for every run]
#   DATASET=digits EPOCHS=20 SEEDS=1 scripts/large_margin_authors.sh
#
# From the environment: DATASET; SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON. More in run.sh.
DATASET=${DATASET:-mnist} EPOCHS=${EPOCHS:-200}
OUT=${OUT:-checkpoints/large_margin_authors/$DATASET-${EPOCHS}epochs}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"

recipe="--dataset $DATASET --arch lenet --epochs $EPOCHS --train-batch 256 --no-augment --clip-norm 5
        --optimizer RMSprop --optimizer-eps 0.01 --momentum 0 --wd 5e-4 --lr 0.1 --gamma 0.96 --lr-step-size 9"

for seed in $SEEDS; do
    run "$OUT/crossentropy/seed$seed" $recipe --manualSeed "$seed" "$@"
    run "$OUT/margin/seed$seed" $recipe --manualSeed "$seed" --method large_margin --norm inf \
        --large-margin-layers input layer1 layer2 --layer-weights elements "$@"
done
finish
