"""On-policy distillation: training sequences that the student writes itself, so that the teacher
corrects the student where the student goes (GKD, 2306.13649, section 3; MiniLLM, 2306.08543)."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridize.checkpoint.atomic import write_lines_atomic
from hybridize.data.corpus import Corpus
from hybridize.data.encode import Document
from hybridize.data.packing import Batch, batched
from hybridize.distillation.settings import DistillSettings
from hybridize.errors import InputError, WorkError, setting
from hybridize.generation.sampling import SamplingSettings
from hybridize.generation.writing import Wanted, rows_that_fit, seed_of, write
from hybridize.modeling import HybridForCausalLM

MOST = {"cuda": 256, "cpu": 32}  # answers decoded at once; on a GPU as many as fit into free memory, on a CPU unplanned
ENDED = 0.5  # share of answers that end, below which the run advises longer ones
FILE = "answers-{}.jsonl"


class Rollouts:
    """The student's own answers to the prompts of `corpus`, packed into sequences.

    They are drawn for `on_policy_every` steps at once, with the weights that the student has before
    the first of these steps: the last step trains on answers of a student that is
    `on_policy_every` - 1 steps old.

    writer: a copy of the student in the type that it computes in, which decodes. ends: tokens that
    end an answer. folder: holds the answers, so that a resumed run trains on the same ones. Raises
    InputError if the student's parameters are not the writer's.
    """

    def __init__(
        self, writer: HybridForCausalLM, student: nn.Module, corpus: Corpus, ends: Set[int], settings: DistillSettings,
        folder: Path, report: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        if writer.state_dict().keys() != student.state_dict().keys():
            raise InputError(f"{setting('on_policy')}: the decoder does not support models of type {type(student).__name__}")
        self.writer, self.corpus, self.ends, self.settings = writer, corpus, ends, settings
        self.folder, self.report = folder, report
        self.block = -1
        self.batches: list[Batch] = []

    def join(self, batch: Batch, step: int, student: nn.Module) -> Batch:
        """Returns the batch of `step`, counted from 0: the student's sequences, then those of
        `batch`. Draws new answers from `student` if the step begins a block."""
        block, at = divmod(step, self.settings.on_policy_every)
        if block != self.block:
            try:
                self.block, self.batches = block, self._packed(block, student)
            except InputError as error:  # a row that was not encoded beforehand
                raise WorkError(f"{error}") from error
        return self.batches[at].followed_by(batch)

    def forget(self, step: int) -> None:
        """Deletes the answers of blocks that begin after `step`, which other weights have written."""
        for path in self._files():
            if int(path.stem.split("-")[1]) * self.settings.on_policy_every > step:
                path.unlink()

    def count(self) -> int:
        """Returns the number of answers so far, over all blocks."""
        return sum(len(path.read_text().splitlines()) for path in self._files())

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(FILE.format("*"))

    def _packed(self, block: int, student: nn.Module) -> list[Batch]:
        """Returns the block's sequences, a batch per step."""
        path, settings = self.folder / FILE.format(f"{block:06}"), self.settings
        if not path.exists():
            write_lines_atomic(path, map(dataclasses.asdict, self._drawn(block, student)))
        documents = [Document(**json.loads(line)) for line in path.read_text().splitlines()]
        rows = itertools.islice(self._lines(documents), self._steps(block) * settings.on_policy_rows)
        return list(batched(rows, settings.on_policy_rows))

    def _steps(self, block: int) -> int:
        """Steps of a block; the run's last block may be shorter."""
        every = self.settings.on_policy_every
        return min(every, self.settings.total_steps - block * every)

    def _lines(self, documents: list[Document]) -> Iterator[Any]:
        return self.corpus.lines(iter(documents), self.settings.seq_len)

    def _drawn(self, block: int, student: nn.Module) -> list[Document]:
        """Returns answers that fill the block's sequences. All answers that are begun are used or
        left out as a whole at the end, so that short ones are not preferred."""
        settings, began = self.settings, time.perf_counter()
        self.report({"kind": "doing", "text": "the student answers prompts"})
        self.writer.load_state_dict(student.state_dict())
        needed = self._steps(block) * settings.on_policy_rows
        prompts = self.corpus.prompts(seed_of(settings.seed, f"prompts {block}") % 2**32, settings.on_policy_prompt)
        documents: list[Document] = []
        while (missing := needed - len(list(self._lines(documents)))) > 0:
            mean = sum(len(d.ids) for d in documents) / len(documents) if documents else settings.on_policy_tokens
            more = max(1, round(missing * settings.seq_len / mean))
            documents += self._answers(list(itertools.islice(prompts, more)), block, len(documents))
        if self.writer.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # the decoder's caches make room for the training step
        made, ended = sum(sum(d.loss_mask) for d in documents), sum(d.whole for d in documents)
        seconds = time.perf_counter() - began
        self.report({
            "kind": "note",
            "text": f"on-policy: {len(documents)} answers of the student, {made / len(documents):.0f} tokens each, "
            f"{ended / len(documents):.0%} ended, {seconds:.1f} s for {self._steps(block)} steps"
            + (f"; raise {setting('on_policy_tokens')}" if ended < ENDED * len(documents) else ""),
        })  # fmt: skip
        return documents

    @torch.no_grad()
    def _answers(self, prompts: list[list[int]], block: int, first: int) -> list[Document]:
        """Returns prompts with answers, in the order of the prompts. first: number of the first."""
        settings, new = self.settings, self.settings.on_policy_tokens
        longest = max(map(len, prompts))
        wanted = [Wanted((block, i), ids, seed_of(settings.seed, (block, i))) for i, ids in enumerate(prompts, first)]
        rows = rows_that_fit(self.writer, longest + new, min(MOST[self.writer.device.type], len(wanted)))
        sampling, found = SamplingSettings(settings.on_policy_temperature), dict[int, Document]()
        for answer in write(self.writer, wanted, longest, new, self.ends, sampling, rows):
            if answer.broken:
                raise WorkError(f"{setting('on_policy')}: a logit of the student's answer is not finite")
            prompt = prompts[answer.key[1] - first]
            # which end token it was does not matter: divergences compare distributions, not labels
            made = [*answer.ids, *sorted(self.ends)[:1]] if answer.ended else answer.ids
            mask = [False] * len(prompt) + [True] * len(made)
            found[answer.key[1]] = Document([*prompt, *made], mask, whole=answer.ended)
        return [found[i] for i in sorted(found)]
