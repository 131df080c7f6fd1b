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
    """Which cells are timed, and how often."""

    contexts: Annotated[str, typer.Option("--contexts", help="Context lengths in tokens, separated by commas.")] = (
        "1024,4096,16384"
    )
    batches: Annotated[str, typer.Option("--batches", help="Batch sizes, separated by commas.")] = "1,16,64"
    generations: Annotated[
        str, typer.Option("--generations", help="PROMPT:NEW,... in tokens: throughput with the largest batch that fits.")
    ] = ""
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decoding steps per timing.")] = 16
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Number of timings, whose median is reported.")] = 5

    def settings(self) -> BenchSettings:
        """The flags as settings of the library; InputError for a list that cannot be parsed."""
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
        list[str], typer.Argument(metavar="CHECKPOINT...", help="The others are compared with the first one.")
    ],
    *,
    grid: Grid,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Use random weights; only config.json is read.")
    ] = False,
    memory: Annotated[float | None, typer.Option("--memory", help="Memory limit in GiB [default: the GPU's memory].")] = None,
    output: opt.Output = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    overwrite: opt.Overwrite = False,
    speech: opt.Speech,
) -> None:
    """Reads checkpoints, teachers or hybrids; writes bench.json and bench.png into ./bench (or -o):
    their speed.

    Times prefill, time to first token, and decoding steps over a grid of contexts and batches. All
    checkpoints run the same decoding step in one process, interleaved if they fit into memory
    together.
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
    write_json_atomic(path, found)  # last, so that a run that failed to draw can be repeated without --overwrite
    out.progress(f"wrote {path}", last=True)
    out.result({"bench": str(path), **found}, lambda: show_bench(out, path, found, names))


def _numbers(name: str, text: str, separator: str = ",") -> tuple[int, ...]:
    """A list of whole numbers; InputError if it is not one. name: the setting, for the message."""
    from hybridize.errors import InputError, setting

    try:
        return tuple(int(part) for part in text.split(separator) if part.strip())
    except ValueError as error:
        raise InputError(f"{setting(name)} {text!r} is not a list of whole numbers") from error


def _short(checkpoints: list[str]) -> list[str]:
    """Names for the checkpoints: the last parts of their paths, or whole paths if those are not
    unique."""
    last = [Path(name).name or name for name in checkpoints]
    names = last if len(set(last)) == len(last) else list(checkpoints)
    if len(set(names)) < len(names):
        from hybridize.errors import InputError

        raise InputError("the same checkpoint is given twice")
    return names


def _loader(
    out: Output, name: str, random_weights: bool, where: torch.device, compute: torch.dtype
) -> Callable[[], HybridForCausalLM]:
    """A function that loads the checkpoint. Its name and config are checked at once."""
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
    """Name of the GPU, or the CPU with its number of threads."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
