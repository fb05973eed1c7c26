"""What is measured while a run trains: throughput and where the time goes, gradients by tower, features' geometry."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diptych import geometry
from diptych.distributed import sharding, zero
from diptych.distributed.collectives import all_gather_rows
from diptych.distributed.groups import world_group
from diptych.losses.batch import Pairs
from diptych.models.dual_encoder import DualEncoder
from diptych.train.recipe import Recipe

_GEOMETRY_PAIRS = 4096
"""Pairs of a batch, of all ranks together, whose geometry is measured: their work grows with the square."""


class Throughput:
    """Counts samples and seconds since the last reading, and the share of them spent waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Time inside does not count at all."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def count(self, samples: int) -> None:
        """Samples of all ranks consumed by one step."""
        self._samples += samples

    def read(self) -> dict[str, float]:
        """The figures since the last reading; starts the next one."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        figures = {"train/samples_per_second": self._samples / seconds, "data/wait_share": self._waited / seconds}
        self._restart()
        return figures


def inside_step(recipe: Recipe, step: int, model: DualEncoder, pairs: Pairs) -> dict[str, Tensor]:
    """Figures by name that only step `step` itself can give, between its backward pass and clipping; on the device.
    Nothing is computed where the step has no line in metrics.jsonl. Every rank must call."""
    figures: dict[str, Tensor] = {}
    if recipe.is_logged(step):
        figures |= {f"train/grad_norm/{tower}": norm for tower, norm in tower_norms(model).items()}
    if recipe.has_geometry(step):
        figures |= {f"geometry/{name}": value for name, value in batch_geometry(pairs).items()}
    return figures


def tower_norms(model: DualEncoder) -> dict[str, Tensor]:
    """Norms of the towers' gradients, whole on every rank; without towers that do not learn. Every rank must call.

    Empty under ZeRO: DeepSpeed keeps gradients in slices that do not end where a tower does, and putting them together
    would cost what ZeRO saves.
    """
    norms = {}
    for name in ("image_tower", "text_tower", "text_decoder"):
        tower = getattr(model, name)
        parameters = tower.parameters() if tower is not None else ()
        known = [p.grad for p in parameters if p.grad is not None and not zero.has(p)]
        if known:
            norms[name] = sharding.total_norm(known)
    return norms


@torch.no_grad()
def batch_geometry(pairs: Pairs) -> dict[str, Tensor]:
    """`diptych.geometry` of the batch, or of as many pairs of each rank as make 4,096; the same on every rank. Every
    rank must call."""
    group = world_group()
    most = max(1, _GEOMETRY_PAIRS // group.size)
    image, text = (all_gather_rows(part[:most], group) for part in (pairs.image_features, pairs.text_features))
    return {
        "alignment": geometry.alignment(image, text),
        "modality_gap": geometry.modality_gap(image, text),
        "uniformity_image": geometry.uniformity(image),
        "uniformity_text": geometry.uniformity(text),
        "effective_rank_image": geometry.effective_rank(image),
        "effective_rank_text": geometry.effective_rank(text),
    }
