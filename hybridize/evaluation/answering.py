"""A subclass of lm-eval's model class that generates with hybridize/generation, splits requests
over ranks, and keeps a journal of answers, from which an interrupted evaluation resumes.

lm-eval still tokenises, splits requests into context and answer, and scores log-likelihoods in
batches. Every rank runs all of lm-eval and answers its share of the requests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from hybridize.checkpoint.journal import Journal
from hybridize.compat.lm_eval import (
    HFLM,
    FilterEnsemble,
    TakeFirstFilter,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from hybridize.data.encode import unknown_token
from hybridize.errors import WorkError, setting
from hybridize.generation.decoder import looks_at_the_longest
from hybridize.generation.settings import FOLLOWED, TOP_K, Generation, ends_of, settings_of
from hybridize.generation.writing import STRIDE, Wanted, rows_that_fit, seed_of, write
from hybridize.modeling import HybridForCausalLM
from hybridize.runtime.distributed import DistributedContext

AUTO, ON_CPU = 64, 8  # largest batch for `auto` (lm-eval's own limit), and the batch on a CPU
LOGIT = 16  # bytes per logit: the model's own, its float32 copy, and the log-softmax
CHUNK = 8  # batches per call into lm-eval, after which ranks exchange their answers
DRAWN = ("temperature", "top_k", "top_p", "min_p")
OURS = {"until", "max_gen_toks", "do_sample", *DRAWN, *FOLLOWED} - {
    "bad_words_ids"
}  # other settings are left to transformers' generate
TAIL = 64  # tokens at the end of an answer that are searched for stop sequences


class Answering(HFLM):
    """lm-eval's model over several ranks and with a journal.

    think_end: text that closes a reasoning block; only the text after it is the answer and is
    searched for stop sequences. cut: number of answers per task that reached the length limit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int | str, seed: int = 0, think_end: str | None = None,
        journal: Journal | None = None, ranks: DistributedContext | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        fixed = batch_size if isinstance(batch_size, int) else AUTO
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=fixed, think_end_token=think_end)
        self.auto, self.progress = fixed != batch_size, progress
        self.seed, self.journal, self.ranks = seed, journal, ranks or DistributedContext()
        self.cut: Counter[str] = Counter()
        before = [] if journal is None else [(line["key"], line["answer"]) for line in journal.lines]
        self.known: dict[str, Any] = dict(self.ranks.first(before))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = lambda part, _: iter(enumerate(super(Answering, self).loglikelihood(part, disable_tqdm=True)))  # noqa: E731
        return [(float(value), bool(greedy)) for value, greedy in self._answers("loglikelihood", requests, ask)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        ask = lambda p, _: iter(enumerate(super(Answering, self).loglikelihood_rolling(p, disable_tqdm=True)))  # noqa: E731
        return [float(value) for value in self._answers("rolling", requests, ask)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        found = self._answers("generate", requests, self._written)
        for request, (_, ended) in zip(requests, found, strict=True):
            self.cut[request.task_name] += not ended
        return [text for text, _ in found]

    def _answers(self, kind: str, requests: Sequence[Any], ask: Any) -> list[Any]:
        """Returns one answer per request. Equal requests are answered once, except for sampling,
        where each repetition is a new sample."""
        keys, seen = [], Counter[str]()
        for request in requests:
            text = json.dumps([kind, *request.args], sort_keys=True, default=str)
            seen[text] += 1
            if kind == "generate" and normalize_gen_kwargs(request.args[1])["do_sample"]:
                text += f"#{seen[text]}"
            keys.append(hashlib.sha256(text.encode()).hexdigest())
        waiting = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.known}
        order = sorted(waiting, key=lambda key: (-len(waiting[key].args[0]), key))  # longest first, as in lm-eval
        size, done = CHUNK * int(self.batch_size) * self.ranks.size, 0
        if order:
            self.progress(0, len(order))
        for begin in range(0, len(order), size):
            mine = order[begin : begin + size][self.ranks.rank :: self.ranks.size]
            got = []
            for at, answer in self._asked(ask, [waiting[key] for key in mine], mine, kind != "generate"):
                self._check_finite(waiting[mine[at]], answer)
                got.append((mine[at], answer))
                self._note(mine[at], answer)
                done += self.ranks.size
                self.progress(min(done, len(order)), len(order))
            for rank, theirs in enumerate(self.ranks.all(got)):
                for key, answer in theirs if rank != self.ranks.rank else ():
                    self._note(key, answer)
        return [self.known[key] for key in keys]

    def _asked(self, ask: Any, requests: Sequence[Any], keys: Sequence[str], scored: bool) -> Iterator[tuple[int, Any]]:
        """Yields from `ask`; with an automatic batch size, halves it until the batch fits into
        memory."""
        if not (self.auto and scored and requests):
            yield from ask(requests, keys)
            return
        self.batch_size_per_gpu = self._fitting(requests[0])
        while True:
            try:
                found = list(ask(requests, keys))
                break
            except torch.cuda.OutOfMemoryError:
                if self.batch_size_per_gpu == 1:
                    raise
            torch.cuda.empty_cache()
            self.batch_size_per_gpu //= 2
        yield from found

    def _fitting(self, longest: Any) -> int:
        """Returns how many requests of this length fit into a batch: their logits may take half of
        the free GPU memory."""
        if self.device.type != "cuda":
            return ON_CPU
        tokens = min(self.max_length, len(self.tok_encode("".join(map(str, longest.args[:2])))))
        room = torch.cuda.mem_get_info(self.device)[0] // 2
        return int(max(1, min(AUTO, room // (tokens * self.model.config.vocab_size * LOGIT))))

    def _check_finite(self, request: Any, answer: Any) -> None:
        """WorkError naming task and document if a log-likelihood is not finite: lm-eval would
        pick the first such answer."""
        value = answer if isinstance(answer, float) else answer[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise WorkError(_broken(request, f"a log-likelihood is {value}"))

    def _note(self, key: str, answer: Any) -> None:
        self.known[key] = answer
        if self.journal is not None:
            self.journal.put({"key": key, "answer": answer})

    def _written(self, requests: Sequence[Any], keys: Sequence[str]) -> Iterator[tuple[int, tuple[str, bool]]]:
        """Generates answers; yields (index of the request, (text, whether it ended by itself))."""
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(at)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for places in groups.values():
            raw = requests[places[0]].args[1]
            settings = dict(normalize_gen_kwargs(raw, self.max_gen_toks))
            if settings["do_sample"] and raw.get("temperature", 1.0) == 0:
                raise ValueError("do_sample asks for a temperature above 0")
            generation = self._generation(settings, raw)
            stock = set(settings) - OURS or generation.others or not isinstance(self.model, HybridForCausalLM)
            if stock or looks_at_the_longest(self.model.config):
                try:
                    texts = super().generate_until([requests[at] for at in places], disable_tqdm=True)
                except _NotFinite as error:
                    raise WorkError(_broken(requests[places[0]], "a logit is not finite", len(places))) from error
                for at, text in zip(places, texts, strict=True):
                    yield at, (text, self._ends(text, int(settings["max_gen_toks"])))
                continue
            until, new = handle_stop_sequences(settings["until"], eos=eos), int(settings["max_gen_toks"])
            room = self.max_length - new
            if room <= 0:
                raise ValueError(f"{new} new tokens leave no room for a prompt in {self.max_length}")
            read = [self._encoded(requests[at].args[0], room) for at in places]
            wanted = [Wanted((at, 0), ids, seed_of(self.seed, keys[at])) for at, ids in zip(places, read, strict=True)]
            longest = max(map(len, read))
            rows = rows_that_fit(self.model, longest + new, min(int(self.batch_size), len(wanted)))
            answers = write(
                self.model, wanted, longest, new, generation.ends, generation.sampling, rows, generation.rules,
                self._stopper(until),
            )  # fmt: skip
            for found in answers:
                if found.broken:
                    raise WorkError(_broken(requests[found.key[0]], "a logit is not finite"))
                text = postprocess_generated_text(self.tok_decode(found.ids), until, self.think_end_token)
                yield found.key[0], (text, found.ended)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_generate(*args, logits_processor=LogitsProcessorList([_finite]), **kwargs)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        return self._check(super().tok_encode(string, *args, **kwargs))

    def _encoded(self, text: str, room: int) -> list[int]:
        return self._check(self.tok_batch_encode([text], left_truncate_len=room, truncation=self.truncation)[0][0].tolist())

    def _check(self, ids: list[int]) -> list[int]:
        """Returns the ids. WorkError for an id without an embedding in the model."""
        if unknown := unknown_token(self.tokenizer, ids, self.model.config.vocab_size):
            raise WorkError(f"a document has {unknown}")
        return ids

    def _generation(self, settings: dict[str, Any], raw: dict[str, Any]) -> Generation:
        """Returns the checkpoint's generation settings, overridden by the task's as in
        transformers' generate."""
        own, samples = vars(self.model.generation_config), bool(settings["do_sample"])
        made = {**own, **{key: value for key, value in settings.items() if key in FOLLOWED}}
        drawn = {key: raw.get(key, own.get(key)) for key in DRAWN}
        if drawn["top_k"] is None:
            drawn["top_k"] = TOP_K
        ends = ends_of((own.get("eos_token_id"), getattr(self.model.config, "eos_token_id", None)), self.tokenizer)
        found = settings_of(made, drawn, samples, ends)
        if own.get("max_new_tokens") is not None:  # takes precedence over the task's length
            found.others["max_new_tokens"] = own["max_new_tokens"]
        return replace(found, ends=found.ends | {self.eot_token_id})

    def _stopper(self, until: Sequence[str]) -> Any:
        """Returns a function that detects a stop sequence in an answer, after its reasoning block
        if it has one."""
        thought: set[Any] = set()

        def stop(key: Any, ids: list[int]) -> bool:
            tail: str = self.tok_decode(ids[-(STRIDE + TAIL) :])
            if self.think_end_token is not None and key not in thought:
                if self.think_end_token not in tail:
                    return False
                thought.add(key)
            after = tail.rsplit(self.think_end_token, 1)[-1] if self.think_end_token else tail
            return any(word and word in after for word in until)

        return stop

    def _ends(self, text: str, most: int) -> bool:
        return len(self.tok_encode(text, add_special_tokens=False)) < most


class _NotFinite(Exception):
    """A logit is NaN or infinite."""


def _finite(_: Any, scores: torch.Tensor) -> torch.Tensor:
    if not bool((scores < torch.inf).all()):  # also false for NaN; excluded tokens are minus infinity
        raise _NotFinite
    return scores


def _broken(request: Any, what: str, count: int = 1) -> str:
    among = f" or one of the {count - 1} after it" if count > 1 else ""
    return f"task {request.task_name}, document {request.doc_id}{among}: {what}; try {setting('dtype')} float32"


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} with balanced braces, None if there is none."""
    begin = text.rfind("\\boxed{")
    depth, start = 0, begin + len("\\boxed{")
    for at in range(start, len(text)) if begin >= 0 else ():
        depth += (text[at] == "{") - (text[at] == "}")
        if depth < 0:
            return text[start:at].strip()
    return None


class Majority:
    """lm-eval filter for maj@k: keeps, for each document, the first answer with the most frequent
    final result."""

    def apply(self, answers: Sequence[Sequence[str]], _: Any) -> list[list[str]]:
        found = []
        for each in answers:
            results = [last_boxed(answer) or answer.strip() for answer in each]
            most = Counter(results).most_common(1)[0][0]  # the earliest in a tie
            found.append([each[results.index(most)]])
        return found


def vote(loaded: dict[str, Any], samples: int) -> dict[str, Any]:
    """Makes the generating tasks among lm-eval's loaded tasks draw `samples` answers and report
    their majority too. Changes and returns `loaded`."""
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE != "generate_until" or any("maj@" in ensemble.name for ensemble in task._filters):
            continue
        task.config.repeats = samples
        for ensemble in list(task._filters):
            kept = [made for made in ensemble.filters if not isinstance(made(), TakeFirstFilter)]
            named = f"maj@{samples}" if ensemble.name == "none" else f"{ensemble.name}-maj@{samples}"
            task._filters.append(FilterEnsemble(named, [*kept, Majority, TakeFirstFilter]))
    return loaded
