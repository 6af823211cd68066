#!/usr/bin/env bash
# Adversarial Model Perturbation (Zheng, Zhang and Mao, CVPR 2021, arXiv 2010.04925), its table 1: empirical risk
# minimization (ERM), dropout, label smoothing, flooding, mixup, adversarial training, random perturbation of the
# weights (RMP) and AMP, with the recipe of the published code. How strong each rival was is not in that code; the
# values below are usual ones, to be searched on a --val-split before a claim is made. For a comparison with ERM:
# python compare.py OUT/cifar10-preactresnet18-* --baseline '(none)'
#
# 3 data sets x 2 networks x 8 = 48 runs for each seed, of 200 epochs; a step of AMP and of adversarial training costs
# two of ERM.
#
#   scripts/amp_table1.sh [flags for every run]
#   DATASET=cifar10 ARCHS=preactresnet18 ROWS="erm amp" SEEDS=1 scripts/amp_table1.sh --precision bf16
#
# From the environment: DATASET, ARCHS, ROWS and SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON.
# More in run.sh.
data=${DATASET:-all} EPOCHS=${EPOCHS:-200}
OUT=${OUT:-checkpoints/amp_table1/${data// /-}-${EPOCHS}epochs}
DATASET=${DATASET:-svhn cifar10 cifar100}
ARCHS=${ARCHS:-preactresnet18 vgg16_bn}
ROWS=${ROWS:-erm dropout smoothing flooding mixup adversarial rmp amp}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"
only ROWS erm dropout smoothing flooding mixup adversarial rmp amp

# The learning rate falls after 1/2 and 3/4 of the epochs, the default of cifar.py without --schedule.
recipe="--epochs $EPOCHS --train-batch 50 --lr 0.1 --gamma 0.1 --momentum 0.9 --nesterov --wd 1e-4 --clip-norm 50"

for seed in $SEEDS; do
    for dataset in $DATASET; do
        for arch in $ARCHS; do
            for row in $ROWS; do
                case $row in
                    erm) flags= ;;
                    dropout) flags="--dropout 0.1" ;;
                    smoothing) flags="--label-smoothing 0.1" ;;
                    flooding) flags="--flood 0.02" ;;
                    mixup) flags="--mixup 1" ;;
                    adversarial) flags="--adversarial 1/255" ;;
                    rmp) flags="--method smoothout --noise-type normal --ss 0.005" ;;
                    amp) flags="--method amp --epsilon 0.5 --inner-lr 1 --inner-iter 1" ;;
                esac
                run "$OUT/$dataset-$arch-$row/seed$seed" --dataset "$dataset" --arch "$arch" $recipe \
                    --manualSeed "$seed" $flags "$@"
            done
        done
    done
done
finish --metric top1 loss --error
