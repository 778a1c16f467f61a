"""Launches a kernel the way it was launched before, without Triton's dispatch.

`kernel[grid](**args)` asks of every argument, at every launch, what the compiler may assume of it, and looks the
answers up as one long string: more Python than everything else that a launch takes. Here the arguments themselves make
a key at least as fine, and it leads to the compiled kernel that dispatch returned for the first launch that had it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

if TYPE_CHECKING:
    from .launch import Launch

__all__ = ["Launcher", "launcher_of"]

# Sizes that change at every launch would fill the memory; dispatch finds again what is forgotten.
_MOST_KEYS = 4096


class _Layout(NamedTuple):
    """What is where among arguments of given types, and the kernels that were compiled for such arguments."""

    exact: Callable[[Sequence[Any]], Any]
    unspecialised: tuple[int, ...]
    tensors: tuple[int, ...]
    descriptors: tuple[int, ...]
    compiled: dict[tuple[Any, ...], CompiledKernel]


class Launcher:
    """The compiled kernels of one jitted function, by what tells their launches apart.

    A key has the device, the compiler's options, the type of every argument, the constants, sizes and strides as they
    are, whether other integers fit into 32 bits, and dtype and alignment of every tensor. Values of floats have no part
    in it. Device and stream are the current ones of each call.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._in_order = itemgetter(*(param.name for param in kernel.params))
        self._layouts: dict[tuple[type, ...], _Layout] = {}

    def __call__(self, launch: Launch, device: int) -> None:
        """Run the launch on the current device, whose index this is."""
        kernel = self._kernel
        if _is_observed(kernel):
            kernel[launch.grid](**launch.args, **launch.options)
            return
        values = self._in_order(launch.args)
        types = tuple(map(type, values))
        layout = self._layouts.get(types)
        if layout is None:
            layout = self._layouts[types] = _layout_of(kernel.params, values)
        tile = launch.tile
        key: Any = [device, knobs.runtime.debug, tile.num_warps, tile.num_stages, tile.max_registers]
        key.append(layout.exact(values))
        for position in layout.unspecialised:
            key.append(values[position] >> 31)
        for position in layout.tensors:
            tensor = values[position]
            key.append(tensor.dtype)
            key.append(tensor.data_ptr() % 16 == 0)
        for position in layout.descriptors:
            descriptor = values[position]
            key.append(descriptor.base.dtype)
            key.extend(descriptor.block_shape)
        key = tuple(key)
        compiled = layout.compiled.get(key)
        if compiled is not None:
            compiled[(*launch.grid, 1, 1)](*values)
            return
        compiled = kernel[launch.grid](**launch.args, **launch.options)
        if _takes_all_arguments(compiled, kernel):
            if len(layout.compiled) >= _MOST_KEYS:
                layout.compiled.clear()
            layout.compiled[key] = compiled


_launchers: dict[Any, Launcher] = {}


def launcher_of(kernel: Any) -> Launcher:
    """The launcher of a jitted function."""
    # By the Python function: to hash a jitted one takes a lock.
    launcher = _launchers.get(kernel.fn)
    if launcher is None:
        launcher = _launchers[kernel.fn] = Launcher(kernel)
    return launcher


def _layout_of(params: Sequence[Any], values: Sequence[Any]) -> _Layout:
    """Where among these arguments to look for what a binary depends on."""
    exact: list[int] = []
    unspecialised: list[int] = []
    tensors: list[int] = []
    descriptors: list[int] = []
    for position, (param, value) in enumerate(zip(params, values, strict=True)):
        if param.is_constexpr:
            exact.append(position)
        elif isinstance(value, Tensor):
            tensors.append(position)
        elif hasattr(value, "block_shape"):
            descriptors.append(position)
        elif isinstance(value, int):
            (unspecialised if param.do_not_specialize else exact).append(position)
    pick = itemgetter(*exact) if exact else _nothing
    return _Layout(pick, tuple(unspecialised), tuple(tensors), tuple(descriptors), {})


def _nothing(values: Sequence[Any]) -> None:
    """The constants, sizes and strides of a kernel that has none."""


def _is_observed(kernel: Any) -> bool:
    """Whether somebody looks at launches or takes part in compiling: a profiler, say, may want another binary."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # A function in Triton 3.4, and since then a chain that holds any number of them.
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return True
    return bool(kernel.pre_run_hooks) or getattr(runtime, "add_stages_inspection_hook", None) is not None


def _takes_all_arguments(compiled: Any, kernel: Any) -> bool:
    """Whether this is a compiled kernel that is launched with all parameters of the function, constants included.

    Otherwise, as with Triton that compiles in the background, every launch goes through dispatch.
    """
    if not isinstance(compiled, CompiledKernel):
        return False
    return len(getattr(compiled.src, "signature", ())) == len(kernel.params)
