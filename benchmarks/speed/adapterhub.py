"""AdapterHub's LoRA r=8 on query and value, or its Pfeiffer adapter: AdapterTrainer, dynamic padding, fp32.

For an environment of its own, since ``adapters`` 1.3.0 pins transformers 4.57: it needs ``adapters``,
``torch``, ``accelerate``, ``datasets`` (below 4.5: later ones ask for a huggingface_hub that it cannot use)
and the model folder (``--model``, which ``run.py`` passes on). The head is a plain one (``adapters.init`` on
a transformers classifier) and is trained, as in the others; the encoder, its pooler included, stays frozen.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import adapters
import common
from adapters import AdapterTrainer, LoRAConfig, SeqBnConfig
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainingArguments


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--order", type=Path, help="row numbers as JSON, instead of shuffling")
    args = parser.parse_args()
    if args.full:
        raise SystemExit("adapterhub.py has no --full: it is the reference for AdapterHub's adapters")
    model, tokenizer = common.load(args, lora=False)
    adapters.init(model)
    lora = LoRAConfig(r=8, alpha=16, attn_matrices=["q", "v"])
    model.add_adapter("polarity", config=SeqBnConfig(reduction_factor=16) if args.pfeiffer else lora)
    model.train_adapter("polarity")

    def tokenize(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=common.MAX_LENGTH)

    rows = Dataset.from_list(common.read_rows("train", args.rows))
    rows = rows.map(tokenize, batched=True, remove_columns="text")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=common.learning_rate(args),
            seed=args.seed,
            logging_steps=10,
            report_to="none",
            use_cpu=True,
        )
        trainer = AdapterTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)
        )
        if args.order:
            order = json.loads(args.order.read_text("utf-8"))
            trainer._get_train_sampler = lambda *_: order
        seconds, loss = common.train_with_clock(trainer)
    memory = common.peak_memory_mb()
    right = common.accuracy(model, tokenizer, common.read_rows("test")) if args.evaluate else None
    common.report(
        "adapterhub",
        args,
        rows=len(rows),
        seconds=seconds,
        peak_memory=memory,
        final_loss=loss,
        test_accuracy=right,
    )


if __name__ == "__main__":
    main()
