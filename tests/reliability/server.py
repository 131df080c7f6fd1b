"""Runs hybridize's commands as processes of their own, a fork each, so that a run costs what the
command does and no imports.

`python -m tests.reliability.server` reads a request a line (JSON) and answers each with one.
`Server` is its other end. A fault strikes after so many seconds, or at the k-th time that the
command touches its working directory through Python: opens, renames, removes or makes a file there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import mmap
import os
import pkgutil
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOUCHES = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir", "os.scandir", "os.truncate", "os.link")
)  # fmt: skip
LIMIT = 120.0
ROOM = 1 << 20


class Server:
    """`run` may be called by one thread at a time."""

    def __init__(self) -> None:
        there = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **there}, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def run(self, argv: list[str], cwd: Path, **fault: Any) -> dict[str, Any]:
        """rc (negative: the signal it died of), seconds, events (touches), stdout, stderr, peak
        (MiB)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), **fault}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server died"
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def watch(counter: mmap.mmap, cwd: str, event: int | None, act: Any) -> None:
    """Counts touches below `cwd`; `act` at the one numbered `event`."""
    inside, busy = cwd + os.sep, [False]

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if name not in TOUCHES or busy[0]:
            return
        if isinstance(args[0], int):  # opened already
            return
        path = os.path.join(cwd, os.fsdecode(args[0])) if args[0] is not None else cwd
        if not path.startswith(inside):
            return
        busy[0] = True  # what follows may touch files itself
        count = struct.unpack("q", counter[:8])[0] + 1
        counter[:8] = struct.pack("q", count)
        if count == event:
            act()
        busy[0] = False

    sys.addaudithook(hook)


def drop_rights() -> None:
    """Root, for whom modes of files mean nothing, becomes a user like others, who owns root's
    files."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def child(told: dict[str, Any], counter: mmap.mmap, out: Path, pipes: list[tuple[int, int]]) -> None:
    from hybridize.commands import main

    os.chdir(told["cwd"])
    os.environ.update(told.get("env", {}), TMPDIR=str(out))
    for number, pipe in zip((1, 2), pipes, strict=True):
        os.dup2(pipe[1], number)
    if told.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_limit"],) * 2)
    if told.get("ordinary"):
        drop_rights()
    at, what = told.get("event"), told.get("signal")

    def act() -> None:
        if what is not None:
            os.kill(os.getpid(), getattr(signal, f"SIG{what}"))
        if told.get("remove"):
            shutil.rmtree(told["remove"], ignore_errors=True)

    watch(counter, told["cwd"], at, act)
    code = 0
    try:
        sys.argv = ["hybridize", *told["argv"]]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    home = Path("/tmp") / f"hybridize-reliability-{os.getpid()}"
    for line in sys.stdin:
        told = json.loads(line)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        home.chmod(0o777)
        counter, began = mmap.mmap(-1, 8), time.monotonic()
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]  # no files: those have limits
        for read, _ in pipes:
            fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, ROOM)
            os.set_blocking(read, False)
        pid = os.fork()
        if pid == 0:
            child(told, counter, home, pipes)
        after, limit, killed = told.get("after"), told.get("limit", LIMIT), False
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            spent = time.monotonic() - began
            if done:
                break
            if after is not None and spent >= after:
                os.kill(pid, getattr(signal, f"SIG{told['signal']}"))
                after = None
            if spent > limit and not killed:
                os.kill(pid, signal.SIGKILL)
                killed = True
            time.sleep(0.002)
        texts = {name: drained(*pipe) for name, pipe in zip(("stdout", "stderr"), pipes, strict=True)}
        left = sorted(path.name for path in home.iterdir())
        answer = {
            "rc": os.waitstatus_to_exitcode(status), "seconds": spent, "events": struct.unpack("q", counter[:8])[0],
            "peak": used.ru_maxrss / 1024, "hung": killed, "left": left, **texts,
        }  # fmt: skip
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    shutil.rmtree(home, ignore_errors=True)


def drained(read: int, write: int) -> str:
    os.close(write)
    text = b""
    with contextlib.suppress(BlockingIOError):  # a grandchild may live on
        while part := os.read(read, ROOM):
            text += part
    os.close(read)
    return text.decode(errors="replace")


def preload() -> None:
    """All that commands import, with nothing computed: a fork has no threads but the one that
    forks."""
    import torch

    import hybridize

    torch.set_num_threads(1)
    for name in ("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks", "datasets", "matplotlib.pyplot", "gguf"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for package in (hybridize, importlib.import_module("hybridize.commands")):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(("__main__", "demo.make", "decode_kernel")):
                with contextlib.suppress(ImportError):
                    importlib.import_module(found.name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401


if __name__ == "__main__":
    serve()
