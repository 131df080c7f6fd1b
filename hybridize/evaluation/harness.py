"""Runs lm-eval's tasks, requests and metrics on a model in memory. Does not depend on gates or
layer scores."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hybridize.errors import InputError, WorkError, first_line, setting
from hybridize.evaluation.figures import matching
from hybridize.evaluation.recall import GROUP, LENGTHS, recall_group

if TYPE_CHECKING:
    from hybridize.checkpoint.journal import Journal
    from hybridize.runtime.distributed import DistributedContext

_RUNS = re.compile(
    r"\b(subprocess|code_eval)\b|\bexec\(|\bos\.(system|exec|popen)"
)  # in the source of a task's process_results
Progress = Callable[[int, int], None]  # called with (requests answered, requests in total)
# (tokens to read, tokens that the last positions should predict) per request -> (log-probability,
# whether each token was the most likely one) per request
Answerer = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[tuple[float, bool]]]


@dataclass(frozen=True)
class EvalSettings:
    """Everything that determines an evaluation's figures.

    limit: documents per task, or their share if below 1; batch_size: a number, `auto` or `auto:N`;
    gen_kwargs: in lm-eval's syntax (a=b,c=d); samples: answers to each document of a generating
    task; think_end: text that closes a reasoning block, which is not part of the answer;
    recall_lengths: lengths in tokens of the `recall` tasks."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | str = 8
    apply_chat_template: bool = False
    gen_kwargs: str | None = None
    include_path: str | None = None
    seed: int = 0
    samples: int = 1
    think_end: str | None = None
    recall_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"{setting('samples')} {self.samples} must be at least 1")
        if self.samples > 1 and "do_sample=true" not in (self.gen_kwargs or "").lower().replace(" ", ""):
            raise InputError(f"{setting('samples')} needs sampling: {setting('gen_kwargs')} do_sample=true,temperature=0.6")
        if self.think_end == "":
            raise InputError(f"{setting('think_end')} is empty")
        if not self.tasks:
            raise InputError(f"{setting('tasks')} is empty")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise InputError(f"{setting('limit')} {self.limit} must be a whole number of documents, or a share of them below 1")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise InputError(f"{setting('batch_size')} {self.batch_size} must be at least 1")
        if self.recall_lengths is not None and GROUP not in self.tasks:
            raise InputError(f"{setting('recall_lengths')} has no use without {setting('tasks')} {GROUP}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"{setting('num_fewshot')} {self.num_fewshot} must not be negative")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"{setting('include_path')} {self.include_path} is not a directory")

    def to_json(self) -> dict[str, Any]:
        """Returns the settings that two results must share to be comparable."""
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "include_path"}
        if self.recall_lengths is None:
            del found["recall_lengths"]
        return found


def parse_limit(text: str | None) -> float | None:
    """`100` -> 100, `0.1` -> 0.1, as in lm-eval. InputError for text that is not a number."""
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise InputError(f"{setting('limit')} {text} is neither a number of documents nor a share of them") from error


def parse_batch_size(text: str) -> int | str:
    """`8` -> 8; `auto` and `auto:N` stay as they are. InputError for other text."""
    if text.isdecimal():
        return int(text)
    if re.fullmatch(r"auto(:\d+)?", text):
        return text
    raise InputError(f"{setting('batch_size')} {text} is neither a number nor auto or auto:N")


def task_names(text: str) -> tuple[str, ...]:
    """`gsm8k, mmlu` -> ("gsm8k", "mmlu")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_think_end(tokenizer: Any, text: str | None) -> None:
    """InputError if `text` can never appear in decoded output, because special tokens are left
    out."""
    if text is not None and text not in tokenizer.decode(
        tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True
    ):
        raise InputError(f"{setting('think_end')} {text}: the tokenizer leaves it out of decoded text (a special token?)")


def open_tasks(settings: EvalSettings, tokenizer: Any = None) -> Any:
    """Returns lm-eval's task manager. InputError naming the first task that it does not know.

    tokenizer: counts the lengths of `recall` documents.
    """
    from hybridize.compat.lm_eval import TaskManager, keep_templates

    keep_templates()
    unknown = [task for task in settings.tasks if task != GROUP]
    manager = None if unknown else TaskManager(include_defaults=False)
    for defaults in (False, True):  # indexing lm-eval's own tasks takes seconds, so only if needed
        if not unknown or (not defaults and settings.include_path is None):
            continue
        try:
            manager = TaskManager(include_path=settings.include_path, include_defaults=defaults)
        except Exception as error:  # a broken YAML raises whatever its loader raises
            raise InputError(f"{setting('include_path')} {settings.include_path}: {error}") from error
        unknown = [task for task in unknown if task not in set(manager.all_tasks)]
    if unknown:
        raise InputError(f"lm-eval has no task {unknown[0]!r}; a task of your own needs {setting('include_path')} DIR")
    return manager if GROUP not in settings.tasks else _with_recall(manager, settings, tokenizer)


def _with_recall(manager: Any, settings: EvalSettings, tokenizer: Any) -> Any:
    """Returns a copy of the task manager that also has the group `recall`."""
    if tokenizer is None:
        raise InputError(f"task {GROUP} needs a tokenizer and is supported by eval only")
    from hybridize.compat.lm_eval import hushed

    with hushed():
        group = recall_group(tokenizer, settings.recall_lengths or LENGTHS, settings.seed)
    kept, load = copy.copy(manager), manager.load
    kept.load = lambda names: load([group if name == GROUP else name for name in names])
    return kept


def repeatable(manager: Any) -> Any:
    """Returns a copy of the task manager that loads tasks and their data once and reuses them in
    later runs."""

    kept, load = copy.copy(manager), functools.cache(lambda names: manager.load(list(names)))
    kept.load = lambda names: load(tuple(names))
    return kept


def check_code(manager: Any, settings: EvalSettings, confirmed: bool) -> None:
    """Loads the tasks; InputError naming the first that executes code written by the model, unless
    that is `confirmed`. Such a task is marked unsafe in lm-eval, or the source of its
    process_results starts processes or executes text."""
    for name, task in _loaded(manager, settings).items():
        if not confirmed and (getattr(task, "UNSAFE_CODE", False) or _RUNS.search(_source_of_judge(task))):
            raise InputError(
                f"task {name} runs the code that the model writes; {setting('confirm_run_unsafe_code')} allows that"
            )


def _source_of_judge(task: Any) -> str:
    """Returns the source file of a task's own process_results function; empty if it has none."""
    function = getattr(getattr(task, "config", None), "process_results", None)
    code = getattr(getattr(function, "func", function), "__code__", None)
    try:
        return "" if code is None else Path(code.co_filename).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def check_metrics(manager: Any, settings: EvalSettings, chosen: Mapping[str, str]) -> None:
    """Loads the tasks; InputError if `metric` names a task or group that was not requested, or a
    figure that it does not have."""
    loaded = _load(manager, settings)
    for name, metric in chosen.items():
        tasks = [loaded["tasks"][name]] if name in loaded["tasks"] else []
        tasks += loaded["groups"][name].get_all_tasks() if name in loaded["groups"] else []
        if not tasks:
            raise InputError(f"{setting('metric')} names {name!r}, which is not in {setting('tasks')}")
        figures = {f"{one},{filter_.name}": None for task in tasks for one in task.aggregation() for filter_ in task._filters}
        if not matching(figures, metric):
            raise InputError(f"{setting('metric')} {name}={metric}: the task has {'; '.join(figures)}")


def check_choices(manager: Any, settings: EvalSettings) -> None:
    """Loads the tasks; InputError naming the first that needs more than log-likelihoods of
    answers."""
    for name, task in _loaded(manager, settings).items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise InputError(
                f"task {name} is of kind {task.OUTPUT_TYPE}; scoring layers needs multiple-choice or log-likelihood tasks"
            )


def generates(manager: Any, settings: EvalSettings) -> bool:
    """Loads the tasks; whether any of them generates text."""
    return any(task.OUTPUT_TYPE == "generate_until" for task in _loaded(manager, settings).values())


def _loaded(manager: Any, settings: EvalSettings) -> dict[str, Any]:
    return dict(_load(manager, settings)["tasks"])


def _load(manager: Any, settings: EvalSettings) -> dict[str, Any]:
    from hybridize.compat.lm_eval import hushed

    try:
        with hushed():
            return dict(manager.load(list(settings.tasks)))
    except Exception as error:
        raise WorkError(f"lm-eval could not load {','.join(settings.tasks)}: {first_line(error)}") from error


def evaluate(
    model: nn.Module, tokenizer: Any, settings: EvalSettings, manager: Any, answer: Answerer | None = None,
    journal: Journal | None = None, ranks: DistributedContext | None = None, progress: Progress = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Returns lm-eval's results with per-document samples, and under `cut` the number of answers
    per task that reached the length limit. WorkError if lm-eval fails, for example to load data.

    answer: replaces the model for tasks that `check_choices` accepts; called with all requests (see
    Answerer), and `cut` is then missing. journal: stores answers so that an evaluation can resume.
    ranks: split the requests; only the first rank returns results, the others an empty object.
    """
    from hybridize.compat.lm_eval import HFLM, hushed, simple_evaluate

    from .answering import Answering, vote

    class Delegating(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            assert answer is not None
            longest = self.max_length + 1  # what does not fit is cut off at the left, as lm-eval does
            return answer([((context + wanted)[-longest:][:-1], wanted) for _, context, wanted in requests])

    with hushed():
        if answer is None:
            wrapped: Any = Answering(
                model, tokenizer, settings.batch_size, settings.seed, settings.think_end, journal, ranks, progress
            )
        else:
            wrapped = Delegating(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)  # type: ignore[arg-type]
        if settings.samples > 1:
            load, manager = manager.load, copy.copy(manager)
            manager.load = lambda names: vote(load(names), settings.samples)
        try:
            found = simple_evaluate(
                model=wrapped, tasks=list(settings.tasks), num_fewshot=settings.num_fewshot, limit=settings.limit,
                apply_chat_template=settings.apply_chat_template, gen_kwargs=settings.gen_kwargs, task_manager=manager,
                confirm_run_unsafe_code=True,  # see check_code
                log_samples=True, bootstrap_iters=0, random_seed=settings.seed, numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed, fewshot_random_seed=settings.seed,
            )  # fmt: skip
        except (KeyboardInterrupt, MemoryError, torch.cuda.OutOfMemoryError, WorkError):
            raise
        except Exception as error:
            raise WorkError(f"lm-eval could not run {','.join(settings.tasks)}: {first_line(error)}") from error
    if found is None:
        if ranks is not None and not ranks.main:
            return {}
        raise WorkError("lm-eval returned no results")
    return found if answer is not None else {**found, "cut": dict(wrapped.cut)}


def margins(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each document's margin in a multiple-choice task: log-probability of the right answer
    minus that of the best wrong one. InputError for other tasks."""
    found = []
    for sample in samples:
        if isinstance(sample["filtered_resps"][0], str):
            raise InputError(f"{setting('metric')} margin needs a multiple-choice task; this one generates text")
        values = [float(answer[0]) for answer in sample["filtered_resps"]]
        if len({arguments[1] for arguments in sample["arguments"]}) < len(
            values
        ):  # the choice is in the context, as in winogrande
            raise InputError(f"{setting('metric')} margin needs a multiple-choice task whose answers differ")
        target = sample["target"]
        if isinstance(target, str) and not target.isdecimal():
            choices = [arguments[1].strip() for arguments in sample["arguments"]]
            target = choices.index(target.strip()) if target.strip() in choices else None
        if target is None or len(values) < 2 or int(target) >= len(values):
            raise InputError(f"{setting('metric')} margin needs a multiple-choice task with one right answer")
        right = values.pop(int(target))
        found.append({"doc": sample["doc_id"], "hash": sample["doc_hash"], "score": right - max(values)})
    return found
