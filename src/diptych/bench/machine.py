"""What a benchmark's header says of the machine."""

import platform
from pathlib import Path


def memory(name: str) -> int:
    """Bytes of this process by their name in /proc/self/status: `VmRSS`, what is resident; `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def processor() -> str:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
