"""How far one checkpoint is from another on a text: `python tests/benchmarks/fidelity.py STUDENT TEACHER DATA`.

The first 24 windows of 2048 tokens, every token (or the assistant's, with --mask assistant). One JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hybridize.distillation.distill import open_corpus
from hybridize.distillation.encode import Encoder
from hybridize.distillation.measure import fidelity
from hybridize.distillation.settings import DistillSettings
from hybridize.runtime import load_model, load_tokenizer, pick_device, pick_dtype, quiet_transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data")
    parser.add_argument("--mask", default="none")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--chat-template", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    template = args.chat_template.read_text() if args.chat_template else None
    encoder = Encoder(load_tokenizer(args.student), args.mask, template)
    settings = DistillSettings(steps=1, batch_size=4, seq_len=args.seq_len, eval_windows=args.windows)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    batches = [b.to(device) for b in open_corpus(args.data, args.data, encoder).measuring(settings)]
    student, teacher = (load_model(path, device, dtype) for path in (args.student, args.teacher))
    found = vars(fidelity(student, teacher, batches, dtype))
    told = {key: round(value, 5) if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps({"student": args.student.name, "data": Path(args.data).name, "mask": args.mask, **told}), flush=True)


if __name__ == "__main__":
    main()
