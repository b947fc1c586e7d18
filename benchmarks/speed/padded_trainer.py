"""The usual Trainer script: rows padded to 128 tokens, fp32, TrainingArguments' defaults, LoRA by peft."""

from __future__ import annotations

import tempfile
from typing import Any

import common
from datasets import Dataset
from transformers import Trainer, TrainingArguments


def main() -> None:
    args = common.parser(__doc__).parse_args()
    model, tokenizer = common.load(args, lora=not args.full)

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], padding="max_length", truncation=True, max_length=common.MAX_LENGTH)

    rows = Dataset.from_list(common.read_rows("train", args.rows))
    rows = rows.map(tokenize, batched=True, remove_columns="text")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=common.learning_rate(args),
            seed=args.seed,
            logging_steps=10,  # not the default 500: for final_loss; it costs nothing on a CPU
            report_to="none",
        )
        seconds, loss = common.train_with_clock(Trainer(model=model, args=arguments, train_dataset=rows))
    memory = common.peak_memory_mb()
    right = common.accuracy(model, tokenizer, common.read_rows("test")) if args.evaluate else None
    common.report(
        "padded_trainer",
        args,
        rows=len(rows),
        seconds=seconds,
        peak_memory=memory,
        final_loss=loss,
        test_accuracy=right,
    )


if __name__ == "__main__":
    main()
