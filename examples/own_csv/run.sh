#!/usr/bin/env sh
# Train on notes.csv, then label new_notes.csv with the trained adapter.
# Every option is passed to `abft-fast train`, for example: ./run.sh --seed 1 --overwrite
set -eu
cd "$(dirname "$0")"

abft-fast train --dataset notes.csv --text-column note --label-column section \
    --template notes.yaml --output-dir runs/notes "$@"

abft-fast predict --demonstrations demonstrations.csv --input new_notes.csv \
    --text-column note --label-column section --template notes.yaml \
    --adapter runs/notes/adapter --output runs/predictions.csv

cat runs/predictions.csv
