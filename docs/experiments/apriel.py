"""Configs alone, of Apriel-H1's shape (15 B): DIR/H-0 is the teacher's, DIR/H-N has N Mamba layers,
evenly spaced.

python docs/experiments/apriel.py DIR [--mixer mamba2] [--layers 0 25 30 40] hybridize bench DIR/H-*
--random-weights --contexts "" --batches "" --generations 1:16384,1024:8192,8192:16384
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SHAPE = {
    "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 50, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 65536, "sliding_window": None,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MIXERS = {
    "mamba2": {"kind": "mamba2", "d_inner": 4096, "d_state": 128, "d_conv": 4},
    "mamba": {"kind": "mamba", "d_inner": 4096, "d_state": 16, "d_conv": 4, "dt_rank": 320, "expand": "head"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--mixer", choices=MIXERS, default="mamba2")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 25, 30, 40])
    args = parser.parse_args()
    total = SHAPE["num_hidden_layers"]
    for count in args.layers:
        mixers = [(i + 1) * count // total > i * count // total for i in range(total)]
        kinds = ["linear_attention" if mixer else "full_attention" for mixer in mixers]
        hybrid = {"model_type": "hybridize", "base_model_type": "mistral", "architectures": ["HybridForCausalLM"]}
        config = SHAPE | (hybrid | {"layer_types": kinds, "mixer": MIXERS[args.mixer]} if count else {"model_type": "mistral"})
        home = args.dir / f"H-{count}"
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
