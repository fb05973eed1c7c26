"""Installs the project, editable, into the environment that runs this script; `make` calls it.

The exact versions come from constraints.txt. On a machine without an NVIDIA GPU the CUDA packages of torch are
gigabytes that nobody needs: where plain pip would bring them, torch's CPU build is fetched through uv, which knows
where it lies.

torchvision exists as a CUDA build only; `import diptych` repairs what it lacks beside a CPU build of torch. Commands of
other packages that import torchvision (`accelerate launch` does) never import diptych first: where torchvision is
broken in this very environment, a .pth file lets Python do so at its start.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARM = 'import importlib.util; importlib.util.find_spec("diptych") and __import__("diptych")\n'
CONSTRAINTS = ROOT / "constraints.txt"


def main(group_name: str | None = None) -> int:
    """Torch first, in the right build, then everything else, then the repair where it is needed.

    With the name of a dependency group: that group alone, into what is installed already.
    """
    if group_name is not None:
        pip("-c", str(CONSTRAINTS), *group(group_name))
        return 0
    torch = pinned("torch")
    if not has_gpu() and wants_cuda(planned(torch)):
        pip("uv")
        run([sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu", torch])
    pip("-c", str(CONSTRAINTS), "-e", str(ROOT), *group("dev"))
    arm_repair(Path(sysconfig.get_path("purelib")))
    return 0


def pinned(package: str) -> str:
    """The requirement of `package` in the constraints file."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.partition("==")[0] == package:
            return line
    raise SystemExit(f"install: {package} is not pinned · {CONSTRAINTS} · add a line {package}==VERSION")


def has_gpu() -> bool:
    """Whether an NVIDIA driver is at hand."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def planned(requirement: str) -> list[str]:
    """Names of what pip would install for a requirement."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", requirement]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [item["metadata"]["name"] for item in report["install"]]


def wants_cuda(packages: list[str]) -> bool:
    """Whether CUDA's libraries are among the packages."""
    return any(name.lower().startswith(("nvidia-", "cuda-", "triton")) for name in packages)


def arm_repair(site_packages: Path) -> None:
    """Writes the .pth file where torchvision cannot be imported by itself, and removes it where it can."""
    file = site_packages / "diptych_compat.pth"
    file.unlink(missing_ok=True)
    if subprocess.run([sys.executable, "-c", "import torchvision"], check=False, capture_output=True).returncode:
        file.write_text(ARM, encoding="utf-8")


def group(name: str) -> list[str]:
    """The requirements of a dependency group."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"][name])


def pip(*arguments: str) -> None:
    """Runs pip of this environment."""
    run([sys.executable, "-m", "pip", "install", "--quiet", *arguments])


def run(command: list[str]) -> None:
    """Runs a command; its failure is ours."""
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"install: failed: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
