"""torch.compile, before `accelerate` or after it: one graph either way, and the same losses.

Run it with

    python examples/compile.py [--model PATH] [--backend inductor]
"""

from __future__ import annotations

import torch
import typer
from peft import LoraConfig, get_peft_model
from tiny import SUMS, collator, load
from torch import nn
from torch.utils.data import DataLoader

import lowrank_fused as lf


def accelerate_then_compile(model: nn.Module, backend: str) -> nn.Module:
    """The usual order."""
    print(lf.accelerate(model))
    return torch.compile(model, backend=backend, fullgraph=True)


def compile_then_accelerate(model: nn.Module, backend: str) -> nn.Module:
    """Graphs that exist by then are compiled again once, at the next call."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    print(lf.accelerate(compiled))
    return compiled


def main(model: str = "", steps: int = 8, backend: str = "", learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums, once in each order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU Inductor spends a minute on C++ for what is computed in a second.
    backend = backend or ("inductor" if device == "cuda" else "aot_eager")
    for order in (accelerate_then_compile, compile_then_accelerate):
        base, tokenizer = load(model)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_model = get_peft_model(base.to(device), config)
        print(order.__name__.replace("_", " "))
        compiled = order(peft_model, backend)

        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=learning_rate)
        batches = DataLoader(SUMS, batch_size=16, shuffle=True, collate_fn=collator(tokenizer))
        for step, batch in zip(range(steps), batches, strict=False):
            loss = compiled(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1:3d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    typer.run(main)
