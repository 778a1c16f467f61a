"""The mask: a pure function of seed, row and column, of the right rate, and lossless as bits."""

from __future__ import annotations

import pytest
import torch

from lowrank_fused import dropout
from lowrank_fused.dropout import draw_keep, draw_seed, pack, threshold, unpack, zero_dropped


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


def hash_lane(seed: int, row: int, column: int, k: int) -> int:
    """The signed lane of one element, from the definition in Python integers."""
    z = seed % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    h = (row * 4 * -(-k // 8) + column // 2) * 0x9E3779B1 + z % 2**32
    h %= 2**32
    h = ((h ^ h >> 16) * 0x7FEB352D + (z >> 32)) % 2**32
    h = (h ^ h >> 15) * 0x846CA68B % 2**32
    h ^= h >> 16
    lane = h >> 16 if column % 2 else h & 0xFFFF
    return lane - 65536 if lane >= 32768 else lane


@pytest.mark.parametrize("k", [1, 8, 13, 64])
@pytest.mark.parametrize("seed", [0, 1, -(2**63), 2**63 - 1, -98765432109876])
def test_every_element_follows_the_definition(seed, k):
    keep = draw_keep(seed_of(seed), 5, k, 0.3)
    expected = [[hash_lane(seed, row, column, k) >= threshold(0.3) for column in range(k)] for row in range(5)]
    assert keep[:, :k].tolist() == expected


@pytest.mark.parametrize("seed", [0, -(2**63), 2**63 - 1, -98765432109876])
def test_seeds_that_nobody_waits_for_and_seeds_on_a_cpu_give_one_key(monkeypatch, seed):
    on_a_cpu = [half.item() for half in dropout._key(seed_of(seed))]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [half.item() for half in dropout._key(seed_of(seed))] == on_a_cpu


@pytest.mark.parametrize("elements", [2, 26, 64, 1000])
def test_the_mask_does_not_depend_on_how_much_is_drawn_at_a_time(monkeypatch, elements):
    whole = draw_keep(seed_of(9), 13, 37, 0.3)
    monkeypatch.setattr(dropout, "_ELEMENTS_AT_A_TIME", elements)
    assert torch.equal(draw_keep(seed_of(9), 13, 37, 0.3), whole)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction_of_the_whole_of_rows_and_of_columns(p):
    keep = draw_keep(seed_of(7), 1024, 512, p).double()
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 4 * sigma / (1024 * 512) ** 0.5
    assert keep.mean(0).std().item() == pytest.approx(sigma / 1024**0.5, rel=0.15)
    assert keep.mean(1).std().item() == pytest.approx(sigma / 512**0.5, rel=0.15)


def test_neighbours_and_neighbouring_seeds_are_uncorrelated():
    keep = draw_keep(seed_of(11), 1024, 512, 0.1).double() - 0.9
    others = [draw_keep(seed_of(s), 1024, 512, 0.1).double() - 0.9 for s in (12, 11 + 2**32, -11)]
    shifted = [keep.roll(by, dim) for by, dim in ((1, 0), (1, 1), (2, 1), (4, 1), (7, 0))]
    for other in (*others, *shifted):
        correlation = (keep * other).mean().item() / 0.09
        assert abs(correlation) < 5 / (1024 * 512) ** 0.5


@pytest.mark.parametrize("k", [1, 7, 8, 9, 64, 100])
def test_bits_come_back_as_they_went(k):
    keep = draw_keep(seed_of(3), 17, k, 0.4)
    bits = pack(keep)
    assert bits.shape == (17, -(-k // 8)) and bits.dtype == torch.uint8
    assert torch.equal(unpack(bits, k), keep[:, :k])
    assert [bool(bits[2, j // 8] >> j % 8 & 1) for j in range(k)] == keep[2, :k].tolist()


@pytest.mark.parametrize("few", [0, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_zero_dropped_keeps_or_clears_whatever_is_there(monkeypatch, dtype, few):
    monkeypatch.setattr(dropout, "_FEW_ELEMENTS", few)
    keep = draw_keep(seed_of(3), 9, 21, 0.4)
    x = torch.randn(9, 42).to(dtype)[:, ::2]
    expected = x * keep[:, :21]
    x[~keep[:, :21]] = torch.nan
    assert torch.equal(zero_dropped(x, keep), expected)
    assert zero_dropped(x, keep, out=x) is x and torch.equal(x, expected)


def test_seed_comes_from_torchs_generator():
    torch.manual_seed(5)
    first = draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, draw_seed(torch.device("cpu")))


def test_no_tokens():
    assert draw_keep(seed_of(1), 0, 12, 0.5).shape == (0, 16)
