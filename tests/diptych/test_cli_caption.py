import json
from pathlib import Path

import pytest
from PIL import Image

from diptych.cli import main
from diptych.config import from_tree
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.testing import TINY_CAPTIONER, TINY_MODEL


@pytest.fixture
def captioner(tmp_path: Path) -> str:
    export(dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER), seed=0), tmp_path / "captioner")
    return str(tmp_path / "captioner")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "red.png", tmp_path / "blue.jpg"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (30, 20), colour).save(path)
    return [str(path) for path in paths]


def test_a_line_for_each_picture(captioner: str, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", captioner, *pictures, "--method", "beam", "--beams", "2", "--max-length", "4"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == pictures
    assert main(["caption", captioner, *pictures, "--beams", "2", "--max-length", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["captions"]
    assert [entry["picture"] for entry in found] == pictures
    assert [" ".join(entry["caption"].split()) for entry in found] == [" ".join(line[1].split()) for line in lines]


def test_bad_input_is_one_line(
    tmp_path: Path, captioner: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    export(dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0), tmp_path / "plain")
    for arguments, words in (
        ([captioner, str(tmp_path / "none.png")], "check the path"),
        ([captioner, str(tmp_path / "text.png")], "not a usable picture"),
        ([captioner, *pictures, "--top-p", "2"], "top_p must lie in"),
        ([str(tmp_path / "plain"), *pictures], "writes no captions"),
    ):
        assert main(["caption", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert "\n" not in error
