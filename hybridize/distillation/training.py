"""The training loop: batches in, a trained student out, with metrics, held-out measures and resumable state on the way.

Knows nothing of checkpoints' formats or of the command line; `report` is told what happens.
"""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hybridize.distillation.losses import Loss
from hybridize.distillation.measure import fidelity
from hybridize.distillation.packing import Batch
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.schedule import cosine
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, can_graph
from hybridize.errors import WorkError
from hybridize.runtime import compile_layers

Report = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


def choose_trained(student: nn.Module, train: str) -> None:
    """Sets requires_grad by `train` (see DistillSettings)."""
    frozen: set[int] = set()
    if train != "all":
        ends = (student.get_input_embeddings(), student.get_output_embeddings())  # type: ignore[operator]
        frozen = {id(p) for module in ends for p in module.parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(id(parameter) not in frozen and (train != "mixers" or "mixer." in name))


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.AdamW:
    """AdamW (.9, .95) with a rate for mixers and one for the rest; decay only on matrices, never on A_log."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rate = settings.lr_mixer if "mixer." in name else settings.lr
            plain = parameter.ndim < 2 or name.endswith("A_log")
            groups.setdefault((rate, 0.0 if plain else settings.weight_decay), []).append(parameter)
    if not groups:
        raise WorkError("nothing to train: the checkpoint has no Mamba layer and --train is mixers")
    fused = next(student.parameters()).device.type == "cuda"
    parts = [{"params": params, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    return torch.optim.AdamW(parts, betas=(0.9, 0.95), fused=fused)


def update(student: nn.Module, optimizer: torch.optim.AdamW, factor: float, clip: float, keep_grads: bool = False) -> Tensor:
    """One optimizer step at `factor` of the peak rates; returns the gradient norm before clipping.

    keep_grads: gradients become zeros in place instead of None.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    norm = nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep_grads)
    return norm


def _speed_up(student: nn.Module, teacher: nn.Module | None, settings: DistillSettings) -> None:
    if settings.cuda_graph and not can_graph(student, teacher, settings.seq_len):
        raise WorkError("--cuda-graph needs a CUDA device, SDPA attention and no sliding window shorter than --seq-len")
    for model in (student, teacher):
        if settings.compile and model is not None:
            compile_layers(model)


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterator[Batch],
    heldout: list[Batch],
    settings: DistillSettings,
    run: RunDir,
    *,
    dtype: torch.dtype,
    log_every: int = 1,
    resume: bool = False,
    report: Report = lambda _: None,
) -> int:
    """Runs to the last step; returns the tokens of this run. `batches` starts at the first step also when resuming.

    Raises WorkError when the loss or gradient is not finite. Whatever else stops it, the last finished step is saved first.
    """
    loss = Loss.parse(settings.loss, settings.temperature)
    device, steps = next(student.parameters()).device, settings.total_steps
    choose_trained(student, settings.train)
    optimizer = make_optimizer(student, settings)
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    _speed_up(student, teacher, settings)
    start = run.load(student, optimizer, device) if resume else 0
    for _ in range(start):
        next(batches)
    held = [batch.to(device) for batch in heldout]

    def measure(step: int) -> None:
        if held and teacher is not None:
            student.eval()
            with torch.compiler.set_stance("force_eager"):  # a few batches are not worth graphs of their own
                found = vars(fidelity(student, teacher, held, dtype))
            record = {"step": step, "tokens": step * tokens_a_step, "heldout_tokens": found.pop("tokens"), **found}
            run.log("eval", record)
            report({"kind": "eval", **record})

    guide = teacher if loss.needs_teacher else None
    accumulate = Accumulator(student, guide, loss, settings.micro, dtype, settings.cuda_graph)
    tokens_a_step, finished, spent, warm_up = settings.batch_size * settings.seq_len, start, 0.0, 0.0
    pending: list[tuple[int, Tensor, Tensor, float]] = []  # losses stay on the device until they are logged

    def flush() -> dict[str, Any]:
        """Logs what is pending; WorkError at the first step that is not finite."""
        record: dict[str, Any] = {}
        while pending:
            at, value, norm, factor = pending[0]
            record = {
                "step": at, "tokens": at * tokens_a_step, "loss": float(value), "lr": settings.lr_mixer * factor,
                "lr_rest": settings.lr * factor, "grad_norm": float(norm), "seconds": round(spent, 3),
            }  # fmt: skip
            if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
                raise WorkError(f"step {at}: the loss is {record['loss']}, the gradient norm {record['grad_norm']}")
            run.log("metrics", record)
            del pending[0]
        return record

    try:
        if not start:
            measure(0)
        while finished < steps:
            began = time.perf_counter()
            batch = next(batches).to(device)
            student.train()
            value = accumulate(batch)
            factor = cosine(finished, steps, min(settings.warmup_steps, steps // 2))
            with uninterrupted():
                norm = update(student, optimizer, factor, settings.clip, keep_grads=settings.cuda_graph)
                finished += 1
                pending.append((finished, value, norm, factor))
            logs = finished % log_every == 0 or finished == steps
            saves = settings.save_every and (finished % settings.save_every == 0 or finished == steps)
            first = finished == start + 1
            if logs or saves or first:
                loss_so_far = float(value)  # waits for the device, so that the time is the step's own
            spent += time.perf_counter() - began
            warm_up = spent if first else warm_up
            if logs or saves:
                record = flush()
                # the first step loads, tunes and compiles kernels, which says nothing about those to come
                rate = tokens_a_step / spent if first else (finished - start - 1) * tokens_a_step / (spent - warm_up)
                left = (steps - finished) * tokens_a_step / rate
                if logs:
                    speed = {
                        "steps": steps,
                        "tokens_per_second": rate,
                        "seconds_left": left,
                        "loss": loss_so_far,
                        "first_step_seconds": warm_up,
                    }
                    report({"kind": "step", **record, **speed})
            if saves:
                run.save(student, optimizer, finished)
            if settings.eval_every and finished % settings.eval_every == 0 and finished != steps:
                measure(finished)
        measure(steps)
    except BaseException as error:
        # Whatever stopped the run, its finished steps are kept, unless the loss is not finite and they are worthless.
        if finished > start and not isinstance(error, WorkError):
            with contextlib.suppress(Exception):
                flush()
                run.save(student, optimizer, finished)
        raise
    return steps * tokens_a_step


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back SIGINT and SIGTERM until the block is done: an optimizer step is taken whole or not at all."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, _: held.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def prefetched(items: Iterator[Item], depth: int = 4) -> Iterator[Item]:
    """The same items, made by a thread up to `depth` ahead, so that tokenising does not hold up the device."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # handed to the consumer
            put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
