#!/usr/bin/env bash
# What the figures of README's methods show: short trainings on few images of Fashion-MNIST, one seed each, and what is
# measured of them. The measurements go to results/figures/, from where `make figures` draws them.
#
# 9 runs, about ten minutes on two cores.
#
#   scripts/figures.sh [flags for every run]
#   DATASET=digits EPOCHS=3 scripts/figures.sh
#
# From the environment: DATASET; EPOCHS; OUT, the folder of the runs; KEEP, the folder of the measurements; PYTHON. More
# in run.sh.
DATASET=${DATASET:-fashion-mnist} EPOCHS=${EPOCHS:-15} OUT=${OUT:-checkpoints/figures} KEEP=${KEEP:-results/figures}
. "$(dirname "$0")/run.sh"

recipe="--dataset $DATASET --train-fraction 0.05 --epochs $EPOCHS --test-every $EPOCHS --train-batch 50
        --lr-schedule onecycle --nesterov --clip-norm 5 --manualSeed 1"
network="--arch lenet --lr 0.05"

SCRIPT=scripts/every_epoch.py run "$OUT/none" $recipe $network "$@"
SCRIPT=scripts/every_epoch.py run "$OUT/dma" $recipe $network --method dma --dma-coef 1 "$@"
run "$OUT/amp" $recipe $network --method amp --epsilon 0.1 "$@"
run "$OUT/smoothout" $recipe $network --method smoothout --ss 0.05 "$@"
run "$OUT/large_margin" $recipe $network --method large_margin --large-margin-layers input layer1 layer2 \
    --large-margin-coef 0.1 --cross-entropy-weight 1 "$@"
for margin in 1 2 3 4; do
    run "$OUT/margin-$margin" $recipe --arch lenet_bn --feature-dim 2 --lr 0.01 --method lsoftmax \
        --margin "$margin" "$@"
done
run_all
[ -z "${LIST:-}" ] || exit 0

last() {  # the last checkpoints of the runs $@
    local name
    for name; do echo "$OUT/$name/checkpoint.pth.tar"; done
}

set -e
mkdir -p "$KEEP"
"$PYTHON" measure_margins.py "$OUT"/none/epoch*.pth.tar "$OUT"/dma/epoch*.pth.tar --angles --images 2000
for name in none dma; do
    mkdir -p "$KEEP/$name"
    cp "$OUT/$name"/epoch*-margins.json "$KEEP/$name"
done
for radius in 0.05 0.1 0.2 0.3 0.4 0.5; do
    "$PYTHON" measure_sharpness.py $(last none amp) --ball --ball-epsilon $radius --no-augment --images 1000
done
for size in 0.01 0.02 0.04 0.06 0.08 0.1; do
    "$PYTHON" measure_sharpness.py $(last none smoothout) --noise --ss $size --no-augment --images 1000
done
for name in none amp smoothout; do
    mkdir -p "$KEEP/$name"
    cp "$OUT/$name/checkpoint-sharpness.json" "$KEEP/$name"
done
"$PYTHON" visualize_features.py $(last none large_margin) --histograms --distances --images 2000 --out "$KEEP"
"$PYTHON" visualize_features.py $(last margin-1 margin-2 margin-3 margin-4) --images 1000 --out "$KEEP"
rm "$KEEP"/compare-*.png "$KEEP"/compare-*.pdf
