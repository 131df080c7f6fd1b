#!/usr/bin/env bash
# choosing.sh TEACHER TRACES HELDOUT.txt GENERAL.txt MASKED.jsonl OUT: which 15 of SmolLM2-135M's 30 layers, by every scorer, evenly
# spaced and at random; 3 M tokens of distillation each. Run where lm-eval finds ARC-Easy. More arguments go to mixers.py.
set -euo pipefail
teacher=$1 traces=$2 heldout=$3 general=$4 masked=$5 out=$6
here=$(cd "$(dirname "$0")" && pwd)
text=(--data "$traces" --mask none --chat-template "$here/chatml.jinja")
mkdir -p "$out"
[ -e "$out/margin.json" ] || hybridize score-loo "$teacher" --tasks arc_easy --metric margin --limit 500 --batch-size 32 -o "$out/margin.json"
[ -e "$out/kl.json" ] || hybridize score-loo "$teacher" --metric kl "${text[@]}" --windows 64 -o "$out/kl.json"
[ -e "$out/kl-mixer.json" ] || hybridize score-loo "$teacher" --metric kl --ablate mixer "${text[@]}" --windows 64 -o "$out/kl-mixer.json"
[ -e "$out/restore.json" ] || hybridize score-restore "$teacher" "${text[@]}" --eval-data "$masked" --windows 64 -o "$out/restore.json"
[ -e "$out/mmr.json" ] || hybridize score-mmr "$teacher" "${text[@]}" -o "$out/mmr.json"
random() { python3 -c "import random; print(','.join(map(str, sorted(random.Random($1).sample(range(30), 15)))))"; }
python3 "$here/mixers.py" "$teacher" "$traces" "$heldout" "$general" "$masked" "$out" --tokens 3000000 --warmup-steps 20 \
  --runs mamba2:z+conv+decay+scale \
  --layers even=1,3,5,7,9,11,13,15,17,19,21,23,25,27,29 mmr="$out/mmr.json" kl="$out/kl.json" kl-mixer="$out/kl-mixer.json" margin="$out/margin.json" \
  restore="$out/restore.json" random0="$(random 0)" random1="$(random 1)" random2="$(random 2)" "${@:7}"
