#!/usr/bin/env bash
# SmoothOut (Wen et al., arXiv 1805.07898), its tables of large batches on CIFAR-10: large batches end in sharp minima
# and generalize worse (Keskar et al., ICLR 2017, arXiv 1609.04836); does smoothing the loss close the gap? A small and
# a large batch, each with and without SmoothOut, in the shallow network of Keskar et al. and in ResNet-44, for the same
# number of epochs. The large batch is passed in ghost batches of 128 images, with a learning rate
# sqrt(2048 / 128) = 4 times as high (Hoffer et al., NeurIPS 2017, arXiv 1705.08741).
#
# 2 networks x 2 batches x 2 = 8 runs for each seed, of 100 epochs. BATCHES="small large long" adds the large batch with
# --epoch-scaling: as many steps as with the small batch, so 16 times the epochs, 1600.
#
#   scripts/smoothout_large_batch.sh [flags for every run]
#   LARGE=4096 SS=0.005 ARCHS=shallow SEEDS=1 scripts/smoothout_large_batch.sh --precision bf16
#
# From the environment: DATASET; LARGE, the large batch, a multiple of 128; SS, the size of the noise; ARCHS, BATCHES
# and SEEDS, one or several; EPOCHS; OUT, the folder of the runs; PYTHON. More in run.sh.
DATASET=${DATASET:-cifar10} EPOCHS=${EPOCHS:-100}
OUT=${OUT:-checkpoints/smoothout_large_batch/$DATASET-${EPOCHS}epochs}
ARCHS=${ARCHS:-shallow resnet44}
BATCHES=${BATCHES:-small large}
[ "$DATASET" = digits ] && LARGE=${LARGE:-512}  # digits has 1437 training images
LARGE=${LARGE:-2048}
SS=${SS:-0.01}
SEEDS=${SEEDS:-1 2 3}
. "$(dirname "$0")/run.sh"
only ARCHS shallow resnet44
only BATCHES small large long

recipe="--dataset $DATASET --epochs $EPOCHS --lr-schedule cosine --momentum 0.9"

for seed in $SEEDS; do
    for arch in $ARCHS; do
        case $arch in
            shallow) network="--arch shallow --lr 0.05 --wd 5e-4" ;;
            resnet44) network="--arch resnet --depth 44 --lr 0.1 --wd 1e-4" ;;
        esac
        for batch in $BATCHES; do
            large="--train-batch $LARGE --mini-batch 128 --lr-scaling sqrt --base-batch 128"
            case $batch in
                small) name=128 flags="--train-batch 128" ;;
                large) name=$LARGE flags=$large ;;
                long) name=$LARGE-long flags="$large --epoch-scaling" ;;
            esac
            flags="$recipe $network $flags --manualSeed $seed"
            run "$OUT/$arch-$name-baseline/seed$seed" $flags "$@"
            run "$OUT/$arch-$name-smoothout$SS/seed$seed" $flags --method smoothout --ss "$SS" "$@"
        done
    done
done
finish
