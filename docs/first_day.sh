#!/usr/bin/env bash
# Types the commands of docs/first-day.md and prints that page again.
#
#   docs/first_day.sh PHOTOS > docs/first-day.md
#
# in a fresh clone; PHOTOS is any folder. It took ten minutes on two cores with
# 300 photographs.
set -euo pipefail
photos=$1
for made in photos models runs server.log embeddings.npz; do
    if [ -e "$made" ]; then
        echo "error: Expected a fresh clone, received one with $made, which" \
            "would be written to; make another clone." >&2
        exit 1
    fi
done
export PATH=$PWD/.venv/bin:$PATH

say() { printf '\n%s\n' "$*" | fold -s -w 80 | sed 's/ $//'; }

# What a terminal of 80 columns shows once a command has ended.
terminal() {
    script -qec "stty cols 80 rows 24; $1" /dev/null </dev/null |
        expand | sed -E 's/\r+$//; s/.*\r//; s/\x1b\[[0-9;?]*[A-Za-z]//g; s/^/    /; s/ +$//'
}

# show COMMAND [HOW IT IS STARTED HERE]: the command and what it prints.
show() {
    printf '\n    $ %s\n' "$1"
    terminal "${2:-$1}" | sed "s#$PWD#…#g"
}

# Sends Ctrl-C's signal to the training ten seconds after its first steps.
interrupter() {
    echo '(until [ -s runs/photos/metrics.jsonl ]; do sleep 1; done; sleep 10;' \
        'pkill -INT -f "^python -m clsa_tf.train .*runs/photos") & exec'
}

train="python -m clsa_tf.train --flagfile=photos \\
        --dataset=folder:photos --workdir=runs/photos \\
        --batch_size=32 --total_epochs=60"

cat <<'PAGE'
# A first day

This page shows a first session, command by command, with everything that is
printed. The terminal has 80 columns, the machine two CPU cores. Lines that a
terminal overwrites are left out: a progress bar is shown in its last state.
`docs/first_day.sh` typed the commands and wrote this page.

## The demonstration
PAGE
show "make demo"

cp -r "$photos" photos
say "## A folder of photographs"
say "\`photos\` holds $(find photos -type f | wc -l) mixed files: JPEG, PNG, WebP," \
    "TIFF and HEIC. Some have an EXIF rotation, some have no extension, some are" \
    "damaged, and some are not images. The first command lacks \`folder:\`:"
show "python -m clsa_tf.train --flagfile=photos --dataset=photos --workdir=runs/photos" || true
say "The correct command, with fewer epochs than the 200 of the recipe. Ctrl-C stops" \
    "the run after some epochs:"
show "$train" "$(interrupter) $train" || true
say "The same command resumes it:"
show "$train"
say "## Report"
show "python -m clsa_tf.report --workdir=runs/photos"
say "## Serving"
show "python -m export.savedmodel --workdir=runs/photos --output=models/photos"
say "The next commands start a server for this machine and send one request. For" \
    "production use TensorFlow Serving, with the same files and requests" \
    "([export/README.md](../export/README.md))."
server="python -m export.server --model_base_path=$PWD/models/photos --model_name=photos"
printf '\n    $ %s &\n' "${server//$PWD/\$PWD}"
$server >server.log 2>&1 &
trap 'kill %1' EXIT
until grep -q ":8501" server.log; do sleep 1; done
sleep 1
sed "s#$PWD#…#g; s/^/    /" server.log
photo=$(find photos -name '*.jpg' -size +1k | sort | tail -1)
show "python -m export.client --server=localhost:8500 --model=photos $photo | cut -c1-200"
say "The last command embeds all photographs and writes a NumPy file:"
show "python -m export.embed --encoder=models/photos --images=photos --output=embeddings.npz"
