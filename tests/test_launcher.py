"""Launching again without Triton's dispatch, against that dispatch, with a driver that launches nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from lowrank_fused.kernels import launch as launching  # noqa: E402
from lowrank_fused.kernels import launcher as module  # noqa: E402
from lowrank_fused.kernels.gemm import descriptor  # noqa: E402
from lowrank_fused.kernels.launch import Launch, Tile, record, targeting, zeroed_counters  # noqa: E402
from lowrank_fused.kernels.launcher import Launcher, launcher_of  # noqa: E402
from lowrank_fused.tools.shipped import shipped_cases  # noqa: E402

JITTED: list[JITFunction] = []


class Compiled(CompiledKernel):
    """What Triton makes of a kernel, but for the binary. A function is what the driver is told to launch."""

    def __init__(self, src: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        self.src, self.name, self.hash = src, src.fn.fn.__name__, str(id(self))
        self.metadata = SimpleNamespace(shared=0, tmem_size=None, warp_size=32, num_warps=options["num_warps"])
        self.packed_metadata = tuple(options[name] for name in ("num_warps", "num_stages", "maxnreg", "debug"))
        self.metadata_group, self.kernel, self.module, self.function, self._run = {}, self.name, None, None, None

    def __del__(self) -> None:
        """Nothing was loaded."""


class Driver:
    """Notes what it is given to launch; loads a kernel as a function with a number of its own."""

    def __init__(self) -> None:
        self.arch, self.device, self.stream = 90, 0, 11
        self.launched: list[tuple[Any, ...]] = []
        self.compiled: list[Compiled] = []
        self.utils = self

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> tuple[str, int, int]:
        return ("stream", device, self.stream)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**18}

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[Any, ...]:
        return object(), ("function", len(self.compiled), device), 0, 0, 1024

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: self.launched.append(args)

    def compile(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> Compiled:
        self.compiled.append(Compiled(src, target, options))
        return self.compiled[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", fake)
    monkeypatch.setattr("triton.compiler.compile", fake.compile)
    monkeypatch.setattr(module, "_launchers", {})
    for kernel in JITTED:
        kernel.device_caches.clear()
    return fake


@pytest.fixture
def dispatches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that went through Triton's dispatch."""
    names: list[str] = []
    run = JITFunction.run

    def counted(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


@cache
def jitted(function: Callable[..., None], *do_not_specialize: str) -> JITFunction:
    """A kernel of the tests' own that is compiled, also where all others are interpreted."""
    kernel = JITFunction(function, do_not_specialize=do_not_specialize)
    JITTED.append(kernel)
    return kernel


def as_jitted(kernel: Any) -> JITFunction:
    """The same of a kernel."""
    unspecialised = (
        kernel.do_not_specialize if isinstance(kernel, JITFunction) else kernel.rewriter.kwargs["do_not_specialize"]
    )
    return jitted(kernel.fn, *(unspecialised or ()))


@cache
def every_launch(arch: int) -> list[Launch]:
    """All launches that the shipped list is made from, of kernels that are compiled."""
    cases = list(shipped_cases(arch))
    with targeting(arch), record() as log:
        for case in cases:
            case.launch()
    for one in log:
        one.kernel = as_jitted(one.kernel)
    return log


def same(given: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Whether two calls of a compiled kernel have the same tensors and descriptors, and equal everything else.

    Hooks and their metadata are objects of each call, and are looked at elsewhere.
    """
    (*head, _, _, _), (*expected_head, _, _, _) = given[:9], expected[:9]
    assert len(given) == len(expected)
    by_identity = (Tensor, TensorDescriptor)
    return head == expected_head and all(
        a is b if isinstance(a, by_identity) else type(a) is type(b) and a == b
        for a, b in zip(given[9:], expected[9:], strict=True)
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_every_shipped_launch_is_what_dispatch_makes_of_it(arch, fake, dispatches):
    fake.arch = arch
    launches = every_launch(arch)
    assert len(launches) > 300
    for one in launches:
        launcher = launcher_of(one.kernel)
        fake.launched.clear()
        launcher(one, 0)
        dispatches.clear()
        launcher(one, 0)
        assert not dispatches, f"{one.name} was dispatched again"
        one.kernel[one.grid](**one.args, **one.options)
        first, again, expected = fake.launched
        assert same(first, expected) and same(again, expected), one.name


class Changes:
    """Draws arguments that a binary may or may not depend on: sizes, alignment, dtypes, what is not there."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, param: Any, value: Any) -> Any:
        if isinstance(value, Tensor) or value is None:
            dtypes = (torch.bfloat16, torch.float32, torch.int64)
            shift = self.random.choice((0, 0, 8))
            some = torch.empty(64, dtype=self.random.choice(dtypes)).view(torch.uint8)[shift : 64 - 8 + shift]
            return self.random.choice((None, some.view(self.random.choice(dtypes))))
        if param.is_constexpr:
            return self.random.choice((value, 16, True, 1, "a"))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            sizes = (0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**62, True)
            return self.random.choice(sizes)
        if isinstance(value, float):
            return self.random.choice((0.0, 1.0, -2.5, 1))
        columns = self.random.choice((64, 128))
        dtype = self.random.choice((torch.bfloat16, torch.float16))
        return descriptor(torch.empty(64, 128, dtype=dtype), self.random.choice((16, 64)), columns)


def test_no_other_binary_is_taken_for_the_right_one(fake, dispatches):
    """Whatever changes from launch to launch, the function launched is the one that dispatch chooses."""
    draw, reused = Changes(7), 0
    launches = {one.kernel.fn: one for arch in (80, 90) for one in every_launch(arch)}
    for one in launches.values():
        launcher = Launcher(one.kernel)
        for _ in range(60):
            args = dict(one.args)
            for param in draw.random.sample(one.kernel.params, draw.random.randint(0, 3)):
                args[param.name] = draw(param, args[param.name])
            tile = draw.random.choice((one.tile, Tile(num_warps=8), Tile(num_stages=1), Tile(max_registers=255)))
            changed = Launch(one.kernel, one.grid, args, tile)
            fake.launched.clear()
            dispatches.clear()
            launcher(changed, 0)
            reused += not dispatches
            one.kernel[one.grid](**args, **changed.options)
            assert same(*fake.launched), one.name
    assert reused > 100


def _toy_kernel(x_ptr, count, width, scale, BLOCK: tl.constexpr):
    pass


def toy(count: int = 5, width: int = 48, scale: float = 1.0, x: Tensor | None = None) -> Launch:
    x = torch.empty(4) if x is None else x
    args = {"BLOCK": 16, "scale": scale, "x_ptr": x, "width": width, "count": count}
    return Launch(TOY, (count,), args, Tile())


TOY = jitted(_toy_kernel, "count")


@pytest.fixture
def launcher(fake) -> Launcher:
    return Launcher(TOY)


def test_what_no_binary_depends_on_needs_no_dispatch(launcher, fake, dispatches):
    for count, scale in ((5, 1.0), (1, 2.0), (16, 0.0), (2**31 - 1, -1.0)):
        launcher(toy(count, scale=scale), 0)
    assert len(dispatches) == len(fake.compiled) == 1
    assert [args[0] for args in fake.launched] == [5, 1, 16, 2**31 - 1]
    launcher(toy(2**31), 0)
    launcher(toy(width=49), 0)
    launcher(toy(x=torch.empty(5)[1:]), 0)
    launcher(toy(x=torch.empty(4, dtype=torch.float64)), 0)
    assert len(dispatches) == len(fake.compiled) == 5


def test_stream_and_device_are_those_of_each_call(launcher, fake, dispatches):
    launcher(toy(), 0)
    fake.stream = 12
    launcher(toy(), 0)
    fake.device = 1
    launcher(toy(), 1)
    launcher(toy(), 1)
    assert len(dispatches) == 2
    assert [args[3] for args in fake.launched] == [
        ("stream", 0, 11), ("stream", 0, 12), ("stream", 1, 12), ("stream", 1, 12)
    ]  # fmt: skip
    assert [args[4][2] for args in fake.launched] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "hook", ["pre_run_hooks", "launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"]
)
def test_who_watches_launches_sees_dispatch(hook, launcher, fake, dispatches, monkeypatch):
    def watch(*args: Any, **kwargs: Any) -> tuple[str, str]:
        return "key", "hash"

    holder = TOY if hook == "pre_run_hooks" else knobs.runtime
    if not hasattr(holder, hook):
        pytest.skip(f"this Triton has no {hook}")
    value = [watch] if hook == "pre_run_hooks" else watch
    if hasattr(getattr(holder, hook), "calls"):
        holder, hook, value = getattr(holder, hook), "calls", [watch]
    launcher(toy(), 0)
    with monkeypatch.context() as patch:
        patch.setattr(holder, hook, value)
        launcher(toy(), 0)
        launcher(toy(), 0)
    assert len(dispatches) == 3
    launcher(toy(), 0)
    assert len(dispatches) == 3


def test_debugging_has_a_binary_of_its_own(launcher, fake, dispatches, monkeypatch):
    launcher(toy(), 0)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    for _ in range(2):
        launcher(toy(), 0)
    assert len(dispatches) == 2
    assert [args[5][3] for args in fake.launched] == [False, True, True]


@pytest.mark.parametrize("returned", [None, "future", "short"])
def test_what_dispatch_returns_is_used_only_if_it_is_known(returned, launcher, fake, dispatches, monkeypatch):
    """Nothing, something that is still being compiled, or a kernel that is launched without its constants."""
    run = JITFunction.run

    def other(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **kwargs)
        if returned == "short":
            compiled.src.signature.pop("BLOCK", None)
            return compiled
        return None if returned is None else SimpleNamespace(result=lambda: compiled)

    monkeypatch.setattr(JITFunction, "run", other)
    for _ in range(3):
        launcher(toy(), 0)
    assert len(dispatches) == len(fake.launched) == 3


def test_a_launch_that_fails_leaves_nothing_behind(launcher, fake, dispatches, monkeypatch):
    def failing(src: Any, **_: Any) -> None:
        raise RuntimeError("no such instruction")

    with monkeypatch.context() as patch:
        patch.setattr("triton.compiler.compile", failing)
        with pytest.raises(RuntimeError, match="no such instruction"):
            launcher(toy(), 0)
    TOY.device_caches.clear()  # they hold the compiler that failed
    launcher(toy(), 0)
    assert len(fake.launched) == 1


def test_sizes_that_never_return_do_not_pile_up(launcher, fake, monkeypatch):
    monkeypatch.setattr(module, "_MOST_KEYS", 8)
    for width in range(100):
        launcher(toy(width=width), 0)
    (layout,) = launcher._layouts.values()
    assert len(layout.compiled) <= 8


class OnGpu(Tensor):
    """A tensor that says it is on the second GPU."""

    device = torch.device("cuda", 1)


def test_a_launch_runs_on_the_gpu_of_its_tensors(fake, dispatches, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        entered.append(device)
        previous, fake.device = fake.device, device.index
        yield
        fake.device = previous

    monkeypatch.setattr(launching, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.device)
    monkeypatch.setattr(torch.cuda, "device", guard)
    for current in (0, 0, 1):
        fake.device = current
        toy(x=torch.empty(4).as_subclass(OnGpu)).run()
        assert fake.device == current
    assert [args[3][1] for args in fake.launched] == [1, 1, 1]
    assert entered == [OnGpu.device] * 2 and len(dispatches) == 1


def test_a_captured_graph_has_counters_of_its_own(monkeypatch):
    """Outside of a capture launches of a stream share one buffer; inside nothing is taken from it or left in it."""
    zeros, state = torch.zeros, SimpleNamespace(capturing=False, stream=7)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: zeros(*size, **how))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(launching, "_counters", {})
    like = torch.empty(1).as_subclass(OnGpu)

    def counters(count: int = 5) -> Tensor:
        return zeroed_counters(like, count)

    state.capturing = True
    first, second = counters(), counters()
    state.capturing = False
    own = counters()
    assert len({t.data_ptr() for t in (first, second, own)}) == 3
    assert counters(4096) is own and counters(4097) is not own
    own = counters()
    state.capturing = True
    assert counters() is not own and counters(10**5).numel() == 10**5
    state.capturing = False
    assert counters() is own
    state.stream = 8
    assert counters() is not own


def test_a_launch_on_meta_is_recorded_and_not_run(fake):
    with record() as outer, record() as inner:
        one = toy(x=torch.empty(4, device="meta"))
        one.run()
    assert outer == inner == [one] and not fake.launched


def test_traffic_counts_what_is_there():
    """A launch reads and writes the bytes of the tensors it names, those that are None not."""
    x, y = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(7)
    one = Launch(TOY, (1,), {}, Tile(), reads=(x, None, y), writes=(y, None))
    assert (one.name, one.bytes_read, one.bytes_written, one.flops) == ("toy", 30 + 28, 28, 0)
