#!/usr/bin/env bash
# DMA Regularization (Wang et al., IEEE Signal Processing Letters 2020), its tables of CIFAR-10 and CIFAR-100: each
# network with cross-entropy alone and together with DMA. The recipes, also in TRAINING.md, come from
# bearpaw/pytorch-classification.
#
# 6 networks x 2 data sets x 2 = 24 runs for each seed, of 164 to 300 epochs.
#
#   scripts/dma_cifar.sh [flags for every run]
#   DATASET=cifar100 ARCHS="wrn densenet" SEEDS=1 scripts/dma_cifar.sh --precision bf16
#
# From the environment: DATASET, ARCHS and SEEDS, one or several; EPOCHS, instead of the recipe's, which also moves the
# milestones; OUT, the folder of the runs; PYTHON. More in run.sh.
data=${DATASET:-all}
OUT=${OUT:-checkpoints/dma_cifar/${data// /-}-${EPOCHS:-164to300}epochs}
DATASET=${DATASET:-cifar10 cifar100}
ARCHS=${ARCHS:-resnet preresnet resnext wrn densenet vgg19_bn}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"
only ARCHS resnet preresnet resnext wrn densenet vgg19_bn

for seed in $SEEDS; do
    for dataset in $DATASET; do
        for arch in $ARCHS; do
            case $arch in
                resnet) epochs=164 milestones="81 122" flags="--depth 110 --train-batch 128 --wd 1e-4 --warmup 1" ;;
                preresnet) epochs=164 milestones="81 122" flags="--depth 110 --train-batch 128 --wd 1e-4" ;;
                resnext) epochs=300 milestones="150 225"
                    flags="--depth 29 --cardinality 8 --widen-factor 4 --train-batch 128 --wd 5e-4" ;;
                wrn) epochs=200 milestones="60 120 160"
                    flags="--depth 28 --widen-factor 10 --drop 0.3 --train-batch 128 --wd 5e-4 --gamma 0.2
                           --nesterov" ;;
                densenet) epochs=300 milestones="150 225"
                    flags="--depth 100 --growthRate 12 --train-batch 64 --wd 1e-4 --nesterov" ;;
                vgg19_bn) epochs=164 milestones="81 122" flags="--train-batch 128 --wd 5e-4" ;;
            esac
            flags="--arch $arch $flags --lr 0.1 --momentum 0.9"
            flags="$flags --epochs ${EPOCHS:-$epochs} $(schedule $epochs $milestones)"
            flags="--dataset $dataset $flags --manualSeed $seed"
            run "$OUT/$dataset-$arch-baseline/seed$seed" $flags "$@"
            run "$OUT/$dataset-$arch-dma/seed$seed" $flags --method dma --dma-coef 0.5 "$@"
        done
    done
done
finish
