#!/usr/bin/env bash
# smollm2.sh TEACHER TRACES HELDOUT.txt GENERAL.txt MASKED.jsonl OUT: 15 of SmolLM2-135M's 30 layers, 8 M tokens, one GPU.
# The protocol of docs/results.md: all packed tokens, no mask, embeddings frozen. Ends with figures on three texts.
set -euo pipefail
teacher=$1 traces=$2 heldout=$3 general=$4 masked=$5 out=$6
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
hybridize replace "$teacher" --indices 3-10,12,22,25-29 --mixer mamba --no-calibrate -o "$out/h15"
hybridize distill "$out/h15" -o "$out/h15-kd" --data "$traces" --eval-data "$heldout" --mask none \
  --chat-template "$here/chatml.jinja" --train body --tokens 8000000 --batch-size 16 --micro-batch-size 8 --seq-len 2048 \
  --lr-mixer 1e-3 --lr 1e-4 --warmup-steps 50 --eval-every 60 --save-every 0 --log-every 4
for student in h15 h15-kd; do
  for text in "$heldout" "$general"; do
    hybridize eval "$out/$student" --teacher "$teacher" --fidelity "$text" -o "$out/$student-$(basename "$text" .txt)"
  done
  hybridize eval "$out/$student" --teacher "$teacher" --fidelity "$masked" --mask assistant \
    --chat-template "$here/chatml.jinja" -o "$out/$student-masked"
done
