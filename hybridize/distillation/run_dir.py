"""OUT.run/: what an unfinished distillation leaves behind so that it can go on (metrics, measures, resumable state)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hybridize.checkpoint.reader import read_json
from hybridize.checkpoint.writer import AtomicDirectory, write_json, write_json_atomic
from hybridize.errors import InputError

LOGS = ("metrics", "eval")


class RunDir:
    """`settings` is what decides the run's result; a resumed run must have the same."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.path = output.with_name(output.name + ".run")
        self.settings = settings

    def check(self, resume: bool, overwrite: bool) -> None:
        """InputError when there is an unfinished run and neither flag says what to do with it, or it cannot be resumed."""
        if resume:
            if not (self.path / "settings.json").exists():
                raise InputError(f"--resume: there is no unfinished run in {self.path}")
            before = read_json(self.path / "settings.json")
            now = json.loads(json.dumps(self.settings))
            changed = [key for key in now if before.get(key) != now[key]]
            if changed:
                raise InputError(f"--resume: {changed[0]} was {before.get(changed[0])!r}, now it is {now[changed[0]]!r}")
        elif self.path.exists() and not overwrite:
            raise InputError(f"{self.path} holds an unfinished run; continue it with --resume, or start over with --overwrite")

    def start(self, resume: bool) -> None:
        if resume:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        write_json_atomic(self.path / "settings.json", self.settings)

    def log(self, name: str, record: dict[str, Any]) -> None:
        with (self.path / f"{name}.jsonl").open("a") as out:
            out.write(json.dumps(record) + "\n")

    def save(self, student: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The trained weights and AdamW's moments after `step` steps; replaces what was saved before."""
        names = {id(p): name for name, p in student.named_parameters()}
        weights = {name: p.detach().cpu().clone() for name, p in student.named_parameters() if p.requires_grad}
        moments = {
            f"{names[id(p)]}/{key}": value.detach().cpu().reshape(value.shape).clone()
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }
        with AtomicDirectory(self.path / "state", overwrite=True) as path:
            save_file(weights, path / "weights.safetensors")
            save_file(moments, path / "optimizer.safetensors")
            write_json(path / "state.json", {"step": step})

    def load(self, student: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
        """Puts the saved state back; returns its step, 0 where the run was cut off before its first save.

        The logs are cut back to that step.
        """
        state = self.path / "state"
        step = int(read_json(state / "state.json")["step"]) if (state / "state.json").exists() else 0
        for name in LOGS:
            self._cut(self.path / f"{name}.jsonl", step)
        if step == 0:
            return 0
        student.load_state_dict(load_file(state / "weights.safetensors", device=str(device)), strict=False)
        moments = load_file(state / "optimizer.safetensors", device=str(device))
        for name, parameter in student.named_parameters():
            found = {key.rsplit("/", 1)[1]: value for key, value in moments.items() if key.rsplit("/", 1)[0] == name}
            if found:
                optimizer.state[parameter] = {
                    k: v.cpu() if k == "step" and device.type == "cpu" else v for k, v in found.items()
                }
        return step

    @staticmethod
    def _cut(path: Path, step: int) -> None:
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if 0 < step >= json.loads(line)["step"]:
                    kept.append(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
        path.write_text("".join(line + "\n" for line in kept))

    def finish(self, into: Path) -> None:
        """Copies the logs into the finished checkpoint's directory."""
        for name in LOGS:
            if (self.path / f"{name}.jsonl").exists():
                shutil.copyfile(self.path / f"{name}.jsonl", into / f"{name}.jsonl")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
