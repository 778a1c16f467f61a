from setuptools import find_namespace_packages, setup

PLOT = ["matplotlib>=3.8"]
PEFT = ["peft>=0.18"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", *PLOT, *PEFT]
DEMO = [*PEFT, *PLOT, "accelerate>=1.0"]

setup(
    name="lowrank-fused",
    version="0.1.0",
    description="Fused Triton kernels and drop-in layers for fine-tuning with LoRA-family adapters",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # lowrank_fused/kernels is a link to ../kernels, so the folder is importable only as lowrank_fused.kernels.
    packages=find_namespace_packages(include=["lowrank_fused", "lowrank_fused.*"], exclude=["*.tuned"]),
    package_data={"lowrank_fused": ["py.typed"], "lowrank_fused.kernels": ["tuned/*.json"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=4.56",
        "safetensors>=0.4",
        "typer>=0.15",
    ],
    extras_require={
        "peft": PEFT,
        "bench": BENCH,
        "demo": DEMO,
        "dev": [
            *BENCH,
            *DEMO,
            "hypothesis>=6.100",
            "kernels",
            "mypy>=1.15",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
    entry_points={"console_scripts": ["lowrank-fused = lowrank_fused.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
