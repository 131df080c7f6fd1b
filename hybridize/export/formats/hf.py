"""The `hf` format: a directory that transformers loads with trust_remote_code=True, without
hybridize installed.

The weights are byte-for-byte copies of the checkpoint's files. The modules of hybridize.modeling
are copied beside them.
"""

from __future__ import annotations

import inspect
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hybridize import modeling
from hybridize.checkpoint.atomic import write_json
from hybridize.checkpoint.integrity import seal
from hybridize.checkpoint.manifest import Manifest
from hybridize.checkpoint.reader import INDEX, CheckpointReader, carry, check_inside
from hybridize.errors import InputError
from hybridize.export.formats.base import Format, check_hybrid
from hybridize.export.verify import BOUND, Reference, Verdict, ask_process, judge, parts_of, transformers_name
from hybridize.modeling import mixer_class

AUTO_MAP = {
    "AutoConfig": "configuration_hybridize.HybridConfig",
    "AutoModelForCausalLM": "modeling_hybridize.HybridForCausalLM",
}
CARRIED_LOGS = ("metrics.jsonl", "eval.jsonl")


def modeling_files() -> list[Path]:
    """Paths of the modules in hybridize.modeling, without __init__.py."""
    folder = Path(modeling.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
```

Needs torch and transformers 5.17 or newer. On a CUDA device with mamba-ssm and causal-conv1d it
runs their kernels, otherwise plain PyTorch. Assisted decoding is not supported: a recurrent state
cannot be rolled back."""


class HfFormat(Format):
    """Export for transformers: the checkpoint's weights and the modeling code."""

    name = "hf"

    def check(self, source: CheckpointReader, name: str) -> None:
        """See Format.check. InputError also if the mixers' code is not among the files that are
        copied."""
        check_hybrid(source, name)
        mixer = source.config.get("mixer")
        if mixer is None:
            return
        home = Path(inspect.getfile(mixer_class(mixer))).resolve()
        if home not in {file.resolve() for file in modeling_files()}:
            raise InputError(
                f"{name} has mixers of kind {mixer['kind']!r}, whose code is in {home}: "
                "the hf format includes only hybridize's own code"
            )

    def write(self, source: CheckpointReader, plan: Any, path: Path, name: str, lineage: Manifest, outtype: str | None) -> Path:
        """See Format.write. Copies weights, code, tokenizer and training logs."""
        weights = [*([INDEX] if source.sharded else []), *source.files]
        for file in [*(source.path / name for name in weights), *modeling_files()]:
            shutil.copyfile(file, path / file.name)
        carry(source.path, path)
        for extra in CARRIED_LOGS:
            if (source.path / extra).is_file():
                check_inside(source.path, source.path / extra)
                shutil.copyfile(source.path / extra, path / extra)
        write_json(path / "config.json", source.config | {"auto_map": AUTO_MAP})
        seal(path, lineage.to_json(), [source.take_print(name) for name in source.names], source.names)
        return path

    def use(self, plan: Any, made: Path) -> str:
        """See Format.use."""
        return USE

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """See Format.ask. Runs the code beside the weights, in a process that does not import
        hybridize."""
        request = {"model": str(made), "prompts": wanted.prompts, "sequences": wanted.sequences, "device": str(device)}
        found, about = ask_process("hybridize.export.ask", request, f"transformers {metadata.version('transformers')}")
        assert about["module"].startswith("transformers_modules"), about
        logits, tokens = parts_of(found, len(wanted.prompts))
        return judge(transformers_name(about["class"]), wanted, logits, tokens, BOUND, exact=True)
