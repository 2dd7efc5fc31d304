"""A recipe: the YAML file that names everything about one training.

What a key such as `loss` may hold stands next to its use, in the module of
that component; here they are put together, and what concerns several is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from medray.geometry import Windows
from medray.models import Architecture, Precision, Stain
from medray.storage import read_settings
from medray.training.augment import Augment
from medray.training.distillation import Teacher, Unlabelled
from medray.training.finetuning import Phase
from medray.training.losses import Loss
from medray.training.optim import Optimizer
from medray.training.recipe_files import find_recipe
from medray.training.sampler import Data, Sampling
from medray.training.schedule import Schedule
from medray.training.settings import STRICT

__all__ = [
    "Augment",
    "Data",
    "Loss",
    "Optimizer",
    "Phase",
    "Prune",
    "Recipe",
    "Schedule",
    "Teacher",
    "Unlabelled",
    "read_recipe",
]


@dataclass(frozen=True, config=STRICT)
class Prune:
    """Start from a model with the least important channels taken away.

    Attributes:
        model: Folder of a trained model of the recipe's architecture.
        share: Of the channels of each layer that are removed.
    """

    model: str
    share: float = Field(default=0.3, gt=0, lt=1)


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """Everything that decides a training, except the data.

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
        teacher: Model to learn from, in addition to the labels.
        unlabelled: How to learn from unannotated slides.
        prune: Model to thin out, and to train on.
        batch: Crops per step, over all workers together.
        micro_batch_size: Micro-batch size per worker, in crops; larger batches use
            gradient accumulation. None: the batch shared among as many workers as may
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
    stain: Stain = "none"
    scaling: Literal["imagenet", "unit", "zscore"] = "imagenet"
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    teacher: Teacher | None = None
    unlabelled: Unlabelled | None = None
    prune: Prune | None = None
    batch: int = Field(default=8, ge=1)
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "auto"
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = False
    seed: int = Field(default=0, ge=0, lt=2**63)
    workers: int | tuple[int, int] = 1

    RENAMED: ClassVar[dict[str, str]] = {"at_once": "micro_batch_size"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        least, most = self.fewest, self.most
        if not 1 <= least <= most:
            raise ValueError(
                f"workers: expected a number from 1, or [fewest, most], "
                f"found {self.workers}"
            )
        if self.micro_batch_size is None and self.batch % most:
            raise ValueError(
                f"batch: expected a multiple of workers ({most}), found {self.batch}"
            )
        if self.batch % (self.micro_batch_size or 1):
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
        return self

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
        """Micro batches of a step, which the workers share among them."""
        return self.sampling.micro_batches

    @property
    def sampling(self) -> Sampling:
        """What the processes that read crops must know."""
        return Sampling(
            data=self.data,
            seed=self.seed,
            epochs=self.schedule.epochs,
            batch=self.batch,
            micro_batch_size=self.crops_per_micro_batch,
            unlabelled=self.unlabelled is not None,
        )


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, by name or path, with overrides such as `optimizer.lr=1e-4`.

    Raises:
        ConfigError: There is none of this name, an unknown key or a wrong value.

    Examples:
        >>> from medray.training.recipe import read_recipe
        >>> recipe = read_recipe("unet", ["optimizer.lr=1e-4"])
        >>> recipe.model.encoder, recipe.optimizer.lr
        ('resnet18', 0.0001)
    """
    return read_settings(Recipe, find_recipe(recipe), overrides)
