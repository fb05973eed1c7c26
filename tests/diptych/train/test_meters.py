"""What a step is asked beside its loss, and when."""

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from diptych import geometry
from diptych.config import from_tree
from diptych.losses.batch import Pairs
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL, run_ranks
from diptych.train import meters
from diptych.train.recipe import Recipe


def recipe(*, steps: int, every: int, geometry_every: int | None) -> Recipe:
    log = {"every_steps": every, "geometry_every_steps": geometry_every}
    return from_tree(Recipe, {"data": {"shards": "s"}, "global_batch": 1, "total_samples": steps, "log": log})


@pytest.mark.parametrize(("every", "geometry_every"), [(1, 1), (1, 4), (10, 10), (10, 4), (3, 7), (4, 6), (7, 100)])
def test_geometry_is_in_the_first_line_at_or_behind_each_multiple(every: int, geometry_every: int) -> None:
    settings = recipe(steps=61, every=every, geometry_every=geometry_every)
    lines = [*range(every, 61, every), 61]
    multiples = range(geometry_every, 62, geometry_every)
    wanted = {min(line for line in lines if line >= multiple) for multiple in multiples}
    assert [step for step in range(1, 62) if settings.is_logged(step)] == lines
    assert {step for step in range(1, 62) if settings.has_geometry(step)} == wanted


def test_no_geometry_where_none_is_asked_for() -> None:
    settings = recipe(steps=20, every=1, geometry_every=None)
    assert not any(settings.has_geometry(step) for step in range(1, 21))


@pytest.mark.parametrize("key", ["every_steps", "geometry_every_steps"])
def test_log_settings_are_checked(key: str) -> None:
    from diptych.errors import ConfigError

    for wrong in ({key: 0}, {"wandb": " "}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            from_tree(Recipe, {"data": {"shards": "s"}, "log": wrong})


def model_with_gradients(**changes: Any) -> tuple[DualEncoder, Pairs]:
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | changes), seed=0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    found = model(images, torch.randint(1, 100, (6, 8), generator=generator))
    (found.image_features * found.text_features.roll(1, 0)).sum().mul(found.logit_scale).backward()
    return model, Pairs(found.image_features, found.text_features, found.logit_scale)


def test_only_logged_steps_are_measured() -> None:
    model, pairs = model_with_gradients()
    settings = recipe(steps=40, every=5, geometry_every=10)
    names = {step: set(meters.inside_step(settings, step, model, pairs)) for step in (4, 5, 10)}
    norms = {"train/grad_norm/image_tower", "train/grad_norm/text_tower"}
    assert names[4] == set()
    assert names[5] == norms
    assert names[10] - norms == {
        "geometry/alignment",
        "geometry/modality_gap",
        "geometry/uniformity_image",
        "geometry/uniformity_text",
        "geometry/effective_rank_image",
        "geometry/effective_rank_text",
    }


def test_norms_by_tower() -> None:
    model, _ = model_with_gradients()
    for name, norm in meters.tower_norms(model).items():
        tower: torch.nn.Module = getattr(model, name)
        whole = torch.cat([p.grad.double().flatten() for p in tower.parameters() if p.grad is not None])
        assert norm.item() == pytest.approx(whole.norm().item(), rel=1e-6)


def test_a_locked_tower_has_no_norm() -> None:
    model, _ = model_with_gradients(frozen=["image_tower"])
    assert set(meters.tower_norms(model)) == {"text_tower"}


def test_measuring_leaves_the_graph_alone() -> None:
    model, pairs = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    figures = meters.inside_step(recipe(steps=9, every=1, geometry_every=1), 1, model, pairs)
    assert not any(value.requires_grad for value in figures.values())
    assert all(p.grad.equal(old) for p, old in zip(model.parameters(), before, strict=True) if p.grad is not None)


def features(rows: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)) + 0.2, dim=1)


def _geometry_of_half(rank: int, most: int) -> dict[str, float]:
    meters._GEOMETRY_PAIRS = most
    image, text = (features(12, seed)[rank * 6 :][:6] for seed in (1, 2))
    return {name: value.item() for name, value in meters.batch_geometry(Pairs(image, text, torch.ones(()))).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("most", "rows"), [(4096, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), (8, [0, 1, 2, 3, 6, 7, 8, 9])]
)
def test_the_batch_of_two_ranks_is_measured_whole_up_to_a_bound(most: int, rows: list[int]) -> None:
    image, text = features(12, 1)[rows], features(12, 2)[rows]
    first, second = run_ranks(_geometry_of_half, 2, most)
    assert (
        first
        == second
        == pytest.approx(
            {
                "alignment": geometry.alignment(image, text).item(),
                "modality_gap": geometry.modality_gap(image, text).item(),
                "uniformity_image": geometry.uniformity(image).item(),
                "uniformity_text": geometry.uniformity(text).item(),
                "effective_rank_image": geometry.effective_rank(image).item(),
                "effective_rank_text": geometry.effective_rank(text).item(),
            },
            rel=1e-5,
        )
    )


def test_pauses_count_neither_as_time_nor_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 10.0, 30.0, 32.0, 32.0])  # start, wait from 1 to 3, pause from 10 to 30, read
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(times))
    throughput = meters.Throughput()
    with throughput.waiting():
        pass
    with throughput.pausing():
        pass
    throughput.count(24)
    assert throughput.read() == {"train/samples_per_second": 2.0, "data/wait_share": 2 / 12}
