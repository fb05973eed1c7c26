"""The benchmark of captions measures what it says, on sizes that take no time."""

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.bench.caption import Plan, as_json, measure_all, table
from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models.dual_encoder import ModelConfig
from diptych.models.towers.open_clip import OpenClipTowers
from diptych.testing import TINY_CAPTIONER, TINY_MODEL


def tiny(folder: Path, tree: dict[str, Any]) -> str:
    """A model file as open_clip has them."""
    towers = from_tree(ModelConfig, tree).towers
    assert isinstance(towers, OpenClipTowers)
    config = towers.resolved()
    (folder / "tiny.json").write_text(json.dumps(config))
    return str(folder / "tiny.json")


def test_both_heads_find_the_same_loss_and_one_needs_less(tmp_path: Path) -> None:
    plan = Plan("cpu", batch=64, length=16, width=16, model=tiny(tmp_path, TINY_CAPTIONER), step_batch=2, rounds=1)
    report = measure_all(plan, progress=lambda text: None)
    assert report.rows["ours"].loss == pytest.approx(report.rows["dense"].loss, abs=1e-4)
    assert report.rows["dense"].extra_bytes > 64 * 16 * 49408 * 4
    assert report.memory_share < 0.5  # a tile, and the gradient that both make
    captioner, parts = report.rows["captioner"], [report.rows[name] for name in ("contrastive", "decoder")]
    assert captioner.loss == pytest.approx(sum(part.loss for part in parts), abs=1e-3)
    assert "| captioner / (contrastive + decoder) |" in table(report)
    assert as_json(report)["step_share"] == report.step_share


def test_what_is_no_captioner_is_said(tmp_path: Path) -> None:
    plan = Plan("cpu", batch=1, length=4, width=4, vocab=10, model=tiny(tmp_path, TINY_MODEL), rounds=1)
    with pytest.raises(ConfigError, match="no captioner"):
        measure_all(plan, progress=lambda text: None)
