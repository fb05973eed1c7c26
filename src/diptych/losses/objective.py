"""Weighted terms → one number to descend and the named scalars to watch."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.config import Config, discover
from diptych.distributed.groups import Groups, make_groups
from diptych.losses.batch import Moment, Pairs
from diptych.losses.contrastive import ContrastiveLoss
from diptych.losses.plugs.family import Regulariser
from diptych.losses.plugs.regulariser.caption import Caption
from diptych.losses.plugs.regulariser.matching import Matching
from diptych.losses.settings import ContrastiveConfig
from diptych.losses.table import SampleTable
from diptych.seeding import derive
from diptych.vocabulary import TokenLoss

discover("diptych.losses.plugs.regulariser")


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    """What is minimised."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Pulls pairs together and everything else in the batch apart."""
    regularisers: tuple[Regulariser, ...] = ()
    """Terms beside it."""

    def __post_init__(self) -> None:
        names = [term.choice_name for term in self.regularisers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"regularisers: {twice[0]} stands there twice; give one of them the sum of both weights")

    @property
    def wants_hard_captions(self) -> bool:
        """Whether a term uses the batch's hard captions."""
        names = {plug.choice_name for plug in (*self.contrastive.candidates, *self.regularisers)}
        return bool(names & {"hard_captions", "own_hard_captions", "image_grounded", "text_grounded"})

    @property
    def wants_positive_captions(self) -> bool:
        """Whether the contrastive term uses the batch's further right captions."""
        return "positive_captions" in {plug.choice_name for plug in self.contrastive.candidates}

    @property
    def wants_matching(self) -> bool:
        """Whether a term asks the model's matching head about wrong pairs."""
        return any(isinstance(term, Matching) for term in self.regularisers)

    @property
    def caption(self) -> TokenLoss | None:
        """How the model makes the losses of its captions; None: no term uses them."""
        return next((term.form for term in self.regularisers if isinstance(term, Caption)), None)

    @property
    def wants_second_captions(self) -> bool:
        """Whether a term uses a second caption of each picture."""
        return any(isinstance(term, Caption) and term.view == "second" for term in self.regularisers)


@dataclass(frozen=True)
class Terms:
    """The value of an objective: on every rank the loss of its own rows, whose mean over ranks is the batch's."""

    total: Float[Tensor, ""]
    scalars: dict[str, Float[Tensor, ""]]


class Objective(nn.Module):
    """All terms, with the state and the parameters of their plugs."""

    def __init__(self, config: ObjectiveConfig, *, embed_dim: int) -> None:
        """Every rank must call: process groups are made here."""
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.contrastive = ContrastiveLoss(config.contrastive, embed_dim=embed_dim)
        self.groups: Groups = make_groups(config.contrastive.gather)
        built: dict[str, Any] = {term.choice_name: term.build(embed_dim) for term in config.regularisers}
        # Held in a dict besides, as in ContrastiveLoss.
        self.modules_of_terms = nn.ModuleDict({n: term for n, term in built.items() if isinstance(term, nn.Module)})
        self._terms_by_name = built

    @property
    def needs(self) -> tuple[str, ...]:
        """What the batch must know beside features."""
        names = (*self.contrastive.needs, *(name for term in self.config.regularisers for name in term.needs))
        return tuple(dict.fromkeys(names))

    @property
    def teacher_widths(self) -> dict[str, int]:
        """Plug → width that the teacher's features must have for it; of those to which it matters."""
        contrastive = self.config.contrastive
        plugs: tuple[Any, ...] = (contrastive.targets, *contrastive.candidates, *self.config.regularisers)
        asked = {plug.choice_name: plug.teacher_width(self.embed_dim) for plug in plugs}
        return {name: width for name, width in asked.items() if width is not None}

    def forward(self, pairs: Pairs, moment: Moment = Moment()) -> Terms:  # noqa: B008 - immutable
        """All terms. Every rank must call; `after_step` follows once per batch."""
        with torch.autocast(pairs.image_features.device.type, enabled=False):
            return self._terms(pairs, moment)

    def _terms(self, pairs: Pairs, moment: Moment) -> Terms:
        group = self.groups.at(moment.step)
        contrastive = self.contrastive(pairs, group, moment)
        total = self.config.contrastive.weight * contrastive + _unused(pairs)
        scalars = {"contrastive": contrastive.detach()}
        for term in self.config.regularisers:
            value = self._terms_by_name[term.choice_name](pairs, group)
            total = total + term.weight * value
            scalars[term.choice_name] = value.detach()
        return Terms(total, scalars | {"total": total.detach()})

    @property
    def remembers(self) -> bool:
        """Whether `after_step` does anything: queues and tables keep something of each batch."""
        return any(True for _ in self.buffers())

    def after_step(self, pairs: Pairs) -> None:
        """Lets queues take note of a batch whose loss has been computed. Every rank must call."""
        self.contrastive.after_step(pairs)

    def whole_state(self) -> dict[str, Tensor]:
        """State and parameters by name, tables of samples put together from all ranks. Every rank must call."""
        state: dict[str, Tensor] = self.state_dict()
        for name, table in self._tables():
            state[f"{name}.values"] = table.whole()
        return state

    def take_state(self, whole: dict[str, Tensor]) -> None:
        """The reverse of `whole_state`, on any number of ranks."""
        state: dict[str, Any] = dict(whole)
        for name, table in self._tables():
            table.take(state.pop(f"{name}.values"))
            state[f"{name}.values"] = table.values
        self.load_state_dict(state)

    def _tables(self) -> list[tuple[str, SampleTable]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, SampleTable)]


def _unused(pairs: Pairs) -> Float[Tensor, ""]:
    """A zero that scale and bias take part in: data-parallel wrappers wait for a gradient of every parameter, and some
    temperatures and denominators give these none."""
    return 0 * (pairs.logit_scale + pairs.bias)


def build(config: ObjectiveConfig, *, embed_dim: int, seed: int) -> Objective:
    """The objective with parameters drawn from `seed` alone. Every rank must call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "objective"))
        return Objective(config, embed_dim=embed_dim)
