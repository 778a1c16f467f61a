"""What gets built and installed: the wheel, the source distribution, the pinned versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lowrank_fused

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "lowrank_fused")
KERNELS = sorted(f.name for f in (ROOT / "kernels").glob("*.py"))
TUNED = sorted(f.name for f in (ROOT / "kernels" / "tuned").glob("*.json"))


def run(*command: str, cwd: Path) -> str:
    """Run this interpreter with arguments, without the folders that the surroundings put on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_source(target: Path) -> Path:
    """What a build needs, the link kept as a link: building must not write into the checkout."""
    target.mkdir(parents=True)
    for name in SOURCE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    assert (target / "lowrank_fused" / "kernels").is_symlink()
    return target


def build_wheel(source: Path, target: Path) -> Path:
    """The wheel that pip makes of a source tree, with the setuptools that is installed here."""
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "wheel", *options, "--wheel-dir", str(target), ".", cwd=source)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_source(folder / "source"), folder / "built")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = copy_source(folder / "source")
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel alone was installed into."""
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=target)
    return target


def metadata(wheel: Path):
    """The wheel's METADATA as a message."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_wheel_holds_the_kernels_as_plain_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info for info in archive.infolist()}
        for name in KERNELS:
            info = files[f"lowrank_fused/kernels/{name}"]
            assert info.external_attr >> 16 & 0o170000 in (0, 0o100000), f"{name} is not a plain file"
            assert archive.read(info) == (ROOT / "kernels" / name).read_bytes()
    assert {f"lowrank_fused/kernels/tuned/{name}" for name in TUNED} <= set(files)
    assert "lowrank_fused/py.typed" in files


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lowrank_fused"}
    assert "lowrank_fused/kernels/__init__.py" not in names
    expected = {f.relative_to(ROOT).as_posix() for f in (ROOT / "lowrank_fused").glob("**/*.py")}
    assert expected <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_source_distribution_holds_plain_files_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
        assert not [name for name, m in members.items() if m.issym() or m.islnk()]
        assert {f"lowrank_fused/kernels/{name}" for name in KERNELS} <= set(members)
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    rebuilt = build_wheel(source, tmp_path / "rebuilt")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


@pytest.mark.parametrize("where", ["elsewhere", "the repository root"])
def test_installed_package_imports(installed, tmp_path, where):
    """From elsewhere the installed one; at the root the checkout, which comes first there, and works too."""
    pytest.importorskip("triton")
    cwd = tmp_path if where == "elsewhere" else ROOT
    printed = run(
        "-c",
        f"import sys; sys.path.insert(1, {str(installed)!r})\n"
        "import lowrank_fused, lowrank_fused.kernels.launch as launch\n"
        "print(lowrank_fused.__file__, launch.__file__, lowrank_fused.__version__, sep='\\n')",
        cwd=cwd,
    )
    package, launch, version = printed.splitlines()
    home = (installed if where == "elsewhere" else ROOT).resolve()
    assert Path(package).parent == home / "lowrank_fused"
    assert Path(launch).parent == home / "lowrank_fused" / "kernels"
    assert version == lowrank_fused.__version__


def test_version_is_written_alike_everywhere(wheel):
    assert metadata(wheel)["Version"] == lowrank_fused.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M).group(1) == lowrank_fused.__version__


def test_metadata_states_the_requirements(wheel):
    said = metadata(wheel)
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.10"
    assert set(said.get_all("Provides-Extra")) == {"peft", "bench", "demo", "examples", "dev"}
    required = [Requirement(text) for text in said.get_all("Requires-Dist")]
    always = {r.name: str(r.specifier) for r in required if r.marker is None or "extra" not in str(r.marker)}
    assert always["torch"] == ">=2.8"
    assert always["triton"] == ">=3.4"
    assert set(always) == {"numpy", "torch", "triton", "transformers", "safetensors", "typer"}


def test_constraints_pin_a_version_that_every_requirement_accepts(wheel):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        pins[requirement.name.lower()] = specifier.version
    for requirement in (Requirement(text) for text in metadata(wheel).get_all("Requires-Dist")):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_command_is_installed(installed, tmp_path):
    """`lowrank-fused --help`, as its entry point starts it."""
    (entry_points,) = installed.glob("lowrank_fused-*.dist-info/entry_points.txt")
    assert "lowrank-fused = lowrank_fused.cli:main" in entry_points.read_text()
    printed = run(
        "-c",
        f"import sys; sys.path.insert(1, {str(installed)!r}); sys.argv = ['lowrank-fused', '--help']\n"
        "from lowrank_fused.cli import main\nmain()",
        cwd=tmp_path,
    )
    assert "doctor" in printed and "demo" in printed
