"""README.md of an export: layout, how to load it, lineage, and what was verified."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hybridize.checkpoint.reader import CheckpointReader

HF = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
```

Needs torch and transformers 5.17 or newer. With mamba-ssm and causal-conv1d on a CUDA device it runs their kernels,
elsewhere plain PyTorch. Assisted decoding is refused: a recurrent state cannot be rolled back."""

VLLM = "    vllm serve THIS_DIRECTORY\n"
GRANITE = (
    """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

"""
    + VLLM
    + """
Compared in float32; at dtype=bfloat16 transformers casts A_log, D and dt_bias with the rest, which hybridize never does.

A GraniteMoeHybridForCausalLM: no code of its own. **transformers 5.23 or newer**: older versions load the same files without a
warning and compute another function (they normalise over all channels where this model has one group a head)."""
)

NOT_VLLM = "Not for vLLM (0.32 and before): it takes head size = hidden size / heads and ignores this config's head_dim.\n"

GGUF = """    llama-cli -m FILE -cnv

```python
from llama_cpp import Llama
model = Llama("FILE", n_ctx=4096)
model.create_chat_completion([{"role": "user", "content": "What is 17 times 23?"}], temperature=0)
```

Of llama.cpp's architecture `granitehybrid`."""


def model_card(source: CheckpointReader, manifest: dict[str, Any] | None, use: str = HF, verified: str = "not verified") -> str:
    """use: how to load it, in Markdown; verified: one sentence on what was compared."""
    config = source.config
    kinds = config["layer_types"]
    mixers = [str(i) for i, kind in enumerate(kinds) if kind == "linear_attention"]
    root = manifest["root"] if manifest else {"path": "unknown", "hash": "unknown"}
    strip = "".join("M" if kind == "linear_attention" else "a" for kind in kinds)
    data = manifest["data"] if manifest else []
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [hybridize, mamba, hybrid]", "---",
        f"# Hybrid of {_plain(Path(root['path']).name or 'a teacher')}", "",
        f"{len(mixers)} of {len(kinds)} attention layers are Mamba layers (mixer: {(config['mixer'] or {}).get('kind')}).", "",
        f"    {strip}   (M Mamba, a attention)", "",
        "## Use", "", use, "",
        "## Verified", "", f"Against the checkpoint in float32: {verified}.", "",
        "## Lineage", "",
        f"- teacher: `{_plain(root['path'])}`, content hash `{_plain(root['hash'])[:16]}`",
        f"- the checkpoint: content hash `{source.hash[:16]}`",
        f"- Mamba layers: {', '.join(mixers) or 'none'}",
        f"- training tokens since the teacher: {manifest['tokens'] if manifest else 0:,}",
    ]  # fmt: skip
    lines += [f"- data: `{_plain(part.get('path', '?'))}`, {_plain(part.get('rows', '?'))} rows" for part in data]
    if manifest:
        lines.append(f"- last step: `{_plain(manifest['command'])}`, made by hybridize {_plain(manifest['version'])}")
    return "\n".join(lines) + "\n"


def _plain(text: Any) -> str:
    """Text from a file, safe inside Markdown: no control characters, no markup."""
    return re.sub(r"[^\w./:+ @-]", "_", str(text))[:200]
