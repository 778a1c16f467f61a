"""Several processes, each with the whole model: DistributedDataParallel.

Run it with

    torchrun --standalone --nproc-per-node 2 examples/ddp.py [--model PATH]
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import typer
from peft import LoraConfig, get_peft_model
from tiny import SUMS, collator, load
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import lowrank_fused as lf


def main(model: str = "", epochs: int = 2, learning_rate: float = 1e-2) -> None:
    """Fine-tune the model in that folder, or a tiny one, on sums."""
    if not dist.is_torchelastic_launched():
        raise SystemExit(f"start it with torchrun, as the first lines of {__file__} show")
    dist.init_process_group()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    base, tokenizer = load(model)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base.to(device), config)

    # The only line that is new, before DDP wraps the model or after it.
    report = lf.accelerate(peft_model)

    parallel = DistributedDataParallel(peft_model)
    optimizer = torch.optim.AdamW([p for p in parallel.parameters() if p.requires_grad], lr=learning_rate)
    sampler = DistributedSampler(SUMS)
    batches = DataLoader(SUMS, batch_size=8, sampler=sampler, collate_fn=collator(tokenizer))
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in batches:
            loss = parallel(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

    mean = torch.stack(losses)
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(report)
        for step, loss in enumerate((mean / dist.get_world_size()).tolist(), start=1):
            print(f"step {step:3d}  loss {loss:.4f}")
        print(lf.explain(parallel))
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
