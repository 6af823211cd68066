#!/usr/bin/env bash
# Large-Margin Softmax (Liu et al., ICML 2016, arXiv 1612.02295) on the long-tailed CIFAR-10 of LDAM-DRW (Cao et al.,
# NeurIPS 2019, arXiv 1906.07413; its table of imbalanced CIFAR): is a margin worth more if some classes have few
# images? Neither paper has these runs; the first has balanced CIFAR-10. result.json also has the accuracy of every
# class.
#
# 4 training sets x 2 networks x (cross-entropy and 1 margin) = 16 runs for each seed, of 200 epochs.
#
#   scripts/lsoftmax_imbalanced.sh [flags for every run]
#   MARGINS="2 4" ARCHS=resnet18 SEEDS=1 scripts/lsoftmax_imbalanced.sh --precision bf16
#
# From the environment: DATASET; ARCHS, MARGINS, BALANCE and SEEDS, one or several; EPOCHS; OUT, the folder of the runs;
# PYTHON. More in run.sh.
DATASET=${DATASET:-cifar10} EPOCHS=${EPOCHS:-200}
OUT=${OUT:-checkpoints/lsoftmax_imbalanced/$DATASET-${EPOCHS}epochs}
ARCHS=${ARCHS:-resnet18 vgg16_bn}
MARGINS=${MARGINS:-4}
BALANCE=${BALANCE:-balanced exp-0.1 exp-0.01 step-0.1}  # --imbalance and --imbalance-factor
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"

recipe="--dataset $DATASET --epochs $EPOCHS --train-batch 128 --lr 0.1 --lr-schedule cosine --momentum 0.9 --wd 5e-4"
# Beta stops at 5, where the margin has a weight of 1/6 in the target's logit: the authors advise 5 to 10 for hard data.
lsoftmax="--method lsoftmax --beta-min 5"

for seed in $SEEDS; do
    for arch in $ARCHS; do
        for balance in $BALANCE; do
            case $balance in
                balanced) flags= ;;
                *) flags="--imbalance ${balance%%-*} --imbalance-factor ${balance#*-}" ;;
            esac
            flags="$recipe --arch $arch $flags --manualSeed $seed"
            run "$OUT/$arch-$balance-crossentropy/seed$seed" $flags "$@"
            for margin in $MARGINS; do
                run "$OUT/$arch-$balance-lsoftmax$margin/seed$seed" $flags $lsoftmax --margin "$margin" "$@"
            done
        done
    done
done
finish
