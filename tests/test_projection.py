"""Uni-LoRA's projection: PEFT's index, the bijection, balance and isometry, what is kept and shared."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lowrank_fused as lf
from lowrank_fused.factors import gather as gather_ops
from lowrank_fused.factors.projection import Permutation, projection

CPU = torch.device("cpu")
each_recipe = pytest.mark.parametrize("index", ["table", "bijection"])


def test_golden_indices():
    entries = projection(1000, 37, 42, "table").entries(0, 1000, CPU)
    assert entries[:8].tolist() == [31, 34, 9, 17, 28, 15, 33, 29]
    assert entries[-3:].tolist() == [22, 35, 36]
    entries = projection(1000, 37, 42, "bijection").entries(0, 1000, CPU)
    assert entries[:8].tolist() == [24, 3, 29, 13, 9, 18, 36, 13]


@pytest.mark.parametrize(
    ("total", "length", "seed"),
    [(1000, 37, 42), (40, 37, 0), (74, 37, 1), (20, 37, 5), (30_011, 20_003, 3), (70_500, 70_000, 2**40), (5, 1, 1)],
)
def test_the_table_is_pefts(total, length, seed):
    from peft.tuners.unilora.model import UniLoraModel

    p = projection(total, length, seed, "table")
    assert torch.equal(p.entries(0, total, CPU).long(), UniLoraModel.generate_index(total, length, seed))
    assert p.table(CPU).dtype == (torch.uint16 if length <= 65536 else torch.int32)


def test_another_random_stream_is_noticed(monkeypatch):
    import numpy as np

    from lowrank_fused.factors import projection as module

    class Other:
        """A generator that shuffles differently, as a later NumPy's might."""

        def __init__(self, generator):
            self.generator, self.choice = generator, generator.choice

        def shuffle(self, values):
            self.generator.shuffle(values)
            values[:2] = values[1::-1].copy()

    ours = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Other(ours(seed)))
    module._check_stream.cache_clear()
    with pytest.raises(lf.UnsupportedError, match="NumPy .* shuffles differently"):
        projection(100, 7, 1, "table").table(CPU)
    module._check_stream.cache_clear()


@pytest.mark.parametrize("total", [1, 2, 3, 5, 16, 17, 1000, 65_536, 100_003])
def test_the_bijection_is_one(total):
    permutation, positions = Permutation.seeded(total, 7), torch.arange(total)
    images = permutation(positions)
    assert torch.equal(images.sort().values, positions)
    assert torch.equal(permutation.inverse(images), positions)
    if total >= 1000:
        assert not torch.equal(images, Permutation.seeded(total, 8)(positions))
        # As of a random permutation: few fixed points, and no memory of the order.
        assert (images == positions).sum() < 10
        steps = (images[1:] - images[:-1]).abs().double().mean() / total
        assert abs(steps - 1 / 3) < 0.05


@each_recipe
@pytest.mark.parametrize(("total", "length"), [(1000, 37), (1036, 37), (30_011, 20_003), (20, 37)])
def test_every_entry_is_used_as_often_as_any_other(total, length, index):
    p = projection(total, length, 42, index)
    counts = p.entries(0, total, CPU).long().bincount(minlength=length)
    assert set(counts.tolist()) <= {total // length, total // length + 1}
    assert torch.equal(p.counts(CPU), counts)


@each_recipe
def test_p_is_an_isometry(index):
    p = projection(1000, 37, 42, index)
    rows = torch.eye(37, dtype=torch.float64)
    columns = [gather_ops.project(e, 0, 1000, total=1000, seed=42, index=index) for e in rows]
    matrix = torch.stack(columns, 1)
    torch.testing.assert_close(matrix.T @ matrix, rows, rtol=0, atol=1e-14)
    assert p.kept_bytes() == 37 * 8 + (2 * 1000 if index == "table" else 0)


def test_what_a_device_keeps():
    """Two bytes an element for the index; its inverse only where a kernel sums; nothing at all for a bijection."""
    for length, index, per_element in [(600, "table", 2), (70_000, "table", 4), (600, "bijection", 0)]:
        total = 80_000
        p = projection(total, length, 11, index)
        p.entries(0, total, CPU)
        assert p.kept_bytes() == per_element * total
        if index == "table":
            p.segments(CPU)
            assert p.kept_bytes() == (per_element + 4) * total + 4 * (length + 1)


def test_projections_are_shared_while_they_are_held():
    p = projection(1000, 37, 1, "table")
    assert projection(1000, 37, 1, "table") is p and projection(1000, 37, 2, "table") is not p
    assert copy.deepcopy(p) is p and pickle.loads(pickle.dumps(p)) is p
    p.table(CPU)
    assert len(pickle.dumps(p)) < 200
