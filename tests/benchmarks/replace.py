"""Surgery on a checkpoint larger than memory: hybridize replace against cp -r of the same files,
and its anonymous memory.

python -m tests.benchmarks.replace FOLDER                # Apriel's shape: 15 B random bfloat16
weights, 28 GiB python -m tests.benchmarks.replace FOLDER --layers 4     # smaller

Everything is made under FOLDER/replace-benchmark, which takes twice the weights, and removed again.
Both sides end with sync; the order is cp, replace, cp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

APRIEL = dict(
    model_type="mistral", architectures=["MistralForCausalLM"], vocab_size=131072, hidden_size=5120, intermediate_size=14336,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=65536, sliding_window=None,
    rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False, dtype="bfloat16", rope_theta=1000000.0,
)  # fmt: skip
SHARD = 2 << 30
GIB = 2**30


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    D, F, V = APRIEL["hidden_size"], APRIEL["intermediate_size"], APRIEL["vocab_size"]
    I, K = (APRIEL[f"num_{kind}_heads"] * APRIEL["head_dim"] for kind in ("attention", "key_value"))  # noqa: E741
    each = {
        "self_attn.q_proj": (I, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D), "self_attn.o_proj": (D, I),
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (V, D)}
    found |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in each.items()}
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


def make(path: Path, layers: int) -> int:
    """Writes the checkpoint shard by shard; returns its bytes."""
    path.mkdir(parents=True)
    noise = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weights, shard, size, total = {}, {}, 0, 0

    def flush() -> None:
        nonlocal shard, size
        name = f"model-{len(set(weights.values())) + 1:05d}.safetensors"
        save_file(shard, path / name, {"format": "pt"})
        weights.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for number, (name, shape) in enumerate(shapes(layers).items()):
        count = torch.Size(shape).numel()
        shard[name] = noise.roll(number * 4099).repeat(-(-count // len(noise)))[:count].view(shape).clone()
        size, total = size + 2 * count, total + 2 * count
        if size >= SHARD:
            flush()
    flush()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weights}))
    (path / "config.json").write_text(json.dumps({**APRIEL, "num_hidden_layers": layers}))
    return total


def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds until it is done and on the disk, and the most anonymous memory in GiB that the
    process had."""
    most, began = 0, time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            most = max([most, *found])
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    if process.wait() != 0:
        sys.exit(f"{arguments[0]} failed")
    thread.join()
    os.sync()
    return time.perf_counter() - began, most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--mixer", default="mamba2")
    args = parser.parse_args()
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes(args.layers).values())
    free = shutil.disk_usage(args.folder).free
    needed = int(2.2 * size)
    if free < needed:
        sys.exit(f"{args.folder} has {free / GIB:.0f} GiB free, {needed / GIB:.0f} are needed")
    home = args.folder / "replace-benchmark"
    source, result = home / "source", home / "result"
    half = f"0-{args.layers // 2 - 1}"
    ours = [sys.executable, "-m", "hybridize.commands", "replace", str(source), "--indices", half, "--mixer", args.mixer]
    ours += ["--no-calibrate", "--no-verify", "--quiet", "-o", str(result)]
    try:
        print(f"{make(source, args.layers) / GIB:.1f} GiB, {args.layers} layers, {args.layers // 2} converted", flush=True)
        os.sync()
        times: dict[str, list[float]] = {"cp -r": [], "replace": []}
        for name in ("cp -r", "replace", "cp -r"):
            seconds, memory = timed(["cp", "-r", str(source), str(result)] if name == "cp -r" else ours)
            times[name].append(seconds)
            print(f"{name:8} {seconds:7.1f} s, anonymous memory at most {memory:.2f} GiB", flush=True)
            shutil.rmtree(result)
            os.sync()
        copying = sum(times["cp -r"]) / len(times["cp -r"])
        print(f"replace takes {times['replace'][0] / copying:.2f} times as long as cp -r")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
