"""The set-up's decisions; that it works as a whole shows wherever these tests run."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cuda_packages_are_seen(install: ModuleType) -> None:
    assert install.wants_cuda(["torch", "nvidia-cublas-cu12", "triton"])
    assert not install.wants_cuda(["torch", "sympy", "networkx"])


@pytest.mark.parametrize(
    ("gpu", "planned", "through_uv"),
    [(False, ["torch", "nvidia-nccl"], True), (False, ["torch"], False), (True, ["torch", "nvidia-nccl"], False)],
)
def test_the_cpu_build_is_fetched_only_where_it_is_needed(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: bool, planned: list[str], through_uv: bool
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(install, "has_gpu", lambda: gpu)
    monkeypatch.setattr(install, "planned", lambda _: planned)
    monkeypatch.setattr(install, "run", commands.append)
    monkeypatch.setattr(install, "arm_repair", lambda _: None)
    install.main()
    assert any("--torch-backend" in command for command in commands) == through_uv
    assert "-c" in commands[-1]


def test_every_requirement_is_pinned_within_its_range(install: ModuleType) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(line.split("==") for line in install.CONSTRAINTS.read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for text in [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *project["dependency-groups"]["kernels"],
    ]:
        requirement = Requirement(text)
        version = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), text
        assert "==" not in text, "ranges here, versions in constraints.txt"


@pytest.mark.parametrize("broken", [True, False])
def test_python_arms_the_repair_only_where_torchvision_is_broken(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool
) -> None:
    (tmp_path / "diptych_compat.pth").write_text("stale")
    result = subprocess.CompletedProcess([], returncode=int(broken))
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: result)
    install.arm_repair(tmp_path)
    assert (tmp_path / "diptych_compat.pth").exists() == broken


def test_commands_of_other_packages_start_here() -> None:
    accelerate = Path(sys.executable).with_name("accelerate")
    done = subprocess.run([accelerate, "launch", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
