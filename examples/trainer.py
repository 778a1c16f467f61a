"""Transformers' Trainer.

Run it with

    python examples/trainer.py [--model PATH] [--out out/trainer]
"""

from __future__ import annotations

from pathlib import Path

import typer
from peft import LoraConfig, get_peft_model
from tiny import SUMS, collator, load
from transformers import Trainer, TrainingArguments

import lowrank_fused as lf


def main(model: str = "", out: Path = Path("out/trainer"), epochs: int = 2, learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums; the adapter goes to `out`."""
    base, tokenizer = load(model)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    callback = lf.AccelerateCallback()
    trainer = Trainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator wants the text
        ),
        train_dataset=SUMS,
        data_collator=collator(tokenizer),
        callbacks=[callback],  # the only line that is new; lf.accelerate(model) before the Trainer does as well
    )
    trainer.train()
    trainer.save_model()  # PEFT's files, which know nothing of this package

    print(callback.report)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:3d}  loss {float(entry['loss']):.4f}")
    print(lf.explain(trainer.model))


if __name__ == "__main__":
    typer.run(main)
