"""README.md of an export: layout, how to load it, lineage, and what was verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridize.checkpoint.reader import CheckpointReader
from hybridize.export.origin import Origin, front_matter, plain, read_origin, result_lines

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


def model_card(
    source: CheckpointReader, manifest: dict[str, Any] | None, use: str = HF, verified: str = "not verified",
    origin: Origin | None = None, name: str = "hybrid",
) -> str:  # fmt: skip
    """use: how to load it, in Markdown; verified: one sentence on what was compared; name: what the model is called."""
    config, origin = source.config, origin or read_origin(source, manifest)
    kinds = config["layer_types"]
    mixers = [str(i) for i, kind in enumerate(kinds) if kind == "linear_attention"]
    root = manifest["root"] if manifest else {"path": "unknown", "hash": "unknown"}
    teacher = plain(origin.base_model or Path(root["path"]).name or "a teacher")
    strip = "".join("M" if kind == "linear_attention" else "a" for kind in kinds)
    data = manifest["data"] if manifest else []
    tokens = manifest["tokens"] if manifest else 0
    how = f"and were distilled back to the teacher on {tokens:,} tokens" if tokens else "and have not been trained since"
    unknown = "that of the teacher and of the data, which this card does not know"
    lines = [
        front_matter(origin, name), f"# Hybrid of {teacher}", "",
        f"A language model that decodes faster than the transformer it comes from, {teacher}: {len(mixers)} of its "
        f"{len(kinds)} attention layers were replaced by Mamba layers (mixer: {(config['mixer'] or {}).get('kind')}), whose "
        f"memory does not grow with the text. The new layers started from the attention's own weights, {how}, by hybridize "
        "after the method of Apriel-H1 (arXiv 2511.02651). Tokenizer, chat template and vocabulary are the teacher's.",
        "", f"    {strip}   (first layer left: M Mamba, a attention)", "",
        "## Use", "", use, "",
        "## Results", "", *result_lines(origin),
        "## Verified", "", f"Against the checkpoint it was exported from, in float32: {verified}.", "",
        "## Licence and limits", "",
        f"Licence: {plain(origin.license) if origin.license else unknown}. "
        "The model knows and repeats what its teacher does, mistakes included; what conversion may cost first is recall over "
        "long texts and long chains of reasoning.", "",
        "## Lineage", "",
        f"- teacher: `{plain(Path(root['path']).name)}`, content hash `{plain(root['hash'])[:16]}`",
        f"- the checkpoint: content hash `{source.hash[:16]}`",
        f"- Mamba layers: {', '.join(mixers) or 'none'}",
        f"- training tokens since the teacher: {tokens:,}",
    ]  # fmt: skip
    lines += [f"- data: `{plain(Path(str(part.get('path', '?'))).name)}`, {plain(part.get('rows', '?'))} rows" for part in data]
    if manifest:
        lines.append(f"- last step: `{plain(manifest['command'])}`, made by hybridize {plain(manifest['version'])}")
    return "\n".join(lines) + "\n"
