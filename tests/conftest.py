import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import diptych.testing as make

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes what the golden tests would compare; review the difference before committing it."""
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a file of the repository, or writes the file when asked to."""

    def check(name: str, text: str) -> None:
        path = ROOT / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{name} is missing; pytest --update-golden writes it"
        assert text == path.read_text(encoding="utf-8"), f"{name} is stale; pytest --update-golden writes it"

    return check


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six shards, 40 samples, one shard empty."""
    return make.write_shards(tmp_path / "shards", [10, 7, 0, 13, 4, 6])


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """The command line sets handlers; no test inherits another's."""
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in ("diptych", "diptych_eval", "diptych_data")]
    handlers, levels = root.handlers[:], [logger.level for logger in (root, *ours)]
    yield
    root.handlers[:] = handlers
    for logger, level in zip((root, *ours), levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def launch() -> Callable[..., None]:
    """`accelerate launch` of a recipe, as the documents print it: two processes where nothing else is said."""

    def run(recipe: Path, configuration: str = "cpu", *options: str) -> None:
        accelerate = ROOT / "configs" / "accelerate" / f"{configuration}.yaml"
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(accelerate)]
        command += [*options, "-m", "diptych.train", str(recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=200, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        way = {"cpu": "ddp", "cpu_fsdp2": "fsdp2", "cpu_zero": "zero"}[configuration]
        ranks = options[options.index("--num_processes") + 1] if "--num_processes" in options else "2"
        assert f"ranks={ranks} way={way}" in done.stderr  # or one process would have been compared with itself

    return run
