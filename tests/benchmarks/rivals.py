"""What one would take instead of hybridize's loss and loop: TRL's trainer and chunked divergence,
Liger's fused loss.

Needs `pip install trl==1.16.0 liger-kernel==0.8.5 accelerate`; imported only by the ways that are
asked for.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from hybridize.data.packing import Batch
from hybridize.runtime.forward import hidden_states, output_weight

CHUNKED = ("liger", "trl-chunked")


def reverse_kl(
    way: str, ours: Tensor, weight: Tensor, theirs: Tensor, teacher_weight: Tensor, labels: Tensor, count: int
) -> Tensor:
    """Sum over tokens / count, by `way`; ours, theirs [n, D], labels [n], all of one floating type."""
    if way == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        mean = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
        return mean(ours, weight, theirs, teacher_weight, labels) * (len(labels) / count)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    value, _ = ChunkedDivergenceFunction.apply(ours, weight, None, theirs, teacher_weight, None, 1.0)
    return value.sum() / count


def chunked(way: str, student: Any, teacher: Any, batch: Batch, micro: int, dtype: torch.dtype) -> None:
    """A plain loop, under autocast, around a loss that never has whole logits."""
    for part in batch.split(micro):
        kept = part.loss_mask.flatten()
        with torch.no_grad():
            theirs = hidden_states(teacher, part, dtype).flatten(0, 1)[kept].to(dtype)
        ours = hidden_states(student, part, dtype).flatten(0, 1)[kept].to(dtype)
        weights = (output_weight(model).to(dtype) for model in (student, teacher))
        labels = part.labels.flatten()[kept]
        reverse_kl(way, ours, next(weights), theirs, next(weights), labels, batch.kept).backward()


class Gkd:
    """TRL's GKDTrainer on fixed text (lmbda 0) with reverse KL (beta 1): its own training_step for
    each micro-batch."""

    def __init__(self, student: Any, teacher: Any, micro: int) -> None:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        settings = GKDConfig(
            output_dir="/tmp/gkd", lmbda=0.0, beta=1.0, bf16=True, report_to=[], per_device_train_batch_size=micro, max_steps=1,
            gradient_checkpointing=False, save_strategy="no", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        self.micro = micro
        self.trainer = GKDTrainer(
            model=student, teacher_model=teacher, args=settings, train_dataset=Dataset.from_list([{"messages": []}]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"),
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = 1

    def __call__(self, batch: Batch) -> None:
        for part in batch.split(self.micro):
            ids = torch.cat([part.ids, part.labels[:, -1:]], 1)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            self.trainer.training_step(self.trainer.model, given, torch.tensor(batch.kept, device=ids.device))
