from collections.abc import Callable
from pathlib import Path

import yaml

from diptych.export import card
from diptych.models.dual_encoder import DualEncoder

LIBRARY = card.Library("transformers", "transformers", "model = open('FOLDER')", ("mind the gap",))


def test_it_says_what_is_known(make: Callable[..., DualEncoder], tmp_path: Path) -> None:
    model = make(bias=-10.0)
    origin = card.Origin(
        name="somewhere/runs/first",
        architecture="towers:\n  type: open_clip\n",
        data="shards: shards/train\n",
        samples_seen=12345,
        measured=(card.Measured("zeroshot", "openmoji|seen", "top1", 0.25),),
    )
    card.write(tmp_path, model, LIBRARY, origin)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "license" not in yaml.safe_load(front)
    assert "# license" in front
    for line in ("# first", "- mind the gap", "12,345 samples seen", "shards: shards/train", "type: open_clip"):
        assert line in body
    assert "| zeroshot | openmoji\\|seen | top1 | 0.2500 |" in body
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters, all | {parameters:,} |" in body
    assert "| logit bias | -10 |" in body


def test_it_says_what_is_not_known(make: Callable[..., DualEncoder]) -> None:
    text = card.text(make(), LIBRARY, card.UNKNOWN)
    assert "# A dual encoder" in text
    assert "Not recorded." in text
    assert "Not measured." in text
    assert "patch_size: 8" in text  # what the model itself knows
