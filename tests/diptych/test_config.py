from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from diptych.config import Choice, Config, describe, dump, from_tree, load
from diptych.errors import ConfigError


@dataclass(frozen=True)
class Shape(Choice):
    pass


@dataclass(frozen=True)
class Round(Shape, name="round"):
    radius: float = 1.0
    """Metres."""


@dataclass(frozen=True)
class Square(Shape, name="square"):
    side: float = 2.0


@dataclass(frozen=True)
class Fast(Config):
    type: Literal["fast"] = "fast"
    speed: int = 3


@dataclass(frozen=True)
class Slow(Config):
    type: Literal["slow"] = "slow"
    patience: int = 9


@dataclass(frozen=True)
class Inner(Config):
    peak_lr: float = 1e-3
    """Learning rate after
    warm-up."""
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ValueError("peak_lr must be positive")


@dataclass(frozen=True)
class Root(Config):
    name: str
    """What it is called."""
    inner: Inner = field(default_factory=Inner)
    """The inner part."""
    shape: Shape = field(default_factory=Round)
    shapes: tuple[Shape, ...] = ()
    pace: Fast | Slow = field(default_factory=Fast)
    flag: bool = False
    where: Path = Path("here")
    sizes: tuple[int, ...] = (1, 2)
    table: dict[str, float] = field(default_factory=dict)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_yaml_overrides_and_defaults_make_one_frozen_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: x\ninner: {peak_lr: 3e-4}\nshape: square\npace: {type: slow}\n")
    root = load(Root, path, ["inner.steps=5", "shapes=[round, {type: square, side: 4}]", "where=/tmp/there"])
    assert root.inner == Inner(peak_lr=3e-4, steps=5)
    assert root.shape == Square()
    assert root.shapes == (Round(), Square(side=4))
    assert root.pace == Slow()
    assert root.where == Path("/tmp/there")
    assert root.sizes == (1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.peek_lr=1", "unknown key 'inner.peek_lr'; did you mean 'peak_lr'?"),
        ("nmae=x", "unknown key 'nmae'; did you mean 'name'?"),
        ("inner.peak_lr=fast", "inner.peak_lr: 'fast' is not number"),
        ("inner.steps=true", "inner.steps: true is not integer | null"),
        ("inner.steps=2.5", "inner.steps: 2.5 is not integer | null"),
        ("inner=3", "inner: expected a section of keys, got 3"),
        ("shape.type=sqare", "shape: unknown type 'sqare'; did you mean 'square'?"),
        ("pace.type=medium", "pace: unknown type 'medium'"),
        ("inner.peak_lr=-1", "inner: peak_lr must be positive"),
        ("flag", "override 'flag' is not of the form section.key=value"),
        ("shapes.7.side=1", "shapes.7 is no position in a list of 0"),
        ("name.first=x", "name: {'type': 'x', 'first': 'x'} is not text"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    overrides = ["name=x", "shapes=[]", override] if override.startswith("shapes") else ["name=x", override]
    with pytest.raises(ConfigError) as caught:
        load(Root, None, overrides)
    assert message in str(caught.value)


def test_all_wrong_keys_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        from_tree(Root, {"inner": {"peek_lr": 1, "steps": "x"}, "colour": "red"})
    message = str(caught.value)
    assert all(part in message for part in ("peek_lr", "inner.steps", "colour", "missing key 'name'"))
    assert "\n" not in message


def test_extends_merges_maps_and_a_new_type_drops_the_old_keys(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "name: base\ninner: {steps: 3}\nshape: {type: round, radius: 7}\nsizes: [4, 5, 6]\n")
    path = write(
        tmp_path / "child.yaml", "extends: base.yaml\ninner: {peak_lr: 2}\nshape: {type: square}\nsizes: [9]\n"
    )
    root = load(Root, path)
    assert (root.name, root.inner, root.shape, root.sizes) == ("base", Inner(2.0, 3), Square(), (9,))


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load(Root, tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1", "!!python/object/apply:os.system [ls]"])
def test_a_file_that_is_no_plain_map_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(Root, write(tmp_path / "bad.yaml", text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load(Root, tmp_path / "none.yaml")


def test_a_dump_reloads_to_an_equal_value() -> None:
    root = Root("x", Inner(0.1, 2), Square(3), (Round(), Square(1)), Slow(patience=1), flag=True, table={"a": 1.5})
    assert from_tree(Root, yaml.safe_load(dump(root))) == root


def test_every_key_is_documented_with_type_and_default() -> None:
    entries = {entry.key: entry for entry in describe(Root)}
    assert entries["inner.peak_lr"].doc == "Learning rate after warm-up."
    assert entries["inner.peak_lr"].default == "0.001"
    assert entries["name"].default == "(required)"
    assert entries["shape.<round>.radius"].doc == "Metres."
    assert entries["shape.<square>.side"].type == "number"
    assert "shapes.0.<square>.side" not in entries
    assert "Keys as under `shape`." in entries["shapes"].doc
    assert entries["pace.<slow>.patience"].default == "9"


def test_two_members_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names both"):

        class Other(Shape, name="round"):
            pass
