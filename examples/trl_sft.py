"""TRL's SFTTrainer, which puts the adapters on the model itself.

Run it with

    python examples/trl_sft.py [--model PATH] [--out out/sft]
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from tiny import SUMS, load
from trl import SFTConfig, SFTTrainer

import lowrank_fused as lf


def main(model: str = "", out: Path = Path("out/sft"), epochs: int = 2, learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums; the adapter goes to `out`."""
    base, tokenizer = load(model)
    callback = lf.AccelerateCallback()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(SUMS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
        callbacks=[callback],  # the only line that is new: there is no PEFT model before the trainer has made one
    )
    trainer.train()
    trainer.save_model()

    print(callback.report)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:3d}  loss {float(entry['loss']):.4f}")
    print(lf.explain(trainer.model))


if __name__ == "__main__":
    typer.run(main)
