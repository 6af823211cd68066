#!/usr/bin/env bash
# LDAM-DRW (Cao et al., NeurIPS 2019, arXiv 1906.07413), its table of CIFAR-10 with a long tail and with steps:
# empirical risk minimization (ERM), LDAM, LDAM with deferred re-weighting (DRW); and logit adjustment (Menon et al.,
# arXiv 2007.07314) and L-Softmax. The recipe is the published code's: ResNet-32, batches of 128, a rate of 0.1 that
# climbs for 5 epochs and falls to 0.01 of itself after 160 epochs and again after 180, weight decay 0.0002; the class
# weights apply from epoch 160 on. Published for exp 0.01, top-1: ERM about 71%, LDAM-DRW about 77%.
#
# 4 imbalances x 5 = 20 runs for each seed, of 200 epochs.
#
#   scripts/ldam_cifar.sh [flags for every run]
#   BALANCE=exp-0.01 ROWS="erm ldam-drw" SEEDS=1 scripts/ldam_cifar.sh --precision bf16
#
# From the environment: DATASET; BALANCE, ROWS and SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON.
# More in run.sh. evaluate.py --logit-adjust 1 adjusts the logits of a finished ERM run post hoc.
DATASET=${DATASET:-cifar10} EPOCHS=${EPOCHS:-200}
OUT=${OUT:-checkpoints/ldam_cifar/$DATASET-${EPOCHS}epochs}
BALANCE=${BALANCE:-exp-0.01 exp-0.1 step-0.01 step-0.1}  # --imbalance and --imbalance-factor
ROWS=${ROWS:-erm ldam ldam-drw logit-adjustment lsoftmax}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"
only ROWS erm ldam ldam-drw logit-adjustment lsoftmax

recipe="--dataset $DATASET --arch resnet --depth 32 --epochs $EPOCHS --train-batch 128 --lr 0.1 --momentum 0.9 --wd 2e-4
        $(schedule 200 160 180) --gamma 0.01 --warmup $((5 * EPOCHS / 200))"

for seed in $SEEDS; do
    for balance in $BALANCE; do
        for row in $ROWS; do
            case $row in
                erm) flags= ;;
                ldam) flags="--method ldam --deferred 1" ;;
                ldam-drw) flags="--method ldam --deferred 0.8" ;;
                logit-adjustment) flags="--method logit_adjustment" ;;
                lsoftmax) flags="--method lsoftmax --margin 2 --beta-min 5" ;;
            esac
            run "$OUT/$balance-$row/seed$seed" $recipe --imbalance "${balance%%-*}" \
                --imbalance-factor "${balance#*-}" --manualSeed "$seed" $flags "$@"
        done
    done
done
finish --metric top1 balanced worst
