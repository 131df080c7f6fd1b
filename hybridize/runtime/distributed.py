"""Distributed runs under torchrun: ranks, reductions over them, and sharded models (FSDP2).

With a single process nothing is wrapped and reductions return their input.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from hybridize.checkpoint.experts import holds, read_parameter
from hybridize.checkpoint.reader import CheckpointReader
from hybridize.errors import InputError, setting
from hybridize.modeling import FLOAT32

PATIENCE = timedelta(days=7)  # writing a checkpoint of 140 GB takes longer than torch's default timeout
BUCKET_BYTES = 64 << 20  # gradients reduced in one message


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, the number of processes, and a CPU group for objects and barriers, on
    which ranks wait for one that writes or has more work, without blocking a GPU."""

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, value: Any) -> Any:
        """Returns the first rank's value on all ranks: clocks and files may differ between ranks,
        but decisions must not."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, 0, self.group)
            value = box[0]
        return value

    def all(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, ordered by rank, on all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def found(self, text: str) -> str:
        """Returns the first non-empty text, ordered by rank, on all ranks; else an empty string."""
        return next(filter(None, self.all(text)), "")

    def wait(self) -> None:
        """Waits until all ranks have called this."""
        if self.size > 1:
            dist.barrier(self.group)

    def another_group(self) -> Any:
        """Returns a new CPU group of the same ranks for use in another thread, so that its messages
        do not mix with those of training; None for one process."""
        return dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    def share(self, rows: int, what: str) -> slice:
        """Returns this rank's slice of `rows` sequences. Raises InputError unless all slices are
        equally long, since ranks work in lockstep. what: the setting that gives `rows`."""
        if rows % self.size:
            raise InputError(f"{setting(what)} {rows} cannot be split evenly over {self.size} processes")
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def world_size() -> int:
    """Returns the number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> tuple[DistributedContext, torch.device]:
    """Joins the process group described by torchrun's environment variables; returns it and this
    rank's own device. Without torchrun it is one process.

    Collectives on GPUs have torch's default timeout (10 minutes), those of `group` have PATIENCE.
    """
    size = world_size()
    if size == 1:
        return DistributedContext(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, _ = next(rendezvous("env://"))
        # torchrun --max-restarts reuses the store, which still holds the addresses of the processes
        # that died
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo in addition to NCCL: checkpoints are written from copies on the CPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return DistributedContext(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=PATIENCE)), device


def leave() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def small(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A_log, D and dt bias by name. They are not sharded and stay float32 under every
    policy, since bfloat16 loses small decays and steps."""
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in FLOAT32}


def fill(model: nn.Module, module: nn.Module, source: CheckpointReader, device: torch.device) -> None:
    """Reads the weights of `module`, a part of `model` that is on the meta device, onto `device`."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if holds(source, name)}
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = read_parameter(source, names[id(parameter)]).to(device, parameter.dtype)
                setattr(part, key, nn.Parameter(value, parameter.requires_grad))


def shard(
    root: nn.Module,
    model: Any,
    ranks: DistributedContext,
    device: torch.device,
    dtype: torch.dtype | None,
    source: CheckpointReader | None,
) -> None:
    """Shards the weights of `model` over all ranks: each layer as one unit, the rest together with
    `root`, which contains the model and must be the module that is called.

    Parameters of `small` stay whole. dtype: in which weights are gathered and computed; gradients
    are summed in float32. source: where weights on the meta device are read from, layer by layer,
    so that no rank ever holds more than its share and one layer.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def split(module: nn.Module) -> None:
        if source is not None:
            fill(model, module, source, device)
        whole = set(small(module).values())
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)

    for layer in model.base_model.layers:
        split(layer)
    if source is not None:
        fill(model, model, source, device)
        model.tie_weights()
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=set(small(model).values()))


def reshard(root: nn.Module) -> None:
    """Frees gathered parameters: a forward pass without a backward leaves those of the root
    gathered."""
    if isinstance(root, FSDPModule):
        root.reshard()


def average_gradients(model: nn.Module, ranks: DistributedContext) -> None:
    """Averages over the ranks the gradients of all parameters that are not sharded, in place; FSDP
    averages those of sharded ones."""
    if ranks.size == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    for bucket in _buckets(grads):  # one message per small gradient would be bound by latency
        if len(bucket) == 1:  # may be as large as an embedding: avoid the copy
            ranks.sum(bucket[0]).div_(ranks.size)
            continue
        flat = ranks.sum(torch.cat([g.flatten() for g in bucket])).div_(ranks.size)
        parts = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields consecutive gradients of one dtype, each list of at most BUCKET_BYTES or of one
    tensor."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or size + grad.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor on every rank; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
