"""The `hf` format: a directory that transformers loads with trust_remote_code=True, without
hybridize installed.

The weights are the checkpoint's own files, byte for byte; hybridize.modeling's files travel beside
them.
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
    """hybridize.modeling's modules, without the package's __init__."""
    folder = Path(modeling.__file__).parent
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
```

Needs torch and transformers 5.17 or newer. With mamba-ssm and causal-conv1d on a CUDA device it runs their kernels,
elsewhere plain PyTorch. Assisted decoding is refused: a recurrent state cannot be rolled back."""


class HfFormat(Format):
    """For transformers: the checkpoint's weights and the code that runs them."""

    name = "hf"

    def check(self, source: CheckpointReader, name: str) -> None:
        """As in Format; also where the mixers' code lies outside of what travels."""
        check_hybrid(source, name)
        mixer = source.config.get("mixer")
        if mixer is None:
            return
        home = Path(inspect.getfile(mixer_class(mixer))).resolve()
        if home not in {file.resolve() for file in modeling_files()}:
            raise InputError(
                f"{name} has mixers of kind {mixer['kind']!r}, whose code is {home}: "
                "the hf format ships hybridize's own code only"
            )

    def write(self, source: CheckpointReader, plan: Any, path: Path, name: str, lineage: Manifest, outtype: str | None) -> Path:
        """As in Format."""
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
        """As in Format."""
        return USE

    def ask(self, made: Path, wanted: Reference, device: torch.device, outtype: str | None) -> Verdict:
        """As in Format: the code beside the weights, in a process that has not imported ours."""
        request = {"model": str(made), "prompts": wanted.prompts, "sequences": wanted.sequences, "device": str(device)}
        found, about = ask_process("hybridize.export.ask", request, f"transformers {metadata.version('transformers')}")
        assert about["module"].startswith("transformers_modules"), about
        logits, tokens = parts_of(found, len(wanted.prompts))
        return judge(transformers_name(about["class"]), wanted, logits, tokens, BOUND, exact=True)
