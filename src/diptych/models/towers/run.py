"""The towers of a run, to go on from."""

from dataclasses import dataclass
from pathlib import Path

from diptych.models.towers.family import BuiltTowers, Captioner, Towers
from diptych.runfolder import RunFolder


@dataclass(frozen=True)
class RunTowers(Towers, name="run"):
    """Both towers of a run that this toolkit trained, with its weights; adapters of that run are merged."""

    run: Path
    """Its folder: the newest intact checkpoint, averaged weights where it kept them."""

    def build(self) -> BuiltTowers:
        """See Towers. Raises CheckpointError where there is no such run."""
        from diptych.models.merge import merged
        from diptych.models.run import open_run

        model = merged(open_run(RunFolder(self.run)))
        captioner = None
        if model.text_decoder is not None and model.spelling is not None:
            captioner = Captioner(
                model.text_decoder, model.spelling, model.match_width, model.match_head, model.targets
            )
        return BuiltTowers(
            image_tower=model.image_tower,
            text_tower=model.text_tower,
            tokenizer=model.tokenizer,
            embed_dim=model.embed_dim,
            pixels=model.pixels,
            logit_scale=float(model.logit_scale.detach()),
            logit_bias=float(model.logit_bias.detach()) if model.logit_bias is not None else None,
            open_clip_config=model.open_clip_config,
            captioner=captioner,
        )

    def reference(self) -> str | None:
        """See Towers."""
        return str(self.run)
