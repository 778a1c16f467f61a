"""TRL's DPOTrainer: an answer is preferred to none.

Run it with

    python examples/trl_dpo.py [--model PATH] [--out out/dpo]

The reference model is the same model with its adapters disabled. Those calls go to PEFT, and `lf.explain` counts them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from tiny import SUMS, load
from trl import DPOConfig, DPOTrainer

import lowrank_fused as lf


def main(model: str = "", out: Path = Path("out/dpo"), epochs: int = 2, learning_rate: float = 1e-2) -> None:
    """Teach the model in that folder, or a tiny one, to prefer an answer; the adapter goes to `out`."""
    base, tokenizer = load(model)
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " who knows"} for row in SUMS]
    callback = lf.AccelerateCallback()
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
        callbacks=[callback],  # the only line that is new
    )
    trainer.train()
    trainer.save_model()

    print(callback.report)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            loss, margin = float(entry["loss"]), float(entry["rewards/margins"])
            print(f"step {entry['step']:3d}  loss {loss:.4f}  margin {margin:.4f}")
    print(lf.explain(trainer.model))


if __name__ == "__main__":
    typer.run(main)
