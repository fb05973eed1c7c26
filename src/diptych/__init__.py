"""diptych: pretrain, fine-tune and evaluate CLIP-style vision-language models."""

from typing import TYPE_CHECKING, Any

from diptych import compat
from diptych.version import __version__

if TYPE_CHECKING:
    from diptych.encoder import load

__all__ = ["__version__", "load"]

compat.install()  # `import torchvision`, which open_clip and timm do, fails beside a CPU torch without it


def __getattr__(name: str) -> Any:
    """`load`, when it is asked for: torch comes with it."""
    if name == "load":
        from diptych.encoder import load

        return load
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")
