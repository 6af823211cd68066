#!/usr/bin/env bash
# Coefficients chosen fairly, then the table, of no paper: few images of Fashion-MNIST and LeNet. Every method has six
# trials, the plain network too, over learning rate and weight decay; the methods take those that it chose. A trial is
# judged by the validation top-1 of its last epoch, on images that no training sees, as the mean over TRIAL_SEEDS. Then
# the chosen flags are trained with other seeds on the whole training set, and the test set is read.
#
# 6 methods x 6 trials = 36 runs for each trial seed, then 6 runs for each seed, of 50 epochs.
#
#   scripts/search.sh [flags for every run]
#   DATASET=digits FRACTION=0.5 METHODS="none dma" EPOCHS=2 TRIAL_SEEDS=101 SEEDS="1 2" scripts/search.sh
#
# From the environment: DATASET; METHODS, one or several, to which none is added, also rivals: sam momentum-sam
# arcface ldam logit_adjustment hinge smoothing mixup cutout dropout flooding; amp-late, which begins when 0.7 of the
# training is behind; dma-late and large_margin-late, which begin in the middle or grow over all of it;
# smoothout-filter, whose noise goes by the length of a filter; lsoftmax-mild, with a larger beta; tuned, which is no
# method, but the plain network with as many more trials as a method has, over TUNED, six of LR:WD; FRACTION of the
# training set, after the tenth that judges the trials; EPOCHS; LRS, three learning rates, and LAYERS of Large Margin,
# for another --arch; COMBINATIONS for the table, such as amp+dma, of METHODS, or of all that have TRIALS, each with
# what it chose alone; TRIAL_SEEDS; SEEDS; OUT, the folder of the runs (trials below OUT/trials, the table below
# OUT/table); TRIALS, the folder of trials that were made before with the same flags, and then none is made; PYTHON.
# More in run.sh; with LIST=1 the trials are listed first, and when they are finished the runs of the table.
DATASET=${DATASET:-fashion-mnist} FRACTION=${FRACTION:-0.01} EPOCHS=${EPOCHS:-50}
OUT=${OUT:-checkpoints/search/$DATASET-$FRACTION-${EPOCHS}epochs}
METHODS=${METHODS:-dma lsoftmax amp smoothout large_margin}
METHODS=$(printf '%s\n' ${METHODS//none/} | awk '!seen[$0]++' | xargs)
COMBINATIONS=${COMBINATIONS:-}
LAYERS=${LAYERS:-input layer1 layer2}
LRS=${LRS:-0.02 0.05 0.1}
TUNED=${TUNED:-0.002:0.005 0.005:0.005 0.01:0.005 0.02:0.02 0.02:0.05 0.02:0.1}
TRIAL_SEEDS=${TRIAL_SEEDS:-101 102}
SEEDS=${SEEDS:-1 2 3 4 5 6 7 8 9 10}
. "$(dirname "$0")/run.sh"
for word; do
    [[ $word == -* ]] || continue
    bare=${word%%=*} bare=${bare,,} bare=${bare//[-_]/} method=
    case $bare in  # the scripts take a flag with - or _ and in either case
        lr|learningrate|wd|weightdecay) variable='LRS and TUNED' ;;
        method) [ "$METHODS" ] || continue; variable=METHODS ;;
        manualseed) variable='TRIAL_SEEDS and SEEDS' ;;
        c|checkpoint) variable=OUT ;;
        valsplit|resume|overwrite) variable='the search itself' ;;
        labelsmoothing) method=smoothing ;;
        mixup|cutout|dropout) method=$bare ;;
        flood) method=flooding ;;
        *) continue ;;
    esac
    if [ "$method" ]; then
        [[ " $METHODS " == *" $method "* ]] || continue
        variable="$method of METHODS"
    fi
    echo "error: ${word%%=*} for every run would undo the search; that is said by $variable" >&2
    exit 2
done
only METHODS dma dma-late lsoftmax lsoftmax-mild amp amp-late smoothout smoothout-filter large_margin \
    large_margin-late sam momentum-sam arcface ldam logit_adjustment hinge smoothing mixup cutout dropout flooding tuned
for pair in $TUNED; do
    [[ $pair == *:* ]] && continue
    echo "error: TUNED must be pairs LR:WD, such as 0.005:0.005; was given $pair" >&2
    exit 2
done
for combination in $COMBINATIONS; do
    case +$combination+ in
        *-late+*) problem="one that begins late, as --method-start would delay the other methods too" ;;
        *+*+*+*) continue ;;
        *) problem="one method, which is for METHODS" ;;
    esac
    echo "error: COMBINATIONS are of several methods, such as amp+dma; $combination is $problem" >&2
    exit 2
done
[ "${TRIALS:-}" ] || COMBINATIONS=${COMBINATIONS//+/ } only COMBINATIONS $METHODS

# Large Margin needs --clip-norm, so all runs have it. The test is the last epoch's: the best epoch is never chosen.
recipe="--dataset $DATASET --arch lenet --train-fraction $FRACTION --epochs $EPOCHS --test-every $EPOCHS
        --train-batch 50 --lr-schedule onecycle --momentum 0.9 --nesterov --clip-norm 5"
layers="--large-margin-layers $LAYERS --cross-entropy-weight 1"

grid() {  # the trials of method $1, one a line
    case $1 in
        none) for wd in 0.0005 0.005; do printf -- "--lr %s --wd $wd\n" $LRS; done ;;
        dma) printf -- '--dma-coef %s\n' 0.01 0.03 0.1 0.3 1 3 ;;
        dma-late) for begin in "--method-start 0.5" "--method-ramp 1"; do
                      printf -- "--dma-coef %s $begin\n" 0.1 1 3
                  done ;;
        lsoftmax) printf -- '--margin %s --beta-min %s\n' 2 5 2 1 2 0 4 5 4 1 4 0 ;;
        lsoftmax-mild) printf -- '--margin %s --beta-min %s\n' 2 20 2 100 2 500 4 20 4 100 4 500 ;;
        amp|amp-late) printf -- '--epsilon %s\n' 0.02 0.05 0.1 0.2 0.5 1 ;;
        smoothout) printf -- '--ss %s\n' 0.002 0.005 0.01 0.02 0.05 0.1 ;;
        smoothout-filter) printf -- '--ss %s\n' 0.02 0.05 0.1 0.2 0.5 1 ;;
        large_margin) printf -- "--large-margin-gamma %s --large-margin-coef %s\n" 5 0.1 5 0.3 5 1 \
                                10000 0.1 10000 0.3 10000 1 ;;
        large_margin-late) for begin in "--method-start 0.5" "--method-ramp 1"; do
                               printf -- "--large-margin-gamma 5 --large-margin-coef %s $begin\n" 0.03 0.1 0.5
                           done ;;
        sam) printf -- '--rho %s\n' 0.02 0.05 0.1 0.2 0.5 1 ;;
        momentum-sam) printf -- '--rho %s\n' 0.03 0.1 0.3 1 3 10 ;;
        arcface) printf -- '--scale %s --angular-margin %s\n' 10 0 10 0.2 10 0.5 30 0 30 0.2 30 0.5 ;;
        ldam) printf -- '--max-margin %s --deferred %s\n' 0.2 0.8 0.5 0.8 0.8 0.8 0.2 1 0.5 1 0.8 1 ;;
        logit_adjustment) printf -- '--tau %s\n' 0.25 0.5 0.75 1 1.5 2 ;;
        hinge) for wd in 0.0005 0.005; do
                   printf -- "--hinge %s --wd $wd\n" one-vs-all crammer-singer weston-watkins
               done ;;
        smoothing) printf -- '--label-smoothing %s\n' 0.05 0.1 0.2 0.3 0.5 0.7 ;;
        mixup) printf -- '--mixup %s\n' 0.1 0.2 0.5 1 2 4 ;;
        cutout) printf -- '--cutout %s\n' 2 4 8 12 16 20 ;;
        tuned) for pair in $TUNED; do echo "--lr ${pair%:*} --wd ${pair#*:}"; done ;;
        dropout) printf -- '--dropout %s\n' 0.1 0.2 0.3 0.5 0.7 0.9 ;;
        flooding) printf -- '--flood %s\n' 0.05 0.1 0.2 0.5 1 1.5 ;;
    esac
}

flags() {  # the flags of a trial $2 of method $1
    case $1 in
        none|tuned|smoothing|mixup|cutout|dropout|flooding) echo "$2" ;;
        amp-late) echo "--method amp --method-start 0.7 $2" ;;
        smoothout-filter) echo "--method smoothout --adapt-type filter $2" ;;
        dma-late|lsoftmax-mild) echo "--method ${1%-*} $2" ;;
        momentum-sam) echo "--method sam --direction momentum $2" ;;
        large_margin|large_margin-late) echo "--method large_margin $layers $2" ;;
        *) echo "--method $1 $2" ;;
    esac
}

name() {  # a trial as the name of a folder: --lr 0.02 is lr-0.02
    local words=${1//--/}
    echo "${words// /-}"
}

try() {  # add the trials of methods $2... with the flags $1 for each of them
    local common=$1 method trial seed
    shift
    [ -z "${TRIALS:-}" ] || return
    for method; do
        while read -r trial; do
            for seed in $TRIAL_SEEDS; do
                run "$OUT/trials/$method/$(name "$trial")/seed$seed" $recipe --val-split 0.1 $common \
                    $(flags "$method" "$trial") --manualSeed "$seed" "${given[@]}"
            done
        done < <(grid "$method")
    done
}

choose() {  # trial: that of method $1 which is best on the validation images; found once
    local best choice=choice_${1//-/_}
    trial=${!choice:-}
    [ -z "$trial" ] || return 0
    best=$("$PYTHON" -m utils.lab.choose "${TRIALS:-$OUT/trials}/$1") || exit 1
    while read -r trial; do
        [ "$(name "$trial")" != "$best" ] || { printf -v "$choice" %s "$trial"; return; }
    done < <(grid "$1")
    echo "error: the best trial of $1 is $best, which is none of this search: give the LRS that its trials had" >&2
    exit 1
}

first() {  # trial: the first of method $1
    trial=$(grid "$1" | head -n 1)
}

combine() {  # combined: the flags of the methods that + joins in $1, each with its trial that $2 finds
    local methods= others= part words
    for part in ${1//+/ }; do
        "$2" "$part"
        words=($(flags "$part" "$trial"))
        [ "${words[0]}" != --method ] || { methods+=" ${words[1]}"; words=("${words[@]:2}"); }
        others+=" ${words[*]}"
    done
    combined="${methods:+ --method$methods}$others"
    combined=${combined# }
}

given=("$@")
checked=$COMBINATIONS
[ "${LIST:-}" ] || checked="none $METHODS $COMBINATIONS"
combined=$(for combination in $checked; do
    combine "$combination" first
    quoted $recipe $combined "${given[@]}"
done)
[ -z "$combined" ] || "$PYTHON" -c '  # before any training: whether these flags are known and go together
import shlex, sys, cifar
for line in sys.stdin:
    sys.argv[1:] = shlex.split(line)
    cifar.parse_arguments()
' <<< "$combined" || exit 2
try "" none
run_all
choose none
plain=$trial
try "$plain" $METHODS
run_all
for method in none $METHODS $COMBINATIONS; do
    combine "$method" choose
    say "chosen: $method $combined"
    [ "$method" = none ] && common= || common=$plain
    for seed in $SEEDS; do
        run "$OUT/table/$method/seed$seed" $recipe $common $combined --manualSeed "$seed" "${given[@]}"
    done
done
OUT=$OUT/table
finish --baseline "$plain"
