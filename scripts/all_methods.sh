#!/usr/bin/env bash
# All methods of this repository in one table, from no paper: ResNet-20 with cross-entropy, with every method, and with
# every pair that combines (not two heads, dma and lsoftmax, and not two optimizers, amp and smoothout). The runs differ
# in the method alone.
#
# 1 + 5 + 8 = 14 runs for each seed, of 15 epochs of digits.
#
#   scripts/all_methods.sh [flags for every run]
#   DATASET=cifar10 EPOCHS=30 SEEDS=1 scripts/all_methods.sh --precision bf16
#
# From the environment: DATASET; METHODS, one or several, single (dma) or pairs (dma+amp); SEEDS; EPOCHS; OUT, the
# folder of the runs; PYTHON. More in run.sh.
DATASET=${DATASET:-digits} EPOCHS=${EPOCHS:-15}
OUT=${OUT:-checkpoints/all_methods/$DATASET-${EPOCHS}epochs}
METHODS=${METHODS:-none dma lsoftmax amp smoothout large_margin
    dma+amp dma+smoothout dma+large_margin lsoftmax+amp lsoftmax+smoothout lsoftmax+large_margin
    amp+large_margin smoothout+large_margin}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"

# Large Margin needs --clip-norm, so all runs have it: a baseline has the same flags as the run with the method.
recipe="--dataset $DATASET --arch resnet --depth 20 --epochs $EPOCHS --train-batch 64 --lr 0.1 --lr-schedule onecycle
        --momentum 0.9 --wd 5e-4 --clip-norm 5"

for seed in $SEEDS; do
    for methods in $METHODS; do
        flags=
        for method in ${methods//+/ }; do
            case $method in
                dma) flags="$flags --dma-coef 0.5" ;;
                lsoftmax) flags="$flags --margin 2 --beta-min 5" ;;
                amp) flags="$flags --epsilon 0.1" ;;
                smoothout) flags="$flags --ss 0.01" ;;
                large_margin) flags="$flags --large-margin-layers layer3 --large-margin-gamma 5 --large-margin-alpha 3
                                     --large-margin-coef 0.1 --cross-entropy-weight 1" ;;
            esac
        done
        [ "$methods" = none ] || flags="--method ${methods//+/ } $flags"
        run "$OUT/$methods/seed$seed" $recipe $flags --manualSeed "$seed" "$@"
    done
done
finish
