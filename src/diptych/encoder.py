"""Any model as one object with `encode_image` and `encode_text`: `diptych.load(NAME)`.

    runs/first                    a run: its newest intact checkpoint, averaged weights where it kept them
    open_clip:ViT-B-32:openai     a model of open_clip: random weights, a tag of public ones, or a file of weights
    open_clip:FOLDER              a folder in open_clip's form
    hf:google/siglip-base-patch16-224, hf:FOLDER      a dual encoder of transformers
    FOLDER with adapter_config.json    LoRA in PEFT's layout, merged into the base that it names

A folder without a word before it is known by what lies in it. Each form is one function here that gives a
`DualEncoder`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from diptych.data.images import EvaluationView, plain
from diptych.data.tokens import trim
from diptych.errors import CheckpointError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.peft_folder import AdapterFolder
from diptych.models.run import open_run
from diptych.runfolder import RunFolder

# On a CPU short batches of captions of like length cost less padding; a GPU wants work.
_TEXT_BATCH = {"cpu": 64, "cuda": 512}
_IMAGE_BATCH = 256
_CLASS_NUMBERS = 1 << 26
"""Of features [B, C, D] of classes that depend on pictures, at once."""


class ModelEncoder:
    """A dual encoder ready to measure: evaluation mode, no gradients, float32 features on the CPU."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model.eval()
        self.image_size = model.image_size
        pixels = model.pixels
        self.view = EvaluationView(pixels.size, pixels.squash, pixels.before_crop, pixels.interpolation)
        """From a picture to what the model sees."""
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.fingerprint = _fingerprint(model)
        self._device = model.logit_scale.device

    @torch.no_grad()  # under inference_mode autocast would cast all weights anew for every batch
    def encode_image(self, images: UInt8[Tensor, "B 3 height width"] | Sequence[Image.Image]) -> Float[Tensor, "B D"]:
        """Unit-norm features of uint8 pixels of the model's size, or of pictures of any size, which are brought to it
        as in every evaluation (`view`)."""
        if isinstance(images, Tensor):
            return self.model.encode_image(images.to(self._device)).cpu()
        parts = [
            self.encode_image(torch.stack([self.view(plain(image)) for image in batch]))
            for batch in (images[first : first + _IMAGE_BATCH] for first in range(0, len(images), _IMAGE_BATCH))
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.embed_dim)

    @torch.no_grad()  # under inference_mode autocast would cast all weights anew for every batch
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm features of captions; batches hold captions of similar length, so that little is padding."""
        if not texts:
            return torch.empty(0, self.model.embed_dim)
        tokens = self.model.tokenizer(list(texts))
        order = torch.argsort((tokens != 0).sum(1))
        batches = tokens[order].split(_TEXT_BATCH.get(self._device.type, _TEXT_BATCH["cuda"]))
        parts = [self.model.encode_text(trim(rows).to(self._device)).cpu() for rows in batches]
        features = torch.cat(parts)
        return torch.empty_like(features).index_copy_(0, order, features)

    @torch.no_grad()  # see above
    def match(
        self,
        images: UInt8[Tensor, "B 3 height width"],
        texts: Sequence[str],
        rows: Int[Tensor, " P"],
        places: Int[Tensor, " P"],
    ) -> Float[Tensor, " P"]:
        """Logits of the matching head, of pairs of a row of pictures and a place among texts. Call it only of a model
        that has one (`model.match_head`)."""
        image_tokens = self.model.see(images.to(self._device))[1]
        assert image_tokens is not None, "a matching head stands on a captioner"
        order = places.argsort(stable=True)  # a text is read once for all of its pairs
        found = []
        for pairs in order.split(_TEXT_BATCH.get(self._device.type, _TEXT_BATCH["cuda"])):
            some, which = places[pairs].unique(return_inverse=True)
            tokens = trim(self.model.tokenizer([texts[place] for place in some.tolist()])).to(self._device)
            _, words = self.model.read(tokens)
            assert words is not None, "as of the pictures"
            which, at = which.to(self._device), rows[pairs].to(self._device)
            found.append(self.model.match(image_tokens[at], words[which], tokens[which]).cpu())
        return torch.empty(len(rows)).index_copy_(0, order, torch.cat(found)) if found else torch.empty(0)

    @torch.no_grad()  # see above
    def read_classes(
        self, image_features: Float[Tensor, "N D"], names: Sequence[str]
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "C K"]] | None:
        """Pictures and classes, to be compared by their products, by the model's own prompts of classes; None: it has
        none, and templates are what there is. K is D, or D for each prompt of a mixture, or C where the prompts depend
        on the picture: the rows of the first are then its scores, the second picks them out.

        Raises:
            ConfigError: the prompts read no other classes than those they learned from.
        """
        if self.model.class_prompts is None:
            return None
        if not self.model.class_prompts.conditional:
            found = self.model.read_classes(image_features.to(self._device), names)
            return found.image_features.cpu(), found.features.detach().cpu()  # they may be weights themselves
        size = max(_CLASS_NUMBERS // (len(names) * self.model.embed_dim), 1)
        parts = [self.model.read_classes(rows.to(self._device), names) for rows in image_features.split(size)]
        one = torch.ones((), device=self._device)
        return torch.cat([part.logits(one).cpu() for part in parts]), torch.eye(len(names))


def _fingerprint(model: DualEncoder) -> str:
    """A hash of all weights and of the architecture."""
    digest = hashlib.sha256(json.dumps(model.open_clip_config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load(name: str, *, device: str | None = None) -> ModelEncoder:
    """The model that `name` means, see above.

    Args:
        device: where it computes, such as `cpu` or `cuda:1`; none: on a GPU where there is one.

    Raises:
        CheckpointError: there is no model of that name, or its weights cannot be used.
        ConfigError: there is one, and it is no dual encoder that can be built here.
    """
    return ModelEncoder(_open(name).to(device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _open(name: str) -> DualEncoder:
    """By the word before the first colon, or by what lies in the folder."""
    kind, colon, rest = name.partition(":")
    if colon and kind in _KINDS:
        return _KINDS[kind](rest)
    for file, opener in _MARKS.items():
        if (Path(name) / file).is_file():
            return opener(name)
    raise CheckpointError(
        f"neither a run folder, a folder with a model, open_clip:NAME[:TAG] nor hf:NAME · {name} · check the path"
    )


def _load_open_clip(name: str) -> DualEncoder:
    """`NAME`, `NAME:TAG`, `NAME:FILE`, or a folder with open_clip_config.json and open_clip_model.safetensors."""
    from diptych.models.towers.open_clip import OpenClipTowers

    _refuse_missing_folder(name)
    architecture, _, tag = (name, "", "") if Path(name).is_dir() else name.partition(":")
    return dual_encoder.build(ModelConfig(towers=OpenClipTowers(architecture, weights=tag or None)), seed=0)


def _load_hf(name: str) -> DualEncoder:
    from diptych.models.towers.hf import HfTowers

    _refuse_missing_folder(name)
    return dual_encoder.build(ModelConfig(towers=HfTowers(name)), seed=0)


def _refuse_missing_folder(name: str) -> None:
    """Before a library looks for it on a hub."""
    if name.startswith(("/", "./", "../")) and not Path(name.partition(":")[0]).exists():
        raise CheckpointError(f"no such folder · {name} · check the path")


def _load_adapter(name: str) -> DualEncoder:
    """LoRA in PEFT's layout, in the weights of the base that it names."""
    folder = AdapterFolder(Path(name))
    return folder.apply(_open(folder.base))


_KINDS: dict[str, Callable[[str], DualEncoder]] = {"open_clip": _load_open_clip, "hf": _load_hf}
_MARKS: dict[str, Callable[[str], DualEncoder]] = {
    "config.yaml": lambda name: open_run(RunFolder(Path(name))),
    "open_clip_config.json": _load_open_clip,
    "adapter_config.json": _load_adapter,
    "config.json": _load_hf,
}
"""The file that tells what a folder is."""
