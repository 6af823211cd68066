#!/usr/bin/env bash
# Copy what a table needs of finished runs from checkpoints/ to the same place in results/, which is part of the
# repository: args.json, log.txt and result.json, and what measure_margins.py and measure_sharpness.py have left beside
# the checkpoints. Refused, each with a line: runs that are unfinished, damaged or mixed, and runs of code with
# uncommitted changes, as nobody could repeat them.
#
#   scripts/keep.sh FOLDER...        runs, or folders with runs somewhere below them; those that are elsewhere come
#                                    below results/FOLDER
folders=()
for folder; do
    folders+=("$(realpath -ms -- "$folder")")
done
. "$(dirname "$0")/run.sh"
exec "$PYTHON" -m utils.lab.keep "${folders[@]}"
