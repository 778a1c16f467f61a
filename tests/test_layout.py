"""The shape of the house: folder names, the link, who may import whom, and what an import must not do."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_fused

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lowrank_fused"
SOURCES = sorted(f for folder in ("kernels", PACKAGE, "bench", "tests") for f in (ROOT / folder).rglob("*.py"))

# Who may import whom, by group of modules. A module of the package that is not named here is one of
# "modules": what users build adapters with. Tools are for people at a terminal and for tests; nothing else
# leans on them.
GROUPS = {
    "ground": {
        "dropout",
        "errors",
        "flat_gradient",
        "library",
        "peft_format",
        "plain",
        "registry",
        "target",
        "terms",
        "tiled",
    },
    "kernels": {"kernels"},
    "routes": {"routes"},
    "engine": {"add", "branches", "linear", "operands", "ops"},
    "initializers": {"initializers"},
    "factors": {"factors"},
    "methods": {"methods"},
    "peft": {"peft"},
    "tools": {
        "__main__",
        "benchmark",
        "cli",
        "demo",
        "report",
        "reproduce",
        "roofline",
        "testing",
        "tools",
        "tuning",
    },
}
ARROWS = {
    "ground": {"ground"},
    "kernels": {"kernels"},
    "routes": {"ground", "kernels", "routes"},
    "engine": {"ground", "routes", "engine"},
    "initializers": {"ground", "initializers"},
    "factors": {"ground", "kernels", "factors"},
    "methods": {"ground", "engine", "initializers", "factors", "methods"},
    "modules": {"ground", "engine", "initializers", "factors", "methods", "modules"},
    "peft": {"ground", "routes", "engine", "factors", "methods", "modules", "peft"},
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "factors": {"torch", "numpy"},
    "modules": {"torch", "safetensors"},
    "peft": {"torch", "peft", "rich", "transformers"},
}


def run_python(code: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints; its working directory is the first entry of sys.path."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module_of(source: Path) -> tuple[str, ...]:
    """The dotted name of a file, as a tuple; kernels/x.py is lowrank_fused.kernels.x."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return (PACKAGE, *parts) if parts[0] == "kernels" else parts


def imports_of(source: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside functions too; `from a import b` gives a.b."""
    module = module_of(source)
    package = module[:-1]  # of x/__init__.py, whose module is x.__init__ here, it is x as well
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def group_of(name: str) -> str:
    """The group of a full name inside the package; "package" for what its __init__ exports."""
    part = name.split(".")[1]
    for group, members in GROUPS.items():
        if part in members:
            return group
    is_module = (ROOT / PACKAGE / part).is_dir() or (ROOT / PACKAGE / f"{part}.py").exists()
    return "modules" if is_module else "package"


def forbidden_imports(source: Path) -> list[str]:
    """Imports of a file of the package that go against the arrows."""
    name = ".".join(module_of(source))
    group = group_of(name)
    if group == "tools":
        return []
    # What users import first hands on the names of all others but the tools.
    inside = set(ARROWS) - {"kernels", "routes"} if name == f"{PACKAGE}.__init__" else ARROWS.get(group, set())
    outside = THIRD_PARTY.get(group, {"torch"}) | set(sys.stdlib_module_names) | {"__future__"}
    wrong = []
    for imported in imports_of(source):
        top = imported.split(".")[0]
        allowed = group_of(imported) in inside if top == PACKAGE else top in outside
        if not allowed:
            wrong.append(f"{name} imports {imported}")
    return wrong


def test_no_file_imports_against_the_arrows():
    package = [f for f in SOURCES if f.relative_to(ROOT).parts[0] in ("kernels", PACKAGE)]
    assert len(package) > 20
    assert [wrong for source in package for wrong in forbidden_imports(source)] == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("kernels/new.py", "from lowrank_fused.terms import Terms"),
        ("kernels/new.py", "from ..terms import Terms"),
        ("kernels/new.py", "import transformers"),
        ("lowrank_fused/terms.py", "from .linear import lowrank_linear"),
        ("lowrank_fused/linear.py", "from .layers import LowRankLinear"),
        ("lowrank_fused/methods/new.py", "from ..inject import inject"),
        ("lowrank_fused/methods/new.py", "from .. import inject"),
        ("lowrank_fused/layers.py", "from .kernels.shrink import shrink"),
        ("lowrank_fused/layers.py", "def f():\n    import peft"),
        ("lowrank_fused/inject.py", "from .benchmark import Case"),
        ("lowrank_fused/__init__.py", "from .cli import app"),
    ],
)
def test_the_arrows_are_really_read(tmp_path, monkeypatch, place, line):
    """Each of these lines would be a mistake, and is found."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for folder in ("kernels", f"{PACKAGE}/methods"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("inject", "layers", "cli"):
        (tmp_path / PACKAGE / f"{name}.py").touch()
    (tmp_path / place).write_text(f"import torch\n{line}\n")
    assert len(forbidden_imports(tmp_path / place)) == 1


def test_kernels_folder_never_shadows_the_hub_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT / "kernels" not in Path(spec.origin).parents


def test_nothing_imports_the_bare_name():
    found = [(str(f), name) for f in SOURCES for name in imports_of(f) if name.split(".")[0] == "kernels"]
    assert found == []


def test_the_link_is_a_link_and_committed_as_one():
    assert os.readlink(ROOT / PACKAGE / "kernels") == os.path.join("..", "kernels")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is committed can't be seen")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", f"{PACKAGE}/kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    mode, _, _, path = listed.stdout.split()
    assert (mode, path) == ("120000", f"{PACKAGE}/kernels")


def test_kernels_are_found_under_the_package_name():
    pytest.importorskip("triton")
    import lowrank_fused.kernels.launch as module

    assert module.__name__ == "lowrank_fused.kernels.launch"
    assert Path(module.__file__).resolve() == ROOT / "kernels" / "launch.py"


def test_transformers_works_at_the_repository_root():
    """transformers imports what the name `kernels` finds; at the root that must still be Hugging Face's."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    pytest.importorskip("triton")
    printed = run_python(
        "import kernels\n"
        "from transformers import LlamaForCausalLM\n"
        "import lowrank_fused.kernels.launch as ours\n"
        "print(kernels.__file__, LlamaForCausalLM.__name__, ours.__file__, sep='\\n')"
    )
    hub, name, ours = printed.strip().splitlines()[-3:]
    assert ROOT / "kernels" not in Path(hub).resolve().parents
    assert name == "LlamaForCausalLM"
    assert Path(ours).resolve() == ROOT / "kernels" / "launch.py"


def test_public_names_are_these():
    assert sorted(lowrank_fused.__all__) == [
        "AccelerateCallback",
        "AdapterConfig",
        "Branch",
        "CheckpointError",
        "Gate",
        "LaunchError",
        "LowRankFusedError",
        "LowRankLinear",
        "NotAcceleratedError",
        "Report",
        "SingularPivotError",
        "Terms",
        "UnsupportedError",
        "accelerate",
        "accelerated",
        "disable",
        "explain",
        "group",
        "hold_gradients",
        "initialize_eva",
        "inject",
        "load_adapter",
        "lowrank_add",
        "lowrank_group",
        "lowrank_linear",
        "lowrank_linear_ref",
        "merge",
        "parameter_groups",
        "remove",
        "restore",
        "save_adapter",
        "trainable_parameters",
        "ungroup",
        "unmerge",
    ]
    undocumented = [name for name in lowrank_fused.__all__ if not getattr(lowrank_fused, name).__doc__]
    assert undocumented == []


IMPORT_WITH_GUARDED_CUDA = """
import sys, torch

def refuse(*args, **kwargs):
    raise AssertionError("the import asked for a GPU")

questions = ["_lazy_init", "init", "is_available", "device_count", "current_device", "synchronize"]
questions += ["get_device_capability", "get_device_properties", "get_device_name", "mem_get_info"]
for name in questions:
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, refuse)
before = set(sys.modules)
import lowrank_fused
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "transformers", "peft", "matplotlib", "typer", "rich", "kernels"} & new
assert not heavy, heavy
assert "lowrank_fused.kernels" not in sys.modules
"""

TRAIN_WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # no import finds it, no search either
import torch, lowrank_fused as lf, lowrank_fused.cli
torch.manual_seed(0)
base = torch.nn.Linear(24, 17)
layer = lf.LowRankLinear.from_linear(base, method="lora", rank=4, dropout=0.5)
x = torch.randn(9, 24, requires_grad=True)
layer(x).square().sum().backward()
assert layer.lora_B.grad.abs().sum() > 0 and x.grad.isfinite().all()
assert torch.allclose(layer.eval()(x), base(x), atol=1e-6)
assert sys.modules["triton"] is None and lf.target.HAS_TRITON is False
"""

COMPARE_BEFORE_AND_AFTER = """
import sys, torch, transformers.pytorch_utils, transformers.models.llama.modeling_llama, peft.tuners.lora

LIBRARIES = ("torch.nn", "torch.autograd", "torch.library", "torch._tensor", "transformers", "peft")

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if module is None or not f"{name}.".startswith(tuple(f"{library}." for library in LIBRARIES)):
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                seen[name, key] = value
            if isinstance(value, type):
                seen |= {(name, key, attribute): member for attribute, member in list(vars(value).items())
                         if callable(member) or isinstance(member, (property, staticmethod, classmethod))}
    return seen

before = snapshot()
import lowrank_fused, lowrank_fused.cli
lowrank_fused.AdapterConfig("lora")
after = snapshot()
changed = [key for key, value in before.items() if after.get(key) is not value]
assert not changed, changed[:5]
watched = [("torch.nn.modules.linear", "Linear", "forward"), ("peft.tuners.lora.layer", "Linear", "forward")]
print(len(before), all(key in before for key in watched))
"""


def test_import_asks_for_no_gpu_and_loads_no_heavy_package():
    run_python(IMPORT_WITH_GUARDED_CUDA)


def test_works_with_triton_absent():
    """The package, its command line and its layers, on a machine where `import triton` fails."""
    run_python(TRAIN_WITHOUT_TRITON)


def test_import_patches_nothing():
    """Functions and class attributes of the libraries that we sit on are the same objects afterwards."""
    pytest.importorskip("peft")
    number, watched = run_python(COMPARE_BEFORE_AND_AFTER).split()[-2:]
    assert int(number) > 1000
    assert watched == "True"
