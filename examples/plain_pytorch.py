"""A training loop of your own.

Run it with

    python examples/plain_pytorch.py [--model PATH]
"""

from __future__ import annotations

import torch
import typer
from peft import LoraConfig, get_peft_model
from tiny import SUMS, collator, load
from torch.utils.data import DataLoader

import lowrank_fused as lf


def main(model: str = "", epochs: int = 2, learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load(model)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base.to(device), config)

    # The only line that is new. The parameters stay the same objects, so an optimiser made before it is as good.
    print(lf.accelerate(peft_model))

    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=learning_rate)
    batches = DataLoader(SUMS, batch_size=16, shuffle=True, collate_fn=collator(tokenizer))
    step = 0
    for _ in range(epochs):
        for batch in batches:
            loss = peft_model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print(f"step {step:3d}  loss {loss.item():.4f}")

    # Which path the calls really took, and why where it was not the fused one.
    print(lf.explain(peft_model))


if __name__ == "__main__":
    typer.run(main)
