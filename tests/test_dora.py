"""DoRA: row norms of W + s B A without the sum, and agreement with PEFT on a real architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_fused as lf
from lowrank_fused.methods.dora import row_norm
from lowrank_fused.tools.tiny_models import logits, tiny_model

N, K, R = 48, 40, 4


class Shapes(TorchDispatchMode):
    """Records the shape of every result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.seen.append(tuple(out.shape))
        return out


def factors(scale_of_b: float = 1.0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=g).div(K**0.5).to(dtype)
    return weight, torch.randn(R, K, generator=g).div(K**0.5), scale_of_b * torch.randn(N, R, generator=g).div(R**0.5)


def exact_norm(weight, a, b, scale):
    return (weight.double() + scale * b.double() @ a.double()).norm(dim=1)


@pytest.mark.parametrize("scale_of_b", [0.0, 0.01, 1.0, 100.0])
def test_row_norms_in_float32_are_those_of_the_sum_in_float64(scale_of_b):
    weight, a, b = factors(scale_of_b)
    right = exact_norm(weight, a, b, 1.5)
    torch.testing.assert_close(row_norm(weight, a, b, 1.5).double(), right, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_norms_of_a_16_bit_weight_are_good_to_its_precision(dtype):
    weight, a, b = factors(0.3, dtype)
    norm = row_norm(weight, a, b, 1.5)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact_norm(weight, a, b, 1.5), rtol=torch.finfo(dtype).eps / 2, atol=0)


def test_rows_that_cancel_or_are_zero_give_finite_norms_and_gradients():
    weight, a, b = factors()
    weight = b @ a * (1 + 1e-9)  # at scale -1 the sum is far below the rounding of its parts
    weight[0], b[0] = 0.0, 0.0
    a.requires_grad_(), b.requires_grad_()
    norm = row_norm(weight, a, b, -1.0)
    size = weight.norm(dim=1)
    assert (norm > 0).all() and (norm[1:] <= 2e-3 * size[1:]).all()
    grads = torch.autograd.grad(norm.sum(), [a, b])
    assert all(grad.isfinite().all() for grad in grads)


def test_nothing_of_the_weights_shape_is_formed():
    weight, a, b = factors()
    a.requires_grad_(), b.requires_grad_()
    with Shapes() as shapes:
        row_norm(weight, a, b, 1.5).sum().backward()
    assert (N, R) in shapes.seen
    assert max(torch.Size(shape).numel() for shape in shapes.seen) < N * K / 2


@pytest.mark.parametrize("detach", [True, False])
def test_the_norm_is_a_constant_for_the_gradient_unless_asked(detach):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=torch.float64)
    layer = lf.LowRankLinear.from_linear(linear, method="dora", rank=R, detach_norm=detach)
    with torch.no_grad():  # V is a multiple of B A: a longer B lengthens its rows, which y does not depend on
        layer.lora_B.normal_()
        layer.weight.copy_(layer.lora_B @ layer.lora_A)
    layer(torch.randn(6, K, dtype=torch.float64)).square().sum().backward()
    slope = (layer.lora_B.grad * layer.lora_B).sum(1).abs()
    assert (slope > 0.01).all() if detach else (slope < 1e-10).all()


def test_without_the_adapter_the_original_layer_is_left_beside_a_residual():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, dtype=torch.float64))
    x = torch.randn(3, K, dtype=torch.float64)
    expected = model(x)
    lf.inject(model, method="dora", rank=R, init_lora_weights="pissa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.allclose(model(x), expected)
    with lf.disable(model):
        torch.testing.assert_close(model(x), expected)


def test_dropout_acts_on_the_low_rank_path_alone():
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = lf.LowRankLinear.from_linear(linear, method="dora", rank=R, dropout=0.5).train()
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), linear(x))  # B is zero: nothing that dropout could act on


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trains_as_peft_does_on_a_real_architecture(kind, tmp_path):
    peft = pytest.importorskip("peft")
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    config = peft.LoraConfig(r=R, lora_alpha=6, use_dora=True, target_modules=targets, use_rslora=True)
    theirs = peft.get_peft_model(tiny_model(kind), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = lf.load_adapter(tiny_model(kind), tmp_path)
    assert {layer.method.name for layer in ours.modules() if isinstance(layer, lf.LowRankLinear)} == {"dora"}
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            logits(model).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    grads = dict(theirs.named_parameters())
    for path, layer in ((p, m) for p, m in ours.named_modules() if isinstance(m, lf.LowRankLinear)):
        for name in layer.trained_names:
            right = grads[f"base_model.model.{path}.{name}.default.weight"].grad
            assert right.abs().max() > 0
            torch.testing.assert_close(getattr(layer, name).grad, right, rtol=1e-4, atol=1e-7)


def test_merging_keeps_lengths_and_directions():
    torch.manual_seed(0)
    layer = lf.LowRankLinear.from_linear(nn.Linear(K, N, dtype=torch.float64), method="dora", rank=R)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.uniform_(1, 2)
    v = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    before = copy.deepcopy(layer.lora_magnitude_vector)
    layer.merge()
    torch.testing.assert_close(layer.weight.norm(dim=1), before.data)
    torch.testing.assert_close(F.cosine_similarity(layer.weight, v), torch.ones(N, dtype=torch.float64))
