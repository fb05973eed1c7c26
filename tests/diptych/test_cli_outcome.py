import subprocess
import sys
from pathlib import Path

from diptych.cli.outcome import table


def test_tables_align_numbers_and_obey_nobody() -> None:
    shown = table("keys", ["key", "times"], [("[bold]x[/bold]", 1200), ("evil\x1b[31m\x07", 3), ("half", 0.25)])
    assert shown.splitlines() == [
        "keys",
        "key             times",
        "[bold]x[/bold]  1,200",
        "evil�[31m�          3",
        "half             0.25",
    ]


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diptych", "data", "emoji", str(tmp_path / "pictures")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
