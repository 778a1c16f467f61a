"""Optimisers made for LoRA run on our layers as they are: they see two parameters and their gradients.

LoRA-Pro, LoRA-RITE and LoRA+ are written down here from their papers' formulas; each takes the same path on PEFT's
layers and on ours, and has the property that it was made for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fused as lf

peft = pytest.importorskip("peft")

SIZES, RANK, ALPHA, STEPS = (24, 32, 16), 4, 8, 25
SCALE = ALPHA / RANK
Pair = tuple[nn.Parameter, nn.Parameter]


def pairs(model: nn.Module) -> list[Pair]:
    """(A [r, in], B [out, r]) of every adapted layer, by name, as such optimisers find them."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [(p, named[name.replace("lora_A", "lora_B")]) for name, p in named.items() if "lora_A" in name]


def outer(first: Tensor, second: Tensor) -> Tensor:
    return first @ second.t()


class LoraPro(torch.optim.Optimizer):
    """LoRA-Pro (Wang et al., 2024, arXiv 2407.18242) for SGD: gradients whose sum s (B gA + gB A) is closest to dW.

    gA = (BᵀB)⁻¹ dA / s² + X A,    gB = (I − B (BᵀB)⁻¹ Bᵀ) dB (A Aᵀ)⁻¹ / s² − B X,
    where BᵀB X + X A Aᵀ = −(BᵀB)⁻¹ dA Aᵀ / s² picks, of all such, those nearest to dA and dB.
    """

    def __init__(self, pairs: Iterable[Pair], lr: float, scale: float) -> None:
        self.pairs = list(pairs)
        super().__init__([p for pair in self.pairs for p in pair], {"lr": lr, "scale": scale})

    @staticmethod
    def adjusted(a: Tensor, b: Tensor, da: Tensor, db: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        gram_a, gram_b = outer(a, a), outer(b.t(), b.t())
        solved = torch.linalg.solve(gram_b, da) / scale**2
        of_b, left = torch.linalg.eigh(gram_b)
        of_a, right = torch.linalg.eigh(gram_a)
        x = left @ (left.t() @ -outer(solved, a) @ right / (of_b[:, None] + of_a)) @ right.t()
        inside = db - b @ torch.linalg.solve(gram_b, b.t() @ db)
        return solved + x @ a, torch.linalg.solve(gram_a, inside.t()).t() / scale**2 - b @ x

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        lr, scale = self.defaults["lr"], self.defaults["scale"]
        for a, b in self.pairs:
            ga, gb = self.adjusted(a, b, a.grad, b.grad, scale)
            a.sub_(lr * ga)
            b.sub_(lr * gb)


class LoraRite(torch.optim.Optimizer):
    """LoRA-RITE (Yen et al., 2024, arXiv 2410.20625): Adam on the r side, in a basis that belongs to the other factor.

    For the factor F [n, r] of a product with G [m, r] = U R (QR): the unmagnified gradient dF R⁻¹ does not depend on
    how F and G share their product; its r × r second moment V preconditions it, carried into each step's basis by
    P = Uᵀ U_before, with the part that this loses added back as ρ; F moves by −lr · M R⁻ᵀ.
    """

    def __init__(self, pairs: Iterable[Pair], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.pairs = list(pairs)
        super().__init__([p for pair in self.pairs for p in pair], {"lr": lr, "betas": betas})

    def direction(self, parameter: nn.Parameter, grad: Tensor, other: Tensor) -> Tensor:
        """-step / lr of a factor [n, r] beside `other` [m, r]."""
        beta1, beta2 = self.defaults["betas"]
        basis, magnitude = torch.linalg.qr(other)
        unmagnified = torch.linalg.solve_triangular(magnitude, grad, upper=True, left=False)
        state = self.state[parameter]
        if not state:
            state.update(second=unmagnified.new_zeros(2 * magnitude.shape[-1:]), lost=0.0, first=0.0, basis=basis)
        turn = basis.t() @ state["basis"]
        turned = turn @ state["second"] @ turn.t()
        escaped = torch.linalg.eigvalsh(state["second"]) - torch.linalg.eigvalsh(turned)
        state["lost"] = beta2 * (state["lost"] + escaped.abs().max())
        state["second"] = beta2 * turned + (1 - beta2) * unmagnified.t() @ unmagnified
        values, vectors = torch.linalg.eigh(state["second"])
        root = vectors / (values.clamp_min(0) + state["lost"]).sqrt().add(1e-6) @ vectors.t()
        before = state["first"] @ turn.t() if isinstance(state["first"], Tensor) else 0.0
        state["first"], state["basis"] = beta1 * before + (1 - beta1) * unmagnified @ root, basis
        return torch.linalg.solve_triangular(magnitude.t(), state["first"], upper=False, left=False)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        lr = self.defaults["lr"]
        for a, b in self.pairs:
            moves = self.direction(a, a.grad.t(), b).t(), self.direction(b, b.grad, a.t())
            for factor, move in zip((a, b), moves, strict=True):
                factor.sub_(lr * move)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.Tanh(), nn.Linear(SIZES[1], SIZES[2])).to(dtype)


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """With both factors away from zero, where all of these optimisers are defined."""
    return lf.inject(network(dtype), rank=RANK, alpha=ALPHA, target_modules=["0", "2"], init_lora_weights=False)


def twins() -> tuple[nn.Module, nn.Module]:
    """Our layers and PEFT's on the same model with the same factors."""
    ours = adapted()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(network(), config)
    with torch.no_grad():
        for mine, their in zip(pairs(ours), pairs(theirs), strict=True):
            for p, q in zip(mine, their, strict=True):
                q.copy_(p)
    return ours, theirs


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    """The loss of every step on a random teacher."""
    g = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    teacher = torch.randn(SIZES[2], SIZES[0], generator=g).to(dtype) / SIZES[0] ** 0.5
    losses = []
    for _ in range(steps):
        x = torch.randn(64, SIZES[0], generator=g).to(dtype)
        loss = F.mse_loss(model(x), x @ teacher.t())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_same_path(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Losses and factors on our layers are those on PEFT's, up to rounding, and the loss falls."""
    ours, theirs = twins()
    starts = [[p.detach().clone() for p in pair] for pair in pairs(ours)]
    losses, expected = (train(model, make(model)) for model in (ours, theirs))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    for mine, their, start in zip(pairs(ours), pairs(theirs), starts, strict=True):
        for p, q, before in zip(mine, their, start, strict=True):
            moved = (q - before).norm()
            assert (p - q).norm() < 1e-3 * moved and moved > 0.01


def equivalent(pair: Pair, ga: Tensor, gb: Tensor) -> Tensor:
    """How gradients of A and B move the weight: s (B gA + gB A)."""
    return SCALE * (pair[1] @ ga + gb @ pair[0])


def test_lora_pro():
    check_same_path(lambda model: LoraPro(pairs(model), lr=0.3, scale=SCALE))
    model = adapted(torch.float64)
    plain = network(torch.float64)
    with torch.no_grad():
        for layer, linear in ((model[0], plain[0]), (model[2], plain[2])):
            linear.weight.add_(layer.scaling * layer.lora_B @ layer.lora_A)
    x = torch.randn(64, SIZES[0], dtype=torch.float64)
    for net in (model, plain):
        net(x).square().sum().backward()
    for at, (a, b) in zip((0, 2), pairs(model), strict=True):
        full = plain[at].weight.grad
        ga, gb = LoraPro.adjusted(a, b, a.grad, b.grad, SCALE)
        error = equivalent((a, b), ga, gb) - full
        # Closest: what is left is orthogonal to everything that B gA + gB A can be.
        torch.testing.assert_close(b.t() @ error, torch.zeros_like(a), rtol=0, atol=1e-10 * full.norm().item())
        torch.testing.assert_close(error @ a.t(), torch.zeros_like(b), rtol=0, atol=1e-10 * full.norm().item())
        lora = equivalent((a, b), a.grad, b.grad)
        best_multiple = (lora * full).sum() / lora.square().sum() * lora
        assert error.norm() < (best_multiple - full).norm()
        # Of all pairs with that sum, the nearest to LoRA's own: moving along (X A, −B X) only leads away.
        distance = (ga - a.grad).norm() ** 2 + (gb - b.grad).norm() ** 2
        for _ in range(5):
            x_step = 1e-3 * torch.randn(RANK, RANK, dtype=torch.float64)
            other = (ga + x_step @ a - a.grad).norm() ** 2 + (gb - b @ x_step - b.grad).norm() ** 2
            assert other > distance


def transformed(model: nn.Module) -> nn.Module:
    """The same weights from other factors: A -> R A, B -> B R⁻¹."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for a, b in pairs(other):
            r = torch.randn(RANK, RANK, generator=g, dtype=a.dtype) + 2 * torch.eye(RANK, dtype=a.dtype)
            a.copy_(r @ a)
            b.copy_(b @ torch.linalg.inv(r))
    return other


def largest_difference(make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """Between the weights of a model and of its transformed twin after training, over how far they moved."""
    model = adapted(torch.float64)
    other, start = transformed(model), [(b @ a).detach() for a, b in pairs(model)]
    for net in (model, other):
        train(net, make(net))
    found = zip(pairs(model), pairs(other), start, strict=True)
    return max(((b @ a - d @ c).norm() / (b @ a - before).norm()).item() for (a, b), (c, d), before in found)


def test_lora_rite():
    check_same_path(lambda model: LoraRite(pairs(model), lr=0.02))
    assert largest_difference(lambda model: LoraRite(pairs(model), lr=0.02)) < 1e-7
    adamw = largest_difference(lambda model: torch.optim.AdamW([p for pair in pairs(model) for p in pair], lr=0.02))
    assert adamw > 0.1, "AdamW is as invariant: this proves nothing"


def test_lora_plus():
    from peft.optimizers import create_loraplus_optimizer

    ratio = 8.0

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if isinstance(model, peft.PeftModel):
            return create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=ratio)
        return torch.optim.AdamW(lf.parameter_groups(model, 2e-3, ratio=ratio))

    check_same_path(optimizer)
    # Adam's first step is lr times the sign of the gradient: B's is `ratio` times as long as A's.
    model = adapted()
    starts = [[p.detach().clone() for p in pair] for pair in pairs(model)]
    train(model, optimizer(model), steps=1)
    for pair, before in zip(pairs(model), starts, strict=True):
        for p, start, lr in zip(pair, before, (2e-3, ratio * 2e-3), strict=True):
            torch.testing.assert_close((p - start).abs().median().item(), lr, rtol=1e-2, atol=0)
