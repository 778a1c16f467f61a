"""Hugging Face Accelerate, with mixed precision and gradient accumulation.

Run it with

    python examples/accelerate_loop.py [--model PATH] [--mixed-precision bf16]
    accelerate launch examples/accelerate_loop.py  # on whatever `accelerate config` describes
"""

from __future__ import annotations

import torch
import typer
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import SUMS, collator, load
from torch.utils.data import DataLoader

import lowrank_fused as lf


def main(model: str = "", epochs: int = 2, mixed_precision: str = "no", learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums."""
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    base, tokenizer = load(model)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)

    # The only line that is new, before `prepare` or after it.
    accelerator.print(lf.accelerate(peft_model))

    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=learning_rate)
    batches = DataLoader(SUMS, batch_size=8, shuffle=True, collate_fn=collator(tokenizer))
    peft_model, optimizer, batches = accelerator.prepare(peft_model, optimizer, batches)
    step = 0
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(peft_model):
                loss = peft_model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            step += accelerator.sync_gradients
            if accelerator.sync_gradients:
                accelerator.print(f"step {step:3d}  loss {loss.item():.4f}")
    accelerator.print(lf.explain(peft_model))


if __name__ == "__main__":
    typer.run(main)
