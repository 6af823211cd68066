#!/usr/bin/env bash
# Large Margin Deep Networks (Elsayed et al., NeurIPS 2018, arXiv 1803.05598), its experiments on MNIST with few
# examples and with noisy labels: cross-entropy; the margin at the input and two hidden layers instead; and
# cross-entropy together with a little of the margin. RMSProp without momentum and the gradient clipped at 5 come from
# the authors' code; its learning rate of 0.1 is for another epsilon. With 0.001, or with momentum, the margin alone did
# not begin to learn the data set digits in 5 epochs; with 0.0003 it does.
#
# 8 training sets x 3 losses = 24 runs for each seed, of 50 epochs.
#
#   scripts/large_margin_mnist.sh [flags for every run]
#   DATASET=digits TRAINING="fraction0.1 noise0.4" SEEDS=1 scripts/large_margin_mnist.sh
#
# From the environment: DATASET; TRAINING and SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON.
# More in run.sh.
DATASET=${DATASET:-mnist} EPOCHS=${EPOCHS:-50}
OUT=${OUT:-checkpoints/large_margin_mnist/$DATASET-${EPOCHS}epochs}
TRAINING=${TRAINING:-fraction1 fraction0.1 fraction0.01 fraction0.00125 noise0.2 noise0.4 noise0.6 noise0.8}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"

recipe="--dataset $DATASET --arch lenet --epochs $EPOCHS --optimizer RMSprop --lr 0.0003 --lr-schedule cosine
        --momentum 0 --wd 5e-4 --clip-norm 5"
margin="--method large_margin --large-margin-layers input layer1 layer2"

for seed in $SEEDS; do
    for training in $TRAINING; do
        case $training in
            # 0.00125 is 75 images of MNIST, or 10 of digits, one of each class.
            fraction0.0*) flags="--train-fraction ${training#fraction} --train-batch 10" ;;
            noise*) flags="--label-noise ${training#noise} --train-batch 64" ;;
            *) flags="--train-fraction ${training#fraction} --train-batch 64" ;;
        esac
        flags="$recipe $flags --manualSeed $seed"
        run "$OUT/$training-crossentropy/seed$seed" $flags "$@"
        run "$OUT/$training-margin/seed$seed" $flags $margin "$@"
        run "$OUT/$training-both/seed$seed" $flags $margin --large-margin-coef 0.1 --cross-entropy-weight 1 "$@"
    done
done
finish
