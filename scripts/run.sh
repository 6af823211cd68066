# Functions of the scripts in this folder, which source this file. Paths are relative to the root of the repository,
# wherever a script is started.
#
#   run FOLDER FLAG...               one run of cifar.py, or of $SCRIPT, if it is not finished
#   schedule EPOCHS MILESTONE...     the milestones of a recipe of EPOCHS epochs, moved to $EPOCHS epochs, as flags
#   only NAME WORD...                ends the script if the variable NAME has a word that is not in the list
#   finish [FLAG...]                 runs them all, then prints the table of $OUT, with these flags of compare.py; the
#                                    last line of every script
#
# From the environment: JOBS, how many runs are side by side (one for each core if all networks are small, otherwise
# one); LIST=1, which prints the commands, one a line, and runs nothing; PYTHON, by default .venv/bin/python if it
# exists; CUDA_VISIBLE_DEVICES, the GPU. A finished run is skipped whatever its flags were; an interrupted run is
# resumed, and refused if its flags were others: use another OUT for other flags. Two scripts that run at the same time
# in one OUT need different seeds or networks.

for word; do
    [[ $word != -h && $word != --help ]] || { sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit; }
done
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -x .venv/bin/python ]; then
    PYTHON=${PYTHON:-.venv/bin/python}
else
    PYTHON=${PYTHON:-python}
fi
commands= status=0

run() {
    local folder=$1
    shift
    if [ -e "$folder/result.json" ]; then
        say "finished: $folder"
    else
        commands+=$(quoted "$PYTHON" "${SCRIPT:-cifar.py}" "$@" --checkpoint "$folder" --resume auto)$'\n'
    fi
}

quoted() {  # words as jobs.py and a shell read them again; printf %q has a form of its own for é
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+=" $word"
    done
    echo "${line# }"
}

say() {  # to the terminal, beside the commands that LIST=1 prints
    if [ "${LIST:-}" ]; then echo "$1" >&2; else echo "$1"; fi
}

schedule() {
    local recipe=$1 milestone moved=
    shift
    for milestone; do
        milestone=$((milestone * ${EPOCHS:-$recipe} / recipe))
        [ "$milestone" = 0 ] || moved="$moved $milestone"
    done
    echo ${moved:+--schedule$moved}
}

only() {
    local name=$1 word
    shift
    for word in ${!name}; do
        case " $* " in
            *" $word "*) ;;
            *) echo "error: $name can be one or several of: $*; was given $word" >&2
               exit 2 ;;
        esac
    done
}

run_all() {  # the runs since it was last called; ends the script if they were stopped, or if there were any to list
    if [ "${LIST:-}" ]; then
        printf %s "$commands"
        [ -z "$commands" ] || exit 0
        return
    fi
    # In the background, because bash handles SIGTERM only after a process in the foreground has ended; Ctrl-C still
    # reaches the runs. Signals are handled before there is a $!, as one may come just after it.
    trap 'wait ${!:-}; exit 130' INT
    trap 'kill ${!:-} 2> /dev/null && wait $!; exit 143' TERM
    (trap - INT TERM; exec "$PYTHON" scripts/jobs.py ${JOBS:+"$JOBS"} <<< "$commands") &
    wait $!
    local ended=$?
    trap - INT TERM
    [ $ended -le 1 ] || exit $ended
    [ $ended = 0 ] || status=1
    commands=
}

finish() {
    run_all
    [ -z "${LIST:-}" ] || exit 0
    echo
    "$PYTHON" compare.py "$OUT" "$@" || status=1
    exit "$status"
}
