"""Distillation speed on one GPU: tokens a second, memory, and where the time goes. Random weights:
speed does not read them.

python -m tests.benchmarks.distill step --ways eager compiled-graph naive liger trl-gkd   # one
optimizer step, ways interleaved python -m tests.benchmarks.distill step --ways eager
# one way: its peak beside the plan's python -m tests.benchmarks.distill parts --shape smollm2
# each part of a step alone, as a graph python -m tests.benchmarks.distill loss --tokens 4096
--hidden 5120 --vocab 131072 # projection, reverse KL and gradient alone

Model FLOPs are those of hybridize.distillation.watch.model_flops; MFU is of --peak TFLOP/s.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hybridize.data.packing import Batch
from hybridize.distillation.losses import Loss, chunked_loss
from hybridize.distillation.optimize import choose_trained, clip_gradients, make_optimizer
from hybridize.distillation.plan import GIB, plan
from hybridize.distillation.settings import DistillSettings
from hybridize.distillation.step import Accumulator, Student
from hybridize.distillation.watch import model_flops
from hybridize.modeling import HybridConfig, HybridForCausalLM
from hybridize.runtime.device import captured, compile_layers
from hybridize.runtime.forward import hidden_states, output_weight
from hybridize.runtime.packed_attention import use_packed_attention
from tests.benchmarks.rivals import CHUNKED, Gkd, chunked, reverse_kl

OURS = ["eager", "compiled", "graph", "compiled-graph"]
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-3b": dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    ),
}  # fmt: skip


def models(shape: str, mixer: str, device: torch.device, dtype: torch.dtype) -> tuple[HybridForCausalLM, LlamaForCausalLM]:
    """A student, every other layer a mixer, float32, and its frozen teacher."""
    common = dict(SHAPES[shape], max_position_embeddings=8192)
    inner, head = common["num_attention_heads"] * common["head_dim"], common["head_dim"]
    kind = {"kind": "mamba2", "d_inner": inner, "d_state": head, "d_conv": 4}
    if mixer == "mamba":
        rank = -(-common["hidden_size"] // 16)
        kind = {"kind": "mamba", "d_inner": inner, "d_state": 16, "d_conv": 4, "dt_rank": rank, "expand": "head"}
    layers = ["linear_attention" if i % 2 else "full_attention" for i in range(common["num_hidden_layers"])]
    with torch.device(device):
        student = HybridForCausalLM(HybridConfig(base_model_type="llama", mixer=kind, layer_types=layers, **common))
        teacher = LlamaForCausalLM(LlamaConfig(**common)).to(dtype).eval()
    return student.train(), teacher.requires_grad_(False)


def random_batch(rows: int, length: int, vocabulary: int, documents: int, device: torch.device) -> Batch:
    """documents: how many are packed into each row."""
    ids = torch.randint(0, vocabulary, (rows, length + 1), device=device)
    positions = (torch.arange(length, device=device) % -(-length // documents)).expand(rows, -1) if documents > 1 else None
    keep = torch.ones(rows, length, dtype=torch.bool, device=device)
    return Batch(ids[:, :-1].contiguous(), positions, ids[:, 1:].contiguous(), keep)


def naive(student: Any, teacher: Any, batch: Batch, micro: int, dtype: torch.dtype) -> None:
    """What one writes first: whole logits, float32 softmax, autograd."""
    for part in batch.split(micro):
        with torch.autocast(batch.ids.device.type, dtype):
            ours = student(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
            with torch.no_grad():
                theirs = teacher(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
        log_q, log_p = F.log_softmax(ours.float(), -1), F.log_softmax(theirs.float(), -1)
        value = (log_q.exp() * (log_q - log_p)).sum(-1)[part.loss_mask].sum() / batch.kept
        value.backward()


def stepped(student: Any, optimizer: torch.optim.AdamW, keep: bool = False) -> None:
    """What follows a gradient. keep: zeros in place, as a graph needs them."""
    clip_gradients(student, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * 1e-6
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep)


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int, cuda: bool) -> dict[str, tuple[float, float, float]]:
    """Of each way: median and spread in milliseconds, and its peak memory in GiB above what was
    there before."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0.0)
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        wait()
        print(f"  {name}: first run {time.perf_counter() - began:.1f} s", flush=True)
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            way()  # fills the allocator's pools again
            wait()
            began = time.perf_counter()
            way()
            wait()
            times[name].append((time.perf_counter() - began) * 1e3)
            if cuda:
                peaks[name] = max(peaks[name], (torch.cuda.max_memory_allocated() - before) / 2**30)
    return {name: (statistics.median(t), max(t) - min(t), peaks[name]) for name, t in times.items()}


def _told(loop: Callable[..., None], student: Any, teacher: Any, micro: int, dtype: torch.dtype, batch: Batch) -> None:
    loop(student, teacher, batch, micro, dtype)


def step(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    loss = Loss()
    flops = 0
    ways: dict[str, Callable[[], Any]] = {}
    sizes = {"batch_size": args.rows, "micro_batch_size": args.micro, "seq_len": args.length}
    for name in args.ways:
        student, teacher = models(args.shape, args.mixer, device, dtype)
        batch = random_batch(args.rows, args.length, student.config.vocab_size, args.documents, device)
        settings = DistillSettings(steps=1, train=args.train, gradient_checkpointing=args.checkpointing)
        choose_trained(student, settings)
        flops = model_flops(student, teacher)
        if args.checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make_optimizer(student, settings)
        if name in OURS and device.type == "cuda":
            use_packed_attention(student)
            use_packed_attention(teacher)
        if "compiled" in name:
            compile_layers(student)
            compile_layers(teacher)
        if name in OURS:
            gradient: Callable[..., Any] = Accumulator(
                Student(student, loss, dtype), teacher, args.micro, graph="graph" in name
            )
        elif name == "trl-gkd":
            gradient = Gkd(student, teacher, args.micro)
        else:
            loop = naive if name == "naive" else functools.partial(chunked, name)
            gradient = functools.partial(_told, loop, student, teacher, args.micro, dtype)

        def way(name=name, student=student, batch=batch, optimizer=optimizer, gradient=gradient) -> None:  # type: ignore[no-untyped-def]
            gradient(batch)
            stepped(student, optimizer, keep="graph" in name)

        ways[name] = way
    tokens = args.rows * args.length
    packed = f", {args.documents} documents a row" if args.documents > 1 else ""
    print(f"{args.shape}, {args.mixer}, {args.rows} x {args.length}{packed}, micro-batch {args.micro}, train {args.train}")
    for name, (ms, spread, peak) in interleaved(ways, args.repeats, device.type == "cuda").items():
        rate = tokens / ms
        mfu = flops * tokens / (ms / 1e3) / (args.peak * 1e12)
        print(
            f"{name:14} {ms:8.1f} ms (spread {spread:.1f})  {rate:7.1f} k tokens/s  MFU {mfu:.1%}  peak +{peak:.2f} GiB",
            flush=True,
        )
    if len(args.ways) == 1 and device.type == "cuda":
        planned = plan(student, teacher, replace(settings, **sizes), 1, dtype).total / GIB
        # what a graph holds counts as reserved only
        measured = (torch.cuda.max_memory_reserved() if "graph" in args.ways[0] else torch.cuda.max_memory_allocated()) / GIB
        print(f"peak of all: {measured:.2f} GiB, planned {planned:.2f} GiB ({planned / measured - 1:+.1%})")


def as_graph(way: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph: what a small part costs the GPU, without its launches."""
    graph, _ = captured(way)

    def replay(_: Any = way) -> None:  # what the graph reads lives as long as the way does
        graph.replay()

    return replay


def parts(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    student, teacher = models(args.shape, args.mixer, device, dtype)
    config = student.config
    settings = DistillSettings(steps=1, train=args.train)
    choose_trained(student, settings)
    optimizer = make_optimizer(student, settings)
    if device.type == "cuda":
        use_packed_attention(student)
        use_packed_attention(teacher)
    if args.compiled:
        compile_layers(student)
        compile_layers(teacher)
    for parameter in student.parameters():  # before any graph adds to them
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch = random_batch(args.micro, args.length, config.vocab_size, args.documents, device)
    hidden = torch.randn(args.micro, args.length, config.hidden_size, device=device)
    at = torch.arange(args.length, device=device).unsqueeze(0) if batch.positions is None else batch.positions
    told = {} if batch.positions is None else {"cu_seq_lens_q": batch.boundaries(batch.documents)}
    extra = student.model.layer_inputs(hidden, None, at, packed=batch.positions is not None, **told)
    extra = {kind: {**given, "position_ids": at} for kind, given in extra.items()}
    kinds = {kind: config.layer_types.index(kind) for kind in set(config.layer_types)}

    def both(module: Callable[..., Any], **given: Any) -> Callable[[], None]:
        x = hidden.clone().requires_grad_()

        def run() -> None:
            with torch.autocast(device.type, dtype):
                out = module(x, **given)
            out = out[0] if isinstance(out, tuple) else out
            out.backward(torch.ones_like(out))

        return run

    ways: dict[str, Callable[[], Any]] = {}
    counts: dict[str, float] = {}

    def add(name: str, way: Callable[[], Any], count: float) -> None:
        ways[name], counts[name] = as_graph(way) if device.type == "cuda" else way, count

    per_step = args.rows / args.micro
    layers = student.model.layers
    add(
        "student, forward and backward",
        both(lambda x: student.model(inputs_embeds=x, position_ids=batch.positions, **told).last_hidden_state),
        per_step,
    )
    for kind, index in kinds.items():
        count = per_step * config.layer_types.count(kind)
        add(f"  a whole layer, {kind}", both(layers[index], **extra[kind]), count)
        add(f"  its mixer alone, {kind}", both(layers[index].self_attn, **extra[kind]), count)
    add("  an MLP alone", both(layers[0].mlp), per_step * config.num_hidden_layers)
    add("  a norm alone", both(layers[0].input_layernorm), per_step * 2 * config.num_hidden_layers)
    with torch.no_grad():
        theirs = torch.randn(args.micro * args.length, config.hidden_size, device=device, dtype=dtype)
    ours = torch.randn(args.micro * args.length, config.hidden_size, device=device, requires_grad=True)

    def of_loss() -> None:
        weights = output_weight(student), output_weight(teacher)
        chunked_loss(
            ours, weights[0], theirs, weights[1], batch.labels.flatten(), Loss(), scale=1 / 1000, dtype=dtype
        ).backward()

    def of_teacher() -> None:
        with torch.no_grad():
            hidden_states(teacher, batch, dtype)

    add("teacher, forward", of_teacher, per_step)
    add("loss", of_loss, per_step)

    def of_optimizer() -> None:
        stepped(student, optimizer, keep=True)

    ways["optimizer and clipping"], counts["optimizer and clipping"] = of_optimizer, 1  # looks at the host, fills no GPU
    print(f"{args.shape}, {args.mixer}, micro-batch {args.micro} x {args.length}, {per_step:g} a step; each part alone")
    for name, (ms, _, _) in interleaved(ways, args.repeats, device.type == "cuda").items():
        print(f"{name:40} {ms:8.2f} ms x {counts[name]:5.1f} = {ms * counts[name]:8.1f} ms a step", flush=True)


def loss_alone(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    n, width, vocabulary = args.tokens, args.hidden, args.vocab
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    weight, teacher_weight = (draw(vocabulary, width).mul_(width**-0.5) for _ in range(2))
    weight.requires_grad_()
    hidden, theirs = draw(n, width).requires_grad_(), draw(n, width)
    labels = torch.randint(0, vocabulary, (n,), device=device)

    def clear() -> None:
        weight.grad = hidden.grad = None

    def ours() -> None:
        chunked_loss(hidden, weight, theirs, teacher_weight, labels, Loss(), scale=1 / n, dtype=dtype).backward()
        clear()

    def kl(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        log_q, log_p = F.log_softmax((h @ weight.t()).float(), -1), F.log_softmax((t @ teacher_weight.t()).float(), -1)
        return (log_q.exp() * (log_q - log_p)).sum()

    def whole() -> None:
        (kl(hidden, theirs) / n).backward()
        clear()

    def chunks() -> None:
        parts = [checkpoint(kl, h, t, use_reentrant=False) for h, t in zip(hidden.split(1024), theirs.split(1024), strict=True)]
        (torch.stack(parts).sum() / n).backward()
        clear()

    def products() -> None:
        logits = hidden.detach() @ weight.detach().t()
        _ = theirs @ teacher_weight.t()
        _ = logits @ weight.detach()
        _ = logits.t() @ hidden.detach()

    def rival(way: str) -> Callable[[], None]:
        def run() -> None:
            reverse_kl(way, hidden, weight, theirs, teacher_weight, labels, n).backward()
            clear()

        return run

    offered = {"ours": ours, "naive": whole, "checkpointed": chunks, "products": products, **{w: rival(w) for w in CHUNKED}}
    gradients = (weight.numel() + hidden.numel()) * dtype.itemsize / 2**30
    print(f"{n} tokens x {width} x {vocabulary}, {dtype}; peaks include gradients of {gradients:.2f} GiB")
    for name, (ms, spread, peak) in interleaved(
        {w: offered[w] for w in args.ways}, args.repeats, device.type == "cuda"
    ).items():
        print(f"{name:14} {ms:8.1f} ms (spread {spread:.1f})  peak +{peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, ways in (
        ("step", [*OURS, "naive", *CHUNKED, "trl-gkd"]),
        ("parts", []),
        ("loss", ["ours", "naive", "checkpointed", "products", *CHUNKED]),
    ):
        sub = commands.add_parser(name)
        sub.add_argument("--repeats", type=int, default=5)
        if ways:
            own = [way for way in ways if way not in CHUNKED and way != "trl-gkd"]
            sub.add_argument("--ways", nargs="+", choices=ways, default=own)
        if name == "loss":
            for flag, default in (("--tokens", 4096), ("--hidden", 5120), ("--vocab", 131072)):
                sub.add_argument(flag, type=int, default=default)
            continue
        sub.add_argument("--shape", choices=SHAPES, default="smollm2")
        sub.add_argument("--mixer", choices=["mamba", "mamba2"], default="mamba2")
        sub.add_argument("--train", default="body")
        sub.add_argument("--peak", type=float, default=989, help="TFLOP/s of dense bfloat16 products.")
        sub.add_argument("--checkpointing", action="store_true")
        sub.add_argument("--compiled", action="store_true", help="parts: with the layers compiled.")
        for flag, default in (("--rows", 16), ("--length", 2048), ("--micro", 8), ("--documents", 1)):
            sub.add_argument(flag, type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}")
    {"step": step, "parts": parts, "loss": loss_alone}[args.command](args, device, dtype)


if __name__ == "__main__":
    main()
