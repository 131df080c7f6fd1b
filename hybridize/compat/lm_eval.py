"""Imports from lm-eval beyond its documented entry points. TRIED has the tested versions.

Importing this module imports lm-eval, which takes seconds, so import it only where it is needed.
`evaluation/harness.py` and `evaluation/answering.py` depend on the structure of its tasks, and
import what they build on from here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")  # both are read at import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tqdm
from lm_eval import evaluator
from lm_eval.api.filter import FilterEnsemble
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.filters.selection import TakeFirstFilter
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import env

__all__ = [
    "HFLM", "AggMetricConfig", "ConfigurableTask", "FilterEnsemble", "Group", "TakeFirstFilter", "TaskManager",
    "handle_stop_sequences", "hushed", "keep_templates", "normalize_gen_kwargs", "postprocess_generated_text",
    "simple_evaluate",
]  # fmt: skip
PROBES = ("get_git_commit_hash", "add_env_info")


def keep_templates() -> None:
    """Caches the compiled templates of tasks. lm-eval compiles them again for every document, which
    takes longer than a small model's answers."""
    if "from_string" not in vars(env):
        env.from_string = functools.cache(env.from_string)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Suppresses the tables of settings and the progress bars of lm-eval; our command reports
    instead."""
    for name in ("lm_eval", "lm-eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    before = tqdm.tqdm.__init__
    # It also runs git and pip to describe the machine, which takes seconds and prints errors
    # outside a repository.
    probes = {name: getattr(evaluator, name) for name in PROBES if hasattr(evaluator, name)}
    for name in probes:
        setattr(evaluator, name, lambda *_: None)

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.tqdm.__init__ = silent  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.tqdm.__init__ = before  # type: ignore[method-assign]
        for name, probe in probes.items():
            setattr(evaluator, name, probe)
