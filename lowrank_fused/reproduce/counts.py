"""Trainable-parameter counts that papers and PEFT's benchmark print, counted again in the models themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..tools.footprint import count_in_model
from ..tools.tables import markdown_table
from .page import write_page

__all__ = ["PUBLISHED", "Published", "counted", "reproduce_counts"]

QV = "qv"
QKVUD = "q_proj,k_proj,v_proj,up_proj,down_proj"
ALL = "all"


@dataclass(frozen=True)
class Published:
    """A number as a source prints it, and the configuration that it is said to be of.

    `printed` is what the source says; `unit` what one of its last digits stands for (10,000 for "0.26 M"): a count is
    equal if it rounds to `printed`. `why` explains a number that no such configuration has.
    """

    source: str
    model: str
    targets: str
    method: str
    rank: int
    printed: int
    unit: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    why: str = ""


LOLDU, COLA, UNILORA, NEAT = "LoLDU 2410.13618", "CoLA 2505.15471", "Uni-LoRA 2506.00799", "NEAT 2410.01870"
VERA, PEFT = "VeRA 2310.11454", "PEFT's MetaMathQA benchmark"


def _loldu() -> Iterable[Published]:
    for rank in (1, 8, 16, 32, 64, 128, 256, 512):
        yield Published(LOLDU, "vit-b", QV, "loldu", rank, 24 * rank)
    yield Published(
        LOLDU, "vit-b", QV, "loldu", 768, 18_456, why="this one row of the paper's table counts σ, the others don't"
    )
    yield Published(LOLDU, "vit-b", QV, "loldu", 768, 18_456, options={"train_sigma": True})
    yield Published(LOLDU, "roberta-base", QV, "loldu", 768, 18_400, 100)
    yield Published(
        LOLDU, "llama2-7b", QV, "loldu", 1024, 16_000, 1000,
        why="0.016 M is rank 256; the paper's list of hyper-parameters says 1024",
    )  # fmt: skip
    yield Published(LOLDU, "llama2-7b", QV, "loldu", 256, 16_000, 1000)
    yield Published(LOLDU, "vit-b", QV, "lora", 16, 581_000, 1000, why="rank 16 on q and v of ViT-B has 590 K")
    yield Published(LOLDU, "llama2-7b", QV, "lora", 64, 33_600_000, 100_000)
    yield Published(LOLDU, "roberta-base", QV, "lora", 8, 300_000, 100_000)


def _cola() -> Iterable[Published]:
    where = (COLA, "llama-3.1-8b", ALL)
    yield Published(*where, "lora", 8, 20_971_520)
    yield Published(*where, "collaborative", 8, 42_991_616, options={"num_A": 1, "num_B": 3})
    yield Published(*where, "collaborative", 8, 52_953_088, options={"num_A": 2, "num_B": 3})
    yield Published(*where, "collaborative", 8, 149_946_368, options={"num_A": 4, "num_B": 10})
    yield Published(*where, "collaborative", 8, 164_102_144, options={"num_A": 1, "num_B": 14})
    yield Published(*where, "hydralora", 8, 46_727_168, options={"experts": 3})
    yield Published(*where, "hydralora", 8, 181_534_720, options={"experts": 14})


def _unilora() -> Iterable[Published]:
    length = "theta_d_length"
    for model in ("roberta-base", "roberta-large"):
        yield Published(UNILORA, model, QV, "unilora", 4, 23_040, options={length: 23_040})
    yield Published(UNILORA, "llama2-7b", ALL, "unilora", 4, 524_288, options={length: 524_288})
    yield Published(UNILORA, "llama2-13b", ALL, "unilora", 4, 1_048_576, options={length: 1_048_576})
    yield Published(UNILORA, "gemma-7b", ALL, "unilora", 4, 524_288, options={length: 524_288})
    yield Published(UNILORA, "vit-b", QV, "unilora", 4, 72_000, options={length: 72_000})
    yield Published(UNILORA, "vit-l", QV, "unilora", 4, 144_000, options={length: 144_000})
    yield Published(UNILORA, "roberta-large", QV, "lora", 8, 786_000, 1000)
    yield Published(UNILORA, "roberta-large", QV, "vera", 256, 61_000, 1000)
    yield Published(UNILORA, "gemma-7b", ALL, "lora", 64, 200_000_000, 1_000_000)
    yield Published(UNILORA, "llama2-13b", ALL, "lora", 64, 250_300_000, 100_000)


def _neat() -> Iterable[Published]:
    n = {"orientation": "N"}
    late = ",".join(f"layer.{i}.attention.self.{name}" for i in range(4, 12) for name in ("query", "value"))
    yield Published(NEAT, "roberta-base", late, "peanut", 1, 24_576)
    yield Published(NEAT, "roberta-base", QV, "peanut", 8, 300_000, 100_000)
    yield Published(NEAT, "vit-b", QV, "peanut", 7, 258_048)
    yield Published(NEAT, "llama2-7b", QKVUD, "peanut", 32, 56_098_816)
    yield Published(NEAT, "llama2-7b", QKVUD, "peanut", 32, 56_098_816, options=n)
    yield Published(NEAT, "llama-3-8b", QKVUD, "peanut", 32, 62_914_560, options=n)
    yield Published(
        NEAT, "llama-3-8b", QKVUD, "peanut", 32, 62_914_560,
        why="the paper's language models use orientation N; PEFT's orientation T has fewer",
    )  # fmt: skip


def _peft() -> Iterable[Published]:
    where = (PEFT, "llama-3.2-3b", QV)
    yield Published(*where, "lora", 32, 9_175_040)
    yield Published(*where, "dora", 32, 9_289_728)
    yield Published(*where, "adalora", 64, 18_353_664)  # its target_r is 32
    yield Published(*where, "peanut", 32, 7_340_032)
    yield Published(*where, "peanut", 1, 229_376)
    yield Published(*where, "vera", 256, 129_024)
    yield Published(*where, "vblora", 4, 1_212_416)
    yield Published(*where, "miss", 64, 7_340_032)
    yield Published(*where, "unilora", 32, 256, options={"theta_d_length": 256})


def _others() -> Iterable[Published]:
    yield Published("LoRA-XS 2405.17604", "roberta-large", "query,value,output.dense", "lora_xs", 16, 25_000, 1000)
    tied = {"u": 13, "weight_tying": 1.0}
    yield Published("TinyLoRA 2602.04118", "qwen2.5-7b", ALL, "tinylora", 2, 13, options=tied)
    yield Published(VERA, "roberta-base", QV, "vera", 1024, 43_000, 1000)
    yield Published(VERA, "roberta-large", QV, "vera", 256, 61_000, 1000)


# (model, targets) -> LoRA at rank 4, 8, 32, 64; LoLDU (rank, count); CoLA rank 8 with 1 A and 3 B, with 2 A and 3 B;
# NEAT in PEFT's orientation (rank, count) and in the other at rank 32; VeRA at rank 256.
_CLOSED_FORM: dict[tuple[str, str], tuple[Any, ...]] = {
    ("roberta-base", QV): (
        147_456, 294_912, 1_179_648, 2_359_296, (768, 18_432), 589_824, 737_280, (8, 294_912), 1_179_648, 24_576,
    ),
    ("roberta-large", QV): (
        393_216, 786_432, 3_145_728, 6_291_456, (256, 12_288), 1_572_864, 1_966_080, (8, 786_432), 3_145_728, 61_440,
    ),
    ("llama2-7b", QV): (
        2_097_152, 4_194_304, 16_777_216, 33_554_432, (1024, 65_536), 8_388_608, 10_485_760, (32, 16_777_216),
        16_777_216, 278_528,
    ),
    ("llama2-7b", QKVUD): (
        7_012_352, 14_024_704, 56_098_816, 112_197_632, (256, 40_960), 28_049_408, 35_061_760, (32, 56_098_816),
        56_098_816, 917_504,
    ),
    ("llama2-7b", ALL): (
        9_994_240, 19_988_480, 79_953_920, 159_907_840, (256, 57_344), 41_746_432, 50_855_936, (32, 87_031_808),
        72_876_032, 1_417_216,
    ),
    ("llama2-13b", ALL): (
        15_646_720, 31_293_440, 125_173_760, 250_347_520, (256, 71_680), 65_372_160, 79_626_240, (32, 136_314_880),
        114_032_640, 2_201_600,
    ),
    ("llama-3.1-8b", ALL): (
        10_485_760, 20_971_520, 83_886_080, 167_772_160, (256, 57_344), 42_991_616, 52_953_088, (32, 88_080_384),
        79_691_776, 1_433_600,
    ),
    ("llama-3-8b", QKVUD): (
        7_077_888, 14_155_776, 56_623_104, 113_246_208, (256, 40_960), 26_738_688, 34_603_008, (32, 50_331_648),
        62_914_560, 827_392,
    ),
    ("llama-3.2-3b", QV): (
        1_146_880, 2_293_760, 9_175_040, 18_350_080, (256, 14_336), 4_128_768, 5_505_024, (32, 7_340_032), 11_010_048,
        129_024,
    ),
    ("gemma-7b", ALL): (
        12_500_992, 25_001_984, 100_007_936, 200_015_872, (256, 50_176), 55_279_616, 65_142_784, (32, 121_110_528),
        78_905_344, 1_942_528,
    ),
}  # fmt: skip


def _closed_form() -> Iterable[Published]:
    for (model, targets), (*lora, loldu, cola13, cola23, neat_t, neat_n, vera) in _CLOSED_FORM.items():
        where = ("closed form", model, targets)
        for rank, count in zip((4, 8, 32, 64), lora, strict=True):
            yield Published(*where, "lora", rank, count)
        yield Published(*where, "loldu", *loldu)
        yield Published(*where, "collaborative", 8, cola13, options={"num_A": 1, "num_B": 3})
        yield Published(*where, "collaborative", 8, cola23, options={"num_A": 2, "num_B": 3})
        yield Published(*where, "peanut", *neat_t)
        yield Published(*where, "peanut", 32, neat_n, options={"orientation": "N"})
        yield Published(*where, "vera", 256, vera)


PUBLISHED: tuple[Published, ...] = (*_closed_form(), *_loldu(), *_cola(), *_unilora(), *_neat(), *_others(), *_peft())


def counted(row: Published) -> int:
    """Elements that train, counted in the model's own class without weights."""
    return count_in_model(row.model, row.method, row.targets, row.rank, **row.options).trainable


def equal(row: Published, count: int) -> bool:
    """Whether the count is the printed number, at the precision to which it is printed."""
    return abs(count - row.printed) <= (row.unit // 2 if row.unit > 1 else 0)


def reproduce_counts(out: Path, cache: Path, progress: Progress, **_: Any) -> Path:
    """Count all of PUBLISHED and write counts.md and counts.json; ValueError if one differs without a reason."""
    bar = progress.add_task("parameter counts", total=len(PUBLISHED))
    table, content, unexplained = [], [], []
    for row in PUBLISHED:
        count = counted(row)
        same = equal(row, count)
        options = "".join(f", {key}={value}" for key, value in row.options.items())
        where = row.targets if len(row.targets) < 60 else f"{row.targets[:57]}…"
        what = f"{row.method} r={row.rank}{options}; {row.model}, {where}"
        table.append((what, row.source, f"{row.printed:,}", f"{count:,}", "equal" if same else row.why or "DIFFERENT"))
        content.append({**asdict(row), "counted": count, "equal": same})
        if not same and not row.why:
            unexplained.append(f"{what}: printed {row.printed:,}, counted {count:,}")
        progress.advance(bar)
    parts = [
        "Counted in the model classes of transformers on the meta device, linears without biases. A printed number "
        'that is rounded is compared at its precision. Source "closed form" is r (in + out) and its like, summed over '
        "the modules by hand.",
        markdown_table(("configuration", "source", "printed", "counted", ""), table),
    ]
    page = write_page(out, "counts", "Trainable parameters, as printed and as counted", parts, {"rows": content})
    if unexplained:
        raise ValueError(f"{page}: {'; '.join(unexplained)}")
    return page
