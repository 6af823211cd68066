#!/usr/bin/env bash
# Adversarial Model Perturbation (Zheng, Zhang and Mao, CVPR 2021, arXiv 2010.04925), its tables of SVHN, CIFAR-10 and
# CIFAR-100: empirical risk minimization (ERM) and AMP, with the recipe and the epsilon of the published code, on SVHN
# too. Differences: the VGG16 of that code has two more hidden layers of 4096 units than vgg16_bn; it pads SVHN by 2
# pixels, not by 4; and with AutoAugment it also erases squares as Cutout does, but `autoaugment` below does not.
#
# 3 data sets x 4 networks x 3 augmentations x 2 = 72 runs for each seed, of 200 epochs; a step of AMP costs two of ERM.
#
#   scripts/amp_cifar.sh [flags for every run]
#   DATASET=cifar10 ARCHS=preactresnet18 AUGMENT=plain SEEDS=1 scripts/amp_cifar.sh --precision bf16
#
# From the environment: DATASET, ARCHS, AUGMENT and SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON.
# More in run.sh.
data=${DATASET:-all} EPOCHS=${EPOCHS:-200}
OUT=${OUT:-checkpoints/amp_cifar/${data// /-}-${EPOCHS}epochs}
DATASET=${DATASET:-svhn cifar10 cifar100}
ARCHS=${ARCHS:-preactresnet18 vgg16_bn wrn pyramidnet}
AUGMENT=${AUGMENT:-plain cutout autoaugment}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"
only AUGMENT plain cutout autoaugment

# The learning rate falls after 1/2 and 3/4 of the epochs, the default of cifar.py without --schedule.
recipe="--epochs $EPOCHS --train-batch 50 --lr 0.1 --gamma 0.1 --momentum 0.9 --nesterov --wd 1e-4 --clip-norm 50"
amp="--method amp --epsilon 0.5 --inner-lr 1 --inner-iter 1"

for seed in $SEEDS; do
    for dataset in $DATASET; do
        case $dataset in
            svhn) square=20 ;;
            cifar100) square=8 ;;
            *) square=16 ;;
        esac
        for arch in $ARCHS; do
            case $arch in
                wrn) network="--arch wrn --depth 28 --widen-factor 10" ;;
                pyramidnet) network="--arch pyramidnet --depth 164 --block-name Bottleneck --alpha 270" ;;
                *) network="--arch $arch" ;;
            esac
            for augment in $AUGMENT; do
                case $augment in
                    plain) flags= ;;
                    cutout) flags="--cutout $square" ;;
                    autoaugment) flags=--autoaugment ;;
                esac
                flags="--dataset $dataset $network $recipe $flags --manualSeed $seed"
                run "$OUT/$dataset-$arch-$augment-erm/seed$seed" $flags "$@"
                run "$OUT/$dataset-$arch-$augment-amp/seed$seed" $flags $amp "$@"
            done
        done
    done
done
finish
