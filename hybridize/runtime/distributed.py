"""The processes of one run under torchrun: who they are, sums over them, and models sharded over
them (FSDP2).

One process is a run without any of this: nothing is wrapped, sums are the tensors themselves.
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

PATIENCE = timedelta(days=7)  # a checkpoint of 140 GB is not written in ten minutes
BUCKET_BYTES = 64 << 20  # gradients that travel together


@dataclass(frozen=True)
class DistributedContext:
    """group: over which processes talk, and wait for one that writes or has more to do; no GPU
    waits there."""

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, value: Any) -> Any:
        """What the first rank has, on all: clocks and files may look different from rank to rank,
        decisions must not."""
        if self.size > 1:
            box = [value]
            dist.broadcast_object_list(box, 0, self.group)
            value = box[0]
        return value

    def all(self, value: Any) -> list[Any]:
        """What each rank has, in their order, on all."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.group)
        return values

    def found(self, text: str) -> str:
        """The first rank's text that is not empty, on all."""
        return next(filter(None, self.all(text)), "")

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier(self.group)

    def another_group(self) -> Any:
        """A group of the same ranks for a thread of its own, whose messages would get among those
        of the training."""
        return dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None

    def share(self, rows: int, what: str) -> slice:
        """This rank's part of `rows` sequences. InputError unless all parts are equal, since ranks
        work in step."""
        if rows % self.size:
            raise InputError(f"{setting(what)} {rows} cannot be split evenly over {self.size} processes")
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def world_size() -> int:
    """How many processes torchrun has announced, one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> tuple[DistributedContext, torch.device]:
    """The process group that torchrun announces in the environment, and this rank's own device; one
    rank without it.

    In the middle of a step ranks wait for one another as long as torch's defaults have it (10
    minutes on GPUs), else PATIENCE.
    """
    size = world_size()
    if size == 1:
        return DistributedContext(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, _ = next(rendezvous("env://"))
        # torchrun --max-restarts hands on the store of the processes that died, in which their
        # addresses still are
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo beside NCCL: checkpoints are written from the CPU's copies
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return DistributedContext(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=PATIENCE)), device


def leave() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def small(model: nn.Module) -> dict[str, nn.Parameter]:
    """A_log, D and dt bias: whole on every rank and float32 under every policy, since bfloat16
    loses decays and steps."""
    return {name: p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in FLOAT32}


def fill(model: nn.Module, module: nn.Module, source: CheckpointReader, device: torch.device) -> None:
    """Reads the weights of `module`, a part of `model` without storage, onto `device`."""
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
    """Shards the weights of `model` over all ranks, each layer as one unit, the rest with `root`,
    which holds it.

    Weights that belong to neither stay whole. dtype: what weights are gathered and computed in;
    gradients are summed in float32. `root` must be what is called. source: where weights without
    storage are read from, layer by layer, so that no rank ever holds more than its share and one
    layer.
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
    """Parameters are their shards again: a forward pass without a backward leaves those of the root
    gathered."""
    if isinstance(root, FSDPModule):
        root.reshard()


def average_gradients(model: nn.Module, ranks: DistributedContext) -> None:
    """The mean over the ranks for all parameters that are whole on each, as FSDP has it for those
    that it sharded."""
    if ranks.size == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    for bucket in _buckets(grads):  # a message each for hundreds of small gradients would take longer than their bytes
        if len(bucket) == 1:  # as large as an embedding: no copy
            ranks.sum(bucket[0]).div_(ranks.size)
            continue
        flat = ranks.sum(torch.cat([g.flatten() for g in bucket])).div_(ranks.size)
        parts = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of one type, each of at most BUCKET_BYTES or of one tensor."""
    bucket: list[Tensor] = []
    held = 0
    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or held + grad.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(grad)
        held += grad.nbytes
    if bucket:
        yield bucket


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
