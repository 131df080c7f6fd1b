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

from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.distillation.measure import fidelity, hidden_states, output_weight
from hybridize.distillation.packing import Batch
from hybridize.distillation.run_dir import RunDir
from hybridize.distillation.schedule import cosine
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import WorkError

Report = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


def accumulate(
    student: nn.Module, teacher: nn.Module | None, batch: Batch, loss: Loss, micro: int, dtype: torch.dtype
) -> Tensor:
    """Adds the gradient of the mean loss over all kept tokens of `batch`; returns that mean, detached."""
    count, total = batch.kept, torch.zeros((), device=batch.ids.device)
    if count == 0:
        return total
    for part in batch.split(micro):
        kept = part.keep.flatten()
        hidden = hidden_states(student, part, dtype).flatten(0, 1)[kept]
        teacher_hidden = teacher_weight = None
        if teacher is not None:
            with torch.no_grad():
                teacher_hidden = hidden_states(teacher, part, dtype).flatten(0, 1)[kept]
                teacher_weight = output_weight(teacher).to(dtype)
        value = chunked_loss(
            hidden, output_weight(student), teacher_hidden, teacher_weight, part.labels.flatten()[kept], loss,
            count=count, dtype=dtype,
        )  # fmt: skip
        value.backward()
        total = total + value.detach()
    return total


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


def update(student: nn.Module, optimizer: torch.optim.AdamW, factor: float, clip: float) -> Tensor:
    """One optimizer step at `factor` of the peak rates; returns the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    norm = nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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
    start = run.load(student, optimizer, device) if resume else 0
    for _ in range(start):
        next(batches)
    held = [batch.to(device) for batch in heldout]

    def measure(step: int) -> None:
        if held and teacher is not None:
            student.eval()
            found = vars(fidelity(student, teacher, held, dtype))
            record = {"step": step, "tokens": step * tokens_a_step, "heldout_tokens": found.pop("tokens"), **found}
            run.log("eval", record)
            report({"kind": "eval", **record})

    tokens_a_step, finished, spent = settings.batch_size * settings.seq_len, start, 0.0
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
            value = accumulate(student, teacher if loss.needs_teacher else None, batch, loss, settings.micro, dtype)
            factor = cosine(finished, steps, min(settings.warmup_steps, steps // 2))
            with uninterrupted():
                norm = update(student, optimizer, factor, settings.clip)
                finished += 1
                pending.append((finished, value, norm, factor))
            logs = finished % log_every == 0 or finished == steps
            saves = settings.save_every and (finished % settings.save_every == 0 or finished == steps)
            if logs or saves:
                loss_so_far = float(value)  # waits for the device, so that the time is the step's own
            spent += time.perf_counter() - began
            if logs or saves:
                record = flush()
                rate = (finished - start) * tokens_a_step / spent
                left = (steps - finished) * tokens_a_step / rate
                if logs:
                    speed = {"steps": steps, "tokens_per_second": rate, "seconds_left": left, "loss": loss_so_far}
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
