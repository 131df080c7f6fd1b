#!/usr/bin/env bash
# quickstart.sh FOLDER: the whole conversion of the embedded teacher, a step a command. `make demo` runs this.
set -euo pipefail
folder=${1:-demo-run}
if [ -e "$folder" ] && [ ! -e "$folder/.quickstart" ]; then echo "$folder exists and is not of this script's making"; exit 2; fi
rm -rf "$folder" && mkdir -p "$folder" && cd "$folder" && touch .quickstart
began=$(date +%s)
tasks=(--tasks wordproblems_exact,wordproblems_choice --include-path tasks --limit 100 --batch-size 50)

hybridize demo                                                   # teacher/ with its traces, tasks/ for lm-eval
hybridize score-loo --metric kl --windows 16 --seq-len 256       # rank the layers by what removing each one costs
hybridize replace --layers 4                                     # teacher/ -> h4/: half its attention is Mamba, calibrated
hybridize distill h4 -o h4-kd --loss reverse-kl=.5,forward-kl=.5 --steps 180 --batch-size 4 --seq-len 512 \
  --lr 6e-4 --warmup-steps 10 --eval-every 60 --log-every 30 --save-every 0  # back to the teacher
hybridize eval teacher "${tasks[@]}" --quiet
hybridize eval h4 "${tasks[@]}" --quiet
hybridize eval h4-kd "${tasks[@]}" --baseline teacher/eval/results.json --max-drop 0.1
hybridize export h4-kd --format granite -o release               # for stock transformers and vLLM, compared there
hybridize report . --title "The demo's conversion" --quiet             # one page: a picture, a table, curves

python3 - <<'P'
import json

print(f"\n{'':24}{'exact match':>12}{'multiple choice':>17}")
for name, label in (("teacher", "teacher"), ("h4", "right after replace"), ("h4-kd", "after distill")):
    tasks = json.load(open(f"{name}/eval/results.json"))["tasks"]
    print(f"{label:24}{tasks['wordproblems_exact']['value']:12.2f}{tasks['wordproblems_choice']['value']:17.2f}")
P
echo "the whole conversion took $(($(date +%s) - began)) s"
cat <<TEXT

The picture of it: open $PWD/report/index.html in a browser. What to try next, in $folder:
  hybridize chat h4-kd --versus teacher            # ask both: Ola has 3 more than Sue. Sue has 9 keys. How many keys has Ola?
  hybridize score-mmr h4-kd --steps 20             # which of the four layers that are left would convert best?
  hybridize bench teacher h4-kd --batches 1,16     # how fast are they, at which length?
TEXT
