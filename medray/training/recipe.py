"""A recipe: the YAML file that names everything about one training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from medray.geometry import Windows
from medray.models.config import Architecture
from medray.storage.yaml_config import read_settings
from medray.training.recipe_files import find_recipe


@dataclass(frozen=True)
class Data:
    """Which pixels a training sees, and how often.

    Attributes:
        crop: Side of a training crop in pixels, a multiple of 32; or several sides that
            the epochs go through in equal parts (progressive resolution).
        min_tissue: Patches with less tissue (0 to 1) are left out.
        samples: Crops an epoch; None: one a patch.
        balance: Draw each class equally often: first the class, then a patch by how
            much it holds of it, then a crop around one of its pixels.
        hard: Share of the draws (0 to 1) that go to patches by their last loss.
    """

    crop: int | tuple[int, ...] = 256
    min_tissue: float = 0.05
    samples: int | None = None
    balance: bool = False
    hard: float = 0.0

    def __post_init__(self) -> None:
        """Check that crops fit through the encoder, and the shares."""
        if not self.crops:
            raise ValueError("data.crop: expected one side or more, found none")
        for side in self.crops:
            if not 32 <= side <= 2048 or side % 32:
                raise ValueError(
                    f"data.crop: expected multiples of 32 up to 2048, found {self.crop}"
                )
        if not 0 <= self.hard <= 1 or (self.hard and self.balance):
            raise ValueError(
                "data.hard: expected a share from 0 to 1, and not with data.balance"
            )

    @property
    def crops(self) -> tuple[int, ...]:
        """The sides that the epochs go through."""
        return (self.crop,) if isinstance(self.crop, int) else self.crop


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses; a weight of 0 leaves one out.

    Attributes:
        dice: Weight of the soft Dice loss (Milletari et al. 2016).
        focal: Weight of the focal loss, gamma 2 (Lin et al. 2017).
        cross_entropy: Weight of the cross entropy.
        hardest: Share of the pixels, those of the greatest loss, that focal loss and
            cross entropy count (online hard-example mining); 1: all.
        l2: Weight of the sum of squares of the weights above the encoder.
    """

    dice: float = 1.0
    focal: float = 1.0
    cross_entropy: float = 0.0
    hardest: float = 1.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Check that something is left to minimise."""
        weights = (self.dice, self.focal, self.cross_entropy)
        if min(*weights, self.l2) < 0 or max(weights) == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not all 0, found {weights}"
            )
        if not 0 < self.hardest <= 1:
            raise ValueError(
                f"loss.hardest: expected a share above 0 and up to 1, "
                f"found {self.hardest}"
            )


@dataclass(frozen=True)
class Optimizer:
    """How weights are changed.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), adam (Kingma and Ba 2015) or sgd
            (with Nesterov's momentum of 0.9).
        lr: Highest learning rate.
        weight_decay: Decoupled for adamw, else added to the gradient.
        clip: Largest norm of the gradient; 0: no clipping.
        average: Decay of the moving average of the weights that is validated and kept
            (0.999, say); 0: the weights themselves.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0
    average: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.lr <= 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError(
                f"optimizer: expected lr > 0, weight_decay >= 0 and clip >= 0, "
                f"found {self}"
            )
        if not 0 <= self.average < 1:
            raise ValueError(
                f"optimizer.average: expected 0 up to 1, found {self.average}"
            )


@dataclass(frozen=True)
class Phase:
    """Epochs in which a part of the network learns; the rest stays as it is.

    What rests keeps the running statistics of its batch normalisation, too.

    Attributes:
        epochs: How many; None, for the last phase: those that are left.
        train: head (what stands above the encoder); last (the head and the last
            `stages` stages of the encoder); adaptive (the head and those stages that
            matter most, see medray.training.finetuning); or all.
        stages: Of `last`: how many.
        share: Of `adaptive`: how many of the stages learn (0 to 1).
        lr: Factor of the learning rate.
    """

    epochs: int | None = None
    train: Literal["head", "last", "adaptive", "all"] = "all"
    stages: int = 0
    share: float = 0.0
    lr: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges, and that each key has its use."""
        if (self.epochs is not None and self.epochs < 1) or not self.lr > 0:
            raise ValueError(
                f"schedule.phases: expected epochs of 1 or more and lr above 0, found "
                f"{self.epochs} and {self.lr}"
            )
        if (self.stages >= 1) != (self.train == "last") or self.stages < 0:
            raise ValueError(
                f"schedule.phases: `train: last` goes with `stages` of 1 or more, the "
                f"others with none, found train {self.train} and stages {self.stages}"
            )
        if (0 < self.share < 1) != (self.train == "adaptive") or self.share < 0:
            raise ValueError(
                f"schedule.phases: `train: adaptive` goes with a `share` of the stages "
                f"above 0 and below 1, the others with none, found train {self.train} "
                f"and share {self.share}"
            )


@dataclass(frozen=True)
class Schedule:
    """How long, how the learning rate goes after a linear warm-up, and what is saved.

    Attributes:
        name: cosine (down to 0), staircase (times `decay` after every `every` epochs)
            or plateau (times `decay` when `every` epochs brought nothing better).
        epochs: Longest training.
        warmup: Share of the steps in which the learning rate rises.
        decay: Factor of staircase and plateau.
        every: Epochs between two drops of staircase and plateau.
        patience: Epochs without a better validation F1 before it stops early.
        save_minutes: Longest work that a crash can cost, beside an epoch.
        phases: What learns when, one after the other; none: all learn all the time.
            A plateau is waited for in each of them anew.
    """

    name: Literal["cosine", "staircase", "plateau"] = "cosine"
    epochs: int = 20
    warmup: float = 0.05
    decay: float = 0.95
    every: int = 1
    patience: int = 10
    save_minutes: float = 10.0
    phases: tuple[Phase, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.epochs, self.every, self.patience) < 1:
            raise ValueError(
                f"schedule: expected epochs, every and patience of 1 or more, "
                f"found {self.epochs}, {self.every} and {self.patience}"
            )
        if not (0 <= self.warmup < 1 and 0 < self.decay <= 1 and self.save_minutes > 0):
            raise ValueError(
                f"schedule: expected warmup in 0..1, decay above 0 up to 1 and "
                f"save_minutes above 0, found {self}"
            )
        if self.phases:
            self._check_phases()

    def _check_phases(self) -> None:
        *before, last = self.phases
        if any(phase.epochs is None for phase in before):
            raise ValueError(
                "schedule.phases: only the last phase may do without epochs; say how "
                "many the others take"
            )
        taken = sum(phase.epochs or 0 for phase in self.phases)
        covers = taken == self.epochs if last.epochs else taken < self.epochs
        if not covers:
            raise ValueError(
                f"schedule.phases: the phases take {taken} epochs"
                f"{'' if last.epochs else ' before the last one'}, schedule.epochs are "
                f"{self.epochs}; make them the same, or leave the epochs of the last "
                f"phase away, and it takes those that are left"
            )
        if self.phases[0].train == "adaptive":
            raise ValueError(
                "schedule.phases: the first cannot be adaptive, for a head that has "
                "learned nothing cannot tell which stages matter; put "
                "{epochs: 5, train: head} before it"
            )

    def phase_at(self, epoch: int) -> int:
        """Give the index of the phase that an epoch is in; 0 where there are none."""
        return max(0, sum(first <= epoch for first in self.first_epochs) - 1)

    @property
    def first_epochs(self) -> tuple[int, ...]:
        """The first epoch of each phase; one phase where there are none."""
        before = [phase.epochs or 0 for phase in self.phases[:-1]]
        return tuple(itertools.accumulate(before, initial=0))


@dataclass(frozen=True)
class Augment:
    """Random changes of a crop; what moves pixels moves those of the mask with them.

    Attributes:
        flips: Mirror, and turn by right angles.
        rotate: Largest turn in degrees.
        zoom: Largest relative change of size.
        shift: Largest shift, as a share of the side.
        shear: Largest shear in degrees.
        elastic: Displacement of an elastic deformation in pixels (Simard et al. 2003).
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest shift, in turns of the colour circle (0 to 0.5).
        stain: Largest relative change of haematoxylin, eosin and residual (Tellez et
            al. 2018).
        fill: What a crop that moves uncovers: white, as glass is, black, its border's
            pixels, or its reflection. White and black are class 0; of the others mask
            and image go on alike.
    """

    flips: bool = True
    rotate: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.15
    hue: float = 0.03
    stain: float = 0.0
    fill: Literal["white", "black", "border", "reflect"] = "white"

    def __post_init__(self) -> None:
        """Check the ranges."""
        shares = [self.zoom, self.shift, self.brightness, self.contrast]
        shares += [self.saturation, self.stain]
        if not all(0 <= value < 1 for value in shares) or not 0 <= self.hue <= 0.5:
            raise ValueError(
                f"augment: expected shares in 0..1 and hue in 0..0.5, found {self}"
            )
        if min(self.rotate, self.shear, self.elastic) < 0:
            raise ValueError(
                f"augment: expected rotate, shear and elastic of 0 or more, "
                f"found {self}"
            )


@dataclass(frozen=True)
class Teacher:
    """A trained model that a smaller one learns from (Hinton et al. 2015).

    Attributes:
        model: Its folder.
        soft: Weight of the divergence from its softened classes.
        temperature: That softens both.
        features: Weight of the distance from its encoder's last features (Romero et
            al. 2015).
    """

    model: str
    soft: float = 1.0
    temperature: float = 2.0
    features: float = 0.0


@dataclass(frozen=True)
class Unlabelled:
    """Learning from slides without annotations (Tarvainen and Valpola 2017).

    The moving average of the model (`optimizer.average`) says what crops of the
    dataset's unannotated slides hold; the model is to say the same of the crops in
    other colours.

    Attributes:
        weight: Of that loss, once it has risen.
        threshold: Pixels of which the teacher is less sure do not count; 0: all.
        ramp: Share of the steps over which the weight rises.
    """

    weight: float = 1.0
    threshold: float = 0.0
    ramp: float = 0.2


@dataclass(frozen=True)
class Prune:
    """Start from a model with the least important channels taken away.

    Attributes:
        model: Folder of a trained model of the recipe's architecture.
        share: Of the channels of each layer that are removed.
    """

    model: str
    share: float = 0.3

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.share < 1:
            raise ValueError(f"prune.share: expected 0..1, found {self.share}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training, beside the data.

    Attributes:
        model: Network and encoder.
        weights: Of the encoder to start from: None for random ones, "imagenet", or a
            file of them.
        window: How inference will look at slides with the model.
        stain: Bring crops and windows to one staining: none, or macenko.
        scaling: Of pixels, in training and inference: imagenet (to 0..1, then by its
            mean and deviation), unit (to 0..1) or zscore (each channel of a crop or
            window by its own mean and deviation).
        data: Which pixels are seen.
        loss: What is minimised.
        optimizer: By what.
        schedule: For how long.
        augment: Random changes of the crops.
        teacher: Model to learn from, beside the labels.
        unlabelled: How to learn from unannotated slides.
        prune: Model to thin out, and to train on.
        batch: Crops a step, over all workers together.
        micro_batch_size: Crops that go through the network at once on a worker; a step
            of more is accumulated. None: the batch shared among as many workers as may
            be.
        precision: auto, float32, bfloat16 or float16.
        channels_last: Layout of the network's memory; usually the faster one.
        compile: Compile the network by torch.compile.
        sync_batch_norm: Normalise over the crops of all workers; needs GPUs.
        seed: Of initial weights, order, crops and augmentation.
        workers: Processes (GPUs) that train together; fewest and most: as many of them
            as the cluster has at the time.
    """

    model: Architecture = field(default_factory=Architecture)
    weights: str | None = None
    window: Windows = field(default_factory=Windows)
    stain: Literal["none", "macenko"] = "none"
    scaling: Literal["imagenet", "unit", "zscore"] = "imagenet"
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    teacher: Teacher | None = None
    unlabelled: Unlabelled | None = None
    prune: Prune | None = None
    batch: int = 8
    micro_batch_size: int | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = False
    seed: int = 0
    workers: int | tuple[int, int] = 1

    RENAMED: ClassVar[dict[str, str]] = {"at_once": "micro_batch_size"}

    def __post_init__(self) -> None:
        """Check what concerns several keys."""
        least, most = self.fewest, self.most
        if not 1 <= least <= most:
            raise ValueError(
                f"workers: expected a number from 1, or [fewest, most], "
                f"found {self.workers}"
            )
        if self.batch < 1 or (self.micro_batch_size is None and self.batch % most):
            raise ValueError(
                f"batch: expected a multiple of workers ({most}), found {self.batch}"
            )
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.batch % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size: expected a divisor of batch ({self.batch}), "
                f"found {self.micro_batch_size}"
            )
        if self.micro_batches < most:
            raise ValueError(
                f"micro_batch_size: {self.batch} crops a step, "
                f"{self.crops_per_micro_batch} at once, make {self.micro_batches} "
                f"micro batches for {most} workers; set micro_batch_size to "
                f"{max(1, self.batch // most)} or less, so that each has one"
            )
        first = self.schedule.phases[0].train if self.schedule.phases else "all"
        if first != "all" and self.weights is None and self.prune is None:
            raise ValueError(
                f"schedule.phases: the first trains {first}, but an encoder of random "
                f"weights teaches nothing while it stays as it is; set weights, or "
                f"schedule.phases=[] to train all from the start"
            )
        if self.classifies and (
            self.loss.dice or self.teacher or self.unlabelled or self.prune
        ):
            raise ValueError(
                "model: a classifier cannot do with loss.dice (set it to 0), teacher, "
                "unlabelled or prune"
            )
        if self.window.size % 32:
            raise ValueError(
                f"window.size: expected a multiple of 32, found {self.window.size}"
            )

    @property
    def classifies(self) -> bool:
        """Whether a crop has one class, the commonest of its pixels."""
        return self.model.name == "classifier"

    @property
    def fewest(self) -> int:
        """Least number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        """Greatest number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def crops_per_micro_batch(self) -> int:
        """Crops that go through the network at once."""
        return self.micro_batch_size or max(1, self.batch // self.most)

    @property
    def micro_batches(self) -> int:
        """Parts of a step, which the workers share among them."""
        return self.batch // self.crops_per_micro_batch


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, by name or path, with overrides such as `optimizer.lr=1e-4`.

    Raises:
        ConfigError: There is none of this name, an unknown key or a wrong value.
    """
    return read_settings(Recipe, find_recipe(recipe), overrides)
