import json
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.cli import main
from diptych.data.sources import DataConfig
from diptych.train.recipe import Recipe


def test_help_answers_without_torch() -> None:
    code = "import sys\nfrom diptych.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'numpy', 'PIL', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"


def test_train_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in (
        "optim.peak_lr",
        "data.images.augment.hue",
        "model.towers.<open_clip>.embed_dim",
        "data.captions.views",
    ):
        assert key in text


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {shards: nowhere}\noptim: {peek_lr: 1}\n")
    assert main(["train", str(config)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("diptych: error:")
    assert "did you mean 'peak_lr'?" in error
    assert "\n" not in error


def test_settings_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {shards: nowhere}\n")
    assert main(["train", str(config), "seed=1", "--quiet", "optim.peek_lr=1"]) == 2
    assert "peek_lr" in capsys.readouterr().err
    for wrong in (["--queit"], ["seed=1", "--quiet", "seed"]):
        with pytest.raises(SystemExit) as stop:
            main(["train", str(config), *wrong])
        assert stop.value.code == 2
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_json_output_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "emoji", str(tmp_path / "pictures"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "pictures")}
    assert main(["data", "emoji", str(tmp_path / "pictures")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_every_field_of_a_recipe_has_a_docstring() -> None:
    from diptych.config import describe
    from diptych_data.pack import PackOptions
    from diptych_eval.suite import EvalConfig

    for config in (Recipe, DataConfig, PackOptions, EvalConfig):
        assert [entry.key for entry in describe(config) if not entry.doc] == []
