"""hybridize bench"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shared import options as opt
from .shared.bench_tables import show_bench
from .shared.files import refuse_ranks, result_file
from .shared.flags import expanded
from .shared.output import Output, guarded

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hybridize.benchmark.grid import BenchSettings
    from hybridize.modeling import HybridForCausalLM

GIB = 2**30


@dataclass(frozen=True)
class Grid:
    """What is timed, and how often."""

    contexts: Annotated[str, typer.Option("--contexts", help="Tokens before a step, separated by commas.")] = "1024,4096,16384"
    batches: Annotated[str, typer.Option("--batches", help="Sequences in a step, separated by commas.")] = "1,16,64"
    generations: Annotated[
        str, typer.Option("--generations", help="PROMPT:NEW,... tokens: throughput with the largest batch that fits.")
    ] = ""
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps timed together.")] = 16
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timings, of which the median counts.")] = 5

    def settings(self) -> BenchSettings:
        from hybridize.benchmark.grid import BenchSettings
        from hybridize.errors import InputError, setting

        contexts, batches = _numbers("contexts", self.contexts), _numbers("batches", self.batches)
        pairs = [_numbers("generations", pair, ":") for pair in self.generations.split(",") if pair.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise InputError(f"{setting('generations')} {self.generations!r}: give PROMPT:NEW, such as 1024:8192")
        return BenchSettings(contexts, batches, tuple((pair[0], pair[1]) for pair in pairs), self.steps, self.repeats)


@guarded
@expanded
def command(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="The first is what others are held against.")
    ],
    *,
    grid: Grid,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Only config.json is read: times do not depend on the weights.")
    ] = False,
    memory: Annotated[float | None, typer.Option("--memory", help="GiB to fit into [default: the GPU's].")] = None,
    output: opt.Output = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
    speech: opt.Speech,
) -> None:
    """Reads checkpoints, teachers or hybrids; writes bench.json and bench.png into ./bench (or -o):
    how fast each is.

    Prefill, time to the first token, and decoding steps over a grid of contexts and batches,
    through one captured step for all, in one run, interleaved where they fit beside one another.
    """
    out = speech.output()
    from dataclasses import asdict

    from hybridize.benchmark.grid import bench
    from hybridize.checkpoint.atomic import write_json_atomic
    from hybridize.runtime.device import pick_compute, ran_on
    from hybridize.runtime.loading import quiet_transformers

    refuse_ranks("bench")
    settings = grid.settings()
    target = output or Path("bench")
    path = result_file(target, "bench.json", overwrite)
    names = _short(checkpoints)
    where, compute = pick_compute(device, dtype)
    quiet_transformers()
    loaders = {
        name: _loader(out, given, random_weights, where, compute) for name, given in zip(names, checkpoints, strict=True)
    }
    found = bench(loaders, settings, where, None if memory is None else memory * GIB, out.progress)
    on = _machine(where)
    found = {
        "format": 1, "settings": asdict(settings) | {"random_weights": random_weights} | ran_on(where, compute), "machine": on,
        "paths": dict(zip(names, checkpoints, strict=True)), **found,
    }  # fmt: skip
    from hybridize.benchmark.plot import draw

    draw(found, target / "bench.png")
    write_json_atomic(path, found)  # last: a run whose picture is not there yet may be started again
    out.progress(f"wrote {path}", last=True)
    out.result({"bench": str(path), **found}, lambda: show_bench(out, path, found, names))


def _numbers(name: str, text: str, separator: str = ",") -> tuple[int, ...]:
    from hybridize.errors import InputError, setting

    try:
        return tuple(int(part) for part in text.split(separator) if part.strip())
    except ValueError as error:
        raise InputError(f"{setting(name)} {text!r}: whole numbers are wanted") from error


def _short(checkpoints: list[str]) -> list[str]:
    """Last parts of paths, or whole paths where those are the same."""
    last = [Path(name).name or name for name in checkpoints]
    names = last if len(set(last)) == len(last) else list(checkpoints)
    if len(set(names)) < len(names):
        from hybridize.errors import InputError

        raise InputError("the same checkpoint is given twice")
    return names


def _loader(
    out: Output, name: str, random_weights: bool, where: torch.device, compute: torch.dtype
) -> Callable[[], HybridForCausalLM]:
    """What loads it; whatever is wrong with its name or config is said now."""
    from hybridize.generation.decoder import check_decodable
    from hybridize.inputs import open_checkpoint
    from hybridize.modeling import hybrid_config
    from hybridize.runtime.loading import load_hybrid
    from hybridize.surgery.teacher import family_of

    if not random_weights:
        source = open_checkpoint(name, notes=out)
        check_decodable(hybrid_config(source.config))
        return lambda: load_hybrid(source, where, compute)
    from hybridize.anatomy import config_of
    from hybridize.benchmark.grid import random_hybrid

    path, raw = config_of(name)
    family_of(raw, str(path))
    config = hybrid_config(raw)
    check_decodable(config)
    return lambda: random_hybrid(config, where, compute)


def _machine(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
