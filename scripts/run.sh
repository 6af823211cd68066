# Functions of the scripts in this folder, which source this file. Paths are relative to the root of the repository,
# wherever a script is started.
#
#   run FOLDER FLAG...               one run of cifar.py: skipped if it is finished, resumed if it was interrupted
#   schedule EPOCHS MILESTONE...     the milestones of a recipe of EPOCHS epochs, moved to $EPOCHS epochs, as flags
#   only NAME WORD...                ends the script if the variable NAME has a word that is not in the list
#   finish                           the table of $OUT, and the runs that failed; the last line of every script
#
# From the environment: PYTHON, by default .venv/bin/python if it exists; CUDA_VISIBLE_DEVICES, the GPU, also of resumed
# runs. A finished run is skipped whatever its flags were, and an interrupted run resumes with its own flags: use
# another OUT for other flags. Two scripts that run at the same time in one OUT need different seeds or networks.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -x .venv/bin/python ]; then
    PYTHON=${PYTHON:-.venv/bin/python}
else
    PYTHON=${PYTHON:-python}
fi
failed=() running=

run() {
    local folder=$1 status
    shift
    if [ -e "$folder/result.json" ]; then
        echo "finished: $folder"
        return
    fi
    if [ -e "$folder/checkpoint.pth.tar" ]; then
        echo "resumed: $folder"
        set -- --resume "$folder/checkpoint.pth.tar"
    else  # a folder without a checkpoint belongs to a run that failed at its start
        echo "run: $folder"
        set -- "$@" --checkpoint "$folder" --overwrite
    fi
    # In the background, because bash handles SIGTERM only after a process in the foreground has ended; Ctrl-C still
    # reaches the run.
    (trap - INT; exec "$PYTHON" cifar.py "$@") &
    running=$!
    wait "$running"
    status=$? running=
    case $status in
        0) ;;
        130 | 143) exit "$status" ;;  # stopped by Ctrl-C or SIGTERM
        *) echo "failed: $folder (exit status $status)" >&2
           failed+=("$folder (exit status $status)") ;;
    esac
}

stop() {  # waits for the run, then exits with status $1; $2, if given: a signal that the run has not received
    trap - INT TERM
    if [ "$running" ]; then
        [ $# = 1 ] || kill -s "$2" "$running"
        wait "$running"
    fi
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143 TERM' TERM

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

finish() {
    echo
    "$PYTHON" compare.py "$OUT"
    local status=$?
    if [ ${#failed[@]} != 0 ]; then
        printf '\nfailed:\n' >&2
        printf '%s\n' "${failed[@]}" >&2
        status=1
    fi
    exit "$status"
}
