"""diptych: pretrain, fine-tune and evaluate CLIP-style vision-language models."""

from diptych import compat
from diptych.version import __version__

__all__ = ["__version__"]

compat.install()  # `import torchvision`, which open_clip and timm do, fails beside a CPU torch without it
