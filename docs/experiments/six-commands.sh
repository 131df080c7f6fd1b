#!/usr/bin/env bash
# six-commands.sh TEACHER TRACES TASKS_FOLDER OUT: every command once on a real teacher, with limits that suit a CPU.
# SmolLM2-135M-Instruct on 2 cores: see docs/results.md for the time and the output. TASKS_FOLDER: lm-eval tasks
# (`hybridize demo` writes one); TEACHER must be writable or its scores go to ./scores.
set -euo pipefail
teacher=$1 traces=$2 tasks=$3 out=$4
mkdir -p "$out"
hybridize score-loo "$teacher" --tasks wordproblems_choice --include-path "$tasks" --metric margin --limit 2 --batch-size 8 \
  -o "$out/loo.json" --overwrite
hybridize replace "$teacher" --scores "$out/loo.json" --layers 13 --calibrate "$traces" --calibration-tokens 2048 -o "$out/h13" --overwrite
hybridize distill "$out/h13" --data "$traces" --limit 200 --steps 2 --batch-size 2 --seq-len 256 --eval-windows 2 \
  -o "$out/h13-kd" --overwrite
hybridize score-mmr "$out/h13-kd" --data "$traces" --limit 200 --steps 2 --batch-size 1 --seq-len 128 \
  --calibration-tokens 2048 --overwrite
hybridize replace "$out/h13-kd" --layers 15 --calibrate "$traces" --calibration-tokens 2048 -o "$out/h15" --overwrite
hybridize distill "$out/h15" --data "$traces" --limit 200 --steps 2 --batch-size 2 --seq-len 256 --eval-windows 2 \
  -o "$out/h15-kd" --overwrite
hybridize eval "$out/h15-kd" --tasks wordproblems_choice,wordproblems_exact --include-path "$tasks" --limit 4 \
  --gen-kwargs max_gen_toks=32 --overwrite
hybridize export "$out/h15-kd" -o "$out/release" --overwrite
hybridize export "$out/h15-kd" --format granite -o "$out/release-granite" --overwrite
python3 - "$out/release" <<'P'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(type(model).__module__.split(".")[0], tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]))
P
