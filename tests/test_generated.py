"""Generated: evaluated once until a source changes, pulled back once per backward or per window of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lowrank_fused.factors.generated import Generated


class Counted(torch.autograd.Function):
    """sin of a source, counting its backwards."""

    backwards = 0

    @staticmethod
    def forward(ctx, t):
        ctx.save_for_backward(t)
        return t.sin()

    @staticmethod
    def backward(ctx, grad):
        Counted.backwards += 1
        return grad * ctx.saved_tensors[0].cos()


def double_sine(theta):
    return Counted.apply(theta), 2 * theta.sin()


@pytest.fixture
def theta():
    Counted.backwards = 0
    torch.manual_seed(0)
    return torch.randn(5, requires_grad=True)


def loss(generated, theta, factor=1.0):
    a, b = generated(theta)
    return factor * (a * b).sum()


def expected_gradient(theta, factor=1.0):
    leaf = theta.detach().clone().requires_grad_()
    (factor * leaf.sin() * 2 * leaf.sin()).sum().backward()
    return leaf.grad


def test_evaluates_and_pulls_back_once(theta):
    generated = Generated(double_sine)
    (loss(generated, theta) + loss(generated, theta, 3.0)).backward()
    assert (generated.evaluations, Counted.backwards) == (1, 1)
    torch.testing.assert_close(theta.grad, expected_gradient(theta, 4.0))


def test_micro_batches_share_the_evaluation(theta):
    generated = Generated(double_sine)
    for factor in (1.0, 2.0, 3.0):
        loss(generated, theta, factor).backward()
    assert (generated.evaluations, Counted.backwards) == (1, 3)
    torch.testing.assert_close(theta.grad, expected_gradient(theta, 6.0))


def test_held_gradients_are_pulled_back_together(theta):
    generated = Generated(double_sine)
    generated.hold()
    for factor in (1.0, 2.0, 3.0):
        loss(generated, theta, factor).backward()
    assert theta.grad is None and Counted.backwards == 0
    generated.release()
    assert Counted.backwards == 1
    torch.testing.assert_close(theta.grad, expected_gradient(theta, 6.0))
    loss(generated, theta).backward()
    torch.testing.assert_close(theta.grad, expected_gradient(theta, 7.0))


def test_discarded_gradients_are_gone(theta):
    generated = Generated(double_sine)
    generated.hold()
    loss(generated, theta).backward()
    generated.release(discard=True)
    assert theta.grad is None
    loss(generated, theta).backward()
    torch.testing.assert_close(theta.grad, expected_gradient(theta))


def test_a_source_that_changes_while_gradients_are_held_raises(theta):
    generated = Generated(double_sine)
    generated.hold()
    loss(generated, theta).backward()
    with torch.no_grad():
        theta.add_(1)
    with pytest.raises(RuntimeError, match="changed while gradients"):
        generated(theta)


def in_place(theta):
    with torch.no_grad():
        theta.add_(1.0)


def optimizer_step(theta):
    theta.grad = torch.ones_like(theta)
    torch.optim.SGD([theta], lr=1.0).step()


def optimizer_that_writes_behind_the_counter(theta):
    class Raw(torch.optim.Optimizer):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1.0)

    version = theta._version
    Raw([theta], {}).step()
    assert theta._version == version


def new_memory(theta):
    theta.data = theta.data + 1.0


@pytest.mark.parametrize("change", [in_place, optimizer_step, optimizer_that_writes_behind_the_counter, new_memory])
def test_a_changed_source_is_noticed(change, theta):
    generated = Generated(double_sine)
    generated(theta)
    change(theta)
    torch.testing.assert_close(generated(theta)[0], theta.sin())
    assert generated.evaluations == 2
    loss(generated, theta).backward()


def test_another_tensor_or_another_need_of_gradients_is_noticed(theta):
    generated = Generated(double_sine)
    assert not generated(theta.detach())[0].requires_grad
    assert generated(theta)[0].requires_grad
    theta.requires_grad_(False)
    assert not generated(theta)[0].requires_grad
    assert generated.evaluations == 3


def test_forget_after_a_write_that_nothing_shows(theta):
    generated = Generated(double_sine)
    generated(theta)
    theta.data.add_(1.0)
    generated.forget()
    torch.testing.assert_close(generated(theta)[0], theta.sin())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_first_needed_without_gradients_serve_training(mode, theta):
    generated = Generated(double_sine)
    with mode():
        generated(theta)
    loss(generated, theta).backward()
    assert generated.evaluations == 1
    torch.testing.assert_close(theta.grad, expected_gradient(theta))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_round_what_is_generated(compiled, theta):
    generated = Generated(lambda t: (t[:, None] @ t[None, :],))
    call = torch.compile(generated, fullgraph=True, backend="aot_eager") if compiled else generated
    with torch.autocast("cpu", torch.bfloat16):
        (value,) = call(theta)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("warm", [False, True], ids=["evaluated in the checkpoint", "evaluated before"])
def test_checkpoint_recomputes_without_evaluating_again(use_reentrant, warm, theta):
    generated = Generated(double_sine)
    if warm:
        generated(theta)
    x = torch.randn(5, requires_grad=True)

    def block(x):
        a, b = generated(theta)
        return (x * a).sin() * b

    def twice(run):
        x.grad = theta.grad = None
        run(run(x)).sum().backward()
        return x.grad, theta.grad

    got = twice(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert generated.evaluations == 1
    torch.testing.assert_close(got, twice(block))


def test_a_copy_remembers_nothing(theta):
    generated = Generated(double_sine)
    generated(theta)
    for twin in (copy.deepcopy(generated), pickle.loads(pickle.dumps(generated))):
        assert twin.evaluations == 0
        torch.testing.assert_close(twin(theta)[0], theta.sin())


def test_compiled_code_computes_in_its_graph(theta):
    generated = Generated(lambda t: (t.sin(), 2 * t.sin()))
    compiled = torch.compile(lambda t: loss(generated, t), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(theta), loss(Generated(double_sine), theta))
        in_place(theta)
    assert generated.evaluations == 0
