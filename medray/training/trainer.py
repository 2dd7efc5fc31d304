"""One model that learns: its step, and all that changes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn

from medray.errors import ConfigError
from medray.models.classifiers import build_classifier
from medray.models.config import ModelConfig
from medray.models.folder import load_model
from medray.models.network import Normalise, choose_precision, standardise
from medray.models.prune import thinned
from medray.models.segmenters import build_segmenter
from medray.training.augment import move, recolour
from medray.training.distillation import (
    Hints,
    LastFeatures,
    consistency,
    divergence,
    rise,
)
from medray.training.finetuning import (
    check_phases,
    find_stages,
    importance,
    let_learn,
    most_important,
)
from medray.training.losses import SegmentationLoss
from medray.training.optim import (
    build_average,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from medray.training.recipe import Phase, Recipe
from medray.types import Row, UInt8

_OLD = 0.7  # weight of what was known of a patch's loss before


@dataclass(frozen=True)
class World:
    """Who trains together.

    Attributes:
        rank: Of this one, from 0.
        size: How many there are.
        device: Of this one.
        local_size: How many of them are on this machine, this one included.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1

    def share(self, count: int) -> range:
        """Give which of `count` things are for this one."""
        return range(self.rank, count, self.size)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the world, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Give what each of the world has."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values


@dataclass(frozen=True)
class Batch:
    """Crops of a part on their way to the device.

    Attributes:
        images: (N, 3, S, S) uint8.
        masks: (N, S, S) uint8.
        patches: (N,) index of the patch of each.
        unlabelled: (M, 3, S, S) uint8.
    """

    images: UInt8
    masks: UInt8
    patches: npt.NDArray[np.int64]
    unlabelled: UInt8


class Learner:
    """A model in training; two of the same state do the same next step."""

    def __init__(
        self,
        world: World,
        recipe: Recipe,
        model_config: ModelConfig,
        patches: int,
        steps: int,
        measures: Mapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> None:
        """Start from the recipe's weights.

        Args:
            world: Who trains together.
            recipe: How.
            model_config: How pixels become inputs, and the classes.
            patches: To train on.
            steps: Of an epoch.
            measures: (N, F) of the patches of `train` and `val`, for a model that takes
                them (`model_config.morphology`).

        Raises:
            ConfigError: The model, its weights or its teacher are not to be had.
        """
        self.world, self.recipe, self.steps = world, recipe, steps
        self.model_config = model_config
        torch.manual_seed(recipe.seed)
        self.dtype = choose_precision(recipe.precision, world.device)
        self.network = self._placed(build_network(recipe, len(model_config.classes)))
        if recipe.sync_batch_norm and world.size > 1:
            if world.device.type != "cuda":
                raise ConfigError("sync_batch_norm: needs GPUs; set it to false")
            if recipe.micro_batches % world.size:
                raise ConfigError(
                    f"sync_batch_norm: {recipe.micro_batches} micro batches a step "
                    f"cannot be shared evenly by {world.size} workers; choose another "
                    f"micro_batch_size or batch"
                )
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
                self.network
            )
        self.stages = find_stages(getattr(self.network, "encoder", None))
        self.model: nn.Module = self.network
        if recipe.compile:
            self.model = torch.compile(self.network)  # type: ignore[assignment]
        self.normalise = Normalise(model_config).to(world.device)
        self.measures = {
            split: standardise(values, model_config, world.device)
            for split, values in (measures or {}).items()
        }
        self.loss = SegmentationLoss(recipe.loss)
        learned: list[nn.Parameter] = list(self.network.parameters())
        self._load_teacher(model_config)
        if self.hints is not None:
            learned += self.hints.parameters()
        self.learned = learned
        self.optimizer = build_optimizer(recipe.optimizer, learned)
        # Only float16 needs scaled losses: its smallest numbers are too large.
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=self.dtype == torch.float16
        )
        self.average = None
        if recipe.optimizer.average:
            self.average = build_average(self.network, recipe.optimizer.average)
        self.rate = 0.0
        self.epoch = self.step = 0
        self.loss_sum = self.seconds = self.waited = 0.0
        self.history: list[Row] = []
        self.best: Row = {"epoch": -1, "score": float("-inf")}
        self.damaged: dict[str, str] = {}
        self.decided: dict[int, dict[str, float]] = {}
        self.losses = torch.full((patches,), torch.nan, dtype=torch.float64)
        self.order_losses = self.losses.clone()

    def _placed(self, network: nn.Module) -> nn.Module:
        network = network.to(self.world.device)
        if self.recipe.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return network

    def _load_teacher(self, model_config: ModelConfig) -> None:
        self.teacher: nn.Module | None = None
        self.hints: Hints | None = None
        how = self.recipe.teacher
        if how is None:
            return
        teacher, config = load_model(how.model)
        self.teacher = self._placed(teacher).requires_grad_(False)
        self.teacher_normalise = Normalise(config).to(self.world.device)
        if how.features:
            self.seen, self.taught = LastFeatures(self.network), LastFeatures(teacher)
            with torch.inference_mode():
                probe = torch.zeros(1, 3, 64, 64, device=self.world.device)
                self.network.eval()(probe)
                self.teacher(probe)
            features = self.seen.now(), self.taught.now()
            self.hints = Hints(*(f.shape[1] for f in features)).to(self.world.device)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the average, if there is one."""
        kept: nn.Module = self.network
        if self.average is not None:
            kept = self.average.module
        return kept

    # --- a step -----------------------------------------------------------------------

    def do_step(
        self, micro_batches: Sequence[Batch], failure: str | None = None
    ) -> tuple[float, str | None]:
        """Learn from this worker's parts of a step, together with the others.

        Args:
            micro_batches: As many as `World.share` gives this worker.
            failure: Why there are none, if there are none.

        Returns:
            The loss over all parts of the world, and what went wrong here. If anything
            went wrong anywhere, the loss is not a number, and no weights are changed.
        """
        self.model.train()
        self._let_learn()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        number = self.epoch * self.steps + self.step
        try:
            share = self.world.share(self.recipe.micro_batches)
            for index, micro_batch in zip(share, micro_batches, strict=False):
                place = (self.recipe.seed, number, index)
                seed = int(np.random.SeedSequence(place).generate_state(1)[0])
                loss = self._loss(micro_batch, seed, number) / self.recipe.micro_batches
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            failure = self._said_of(error, micro_batches[0].images.shape[-1])
        if failure is not None:
            total += torch.nan
        elif not torch.isfinite(total):
            failure = self._not_finite(number)
        loss_of_all = self._combine(total)
        if np.isfinite(loss_of_all):
            self._change_weights(number)
            self.step += 1
            self.loss_sum += loss_of_all
        return loss_of_all, failure

    def _let_learn(self) -> None:
        """Have learn what the phase says."""
        if self.phase is not None:
            encoder: Any = self.network.encoder
            let_learn(encoder, self.phase, self.stages, self.learning)

    def _said_of(self, error: Exception, side: int) -> str:
        """Say what to do about an error of a forward or backward pass.

        Raises:
            Exception: `error` itself, if it is none that a setting can mend.
        """
        crops_per_micro_batch, text = (
            self.recipe.crops_per_micro_batch,
            " ".join(str(error).split()),
        )
        of = f"{crops_per_micro_batch} crops of {side} px at once"
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            less = (
                f"micro_batch_size={crops_per_micro_batch // 2} halves it"
                if crops_per_micro_batch > 1
                else "lower data.crop"
            )
            return f"not enough memory on {self.world.device} for {of}; {less}"
        if "more than 1 value per channel" in text:  # batch normalisation
            return (
                f"the network cannot learn from {of}; set micro_batch_size to 2 or more"
            )
        raise error

    def _not_finite(self, number: int) -> str:
        return (
            f"the loss of step {number} is not a number; lower optimizer.lr "
            f"({self.recipe.optimizer.lr:g}), clip gradients (optimizer.clip), or set "
            f"precision=float32"
        )

    def _change_weights(self, number: int) -> None:
        how = self.recipe.optimizer
        scores = [entry["score"] for entry in self.history]
        self.rate = learning_rate(number, self.steps, scores, how, self.recipe.schedule)
        set_learning_rate(self.optimizer, self.rate)
        self.scaler.unscale_(self.optimizer)
        if how.clip:
            nn.utils.clip_grad_norm_(self.learned, how.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def _loss(self, micro_batch: Batch, seed: int, number: int) -> torch.Tensor:
        device, augment = self.world.device, self.recipe.augment
        images, masks = move(
            augment,
            _to_device(micro_batch.images, device),
            _to_device(micro_batch.masks, device),
            seed=seed,
        )
        images = recolour(augment, images, seed=seed + 1)
        torch.manual_seed(seed)  # of dropout
        beside = self._beside("train", micro_batch.patches)
        logits = self._forward(self.model, self.normalise(images), *beside)
        labels = self._labels(masks)
        loss: torch.Tensor = self.loss(logits, labels)
        loss = loss + self.loss.of_weights(self.network)
        if self.teacher is not None and self.recipe.teacher is not None:
            how = self.recipe.teacher
            with torch.no_grad():
                softer = self._forward(self.teacher, self.teacher_normalise(images))
            loss = loss + how.soft * divergence(logits, softer, how.temperature)
            if self.hints is not None:
                features = self.seen.now().float(), self.taught.now().float()
                loss = loss + how.features * self.hints(*features)
        if self.recipe.unlabelled is not None:
            loss = loss + self._unlabelled_loss(
                micro_batch.unlabelled, seed + 2, number
            )
        if self.recipe.data.hard:
            self._note_losses(micro_batch.patches, self.loss.of_crops(logits, labels))
        return loss

    def _unlabelled_loss(
        self, crops: UInt8, seed: int, number: int
    ) -> torch.Tensor | float:
        """Give how far this model is from its own average, on other colours."""
        how = self.recipe.unlabelled
        assert how is not None
        assert self.average is not None
        images = _to_device(crops, self.world.device)
        nothing = torch.zeros_like(images[:, 0])
        images, _ = move(self.recipe.augment, images, nothing, seed=seed)
        changed = recolour(self.recipe.augment, images, seed=seed + 1)
        with torch.no_grad():
            self.average.module.eval()
            theirs = self._forward(self.average.module, self.normalise(images))
        ours = self._forward(self.model, self.normalise(changed))
        weight = how.weight * rise(number, round(how.ramp * self.total_steps))
        return weight * consistency(ours, theirs, how.threshold)

    def _beside(
        self, split: str, patches: npt.NDArray[np.int64] | None
    ) -> tuple[torch.Tensor, ...]:
        """Give what goes into the model beside the pixels of patches, if anything."""
        if self.model_config.morphology is None:
            return ()
        assert patches is not None
        return (self.measures[split][torch.from_numpy(patches)],)

    def _forward(
        self, model: nn.Module, inputs: torch.Tensor, *beside: torch.Tensor
    ) -> torch.Tensor:
        """Give float32 logits."""
        if not self.recipe.channels_last:
            inputs = inputs.contiguous()
        low = self.dtype != torch.float32
        with torch.autocast(self.world.device.type, self.dtype, enabled=low):
            logits: torch.Tensor = model(inputs, *beside)
        if logits.ndim == 2:  # of a classifier: for the whole crop
            logits = logits[:, :, None, None]
        return logits.float()

    def _labels(self, masks: torch.Tensor) -> torch.Tensor:
        """Give int64 labels: of pixels (N, S, S), or (N, 1, 1) a crop's commonest."""
        if not self.recipe.classifies:
            return masks.long()
        flat, classes = masks.flatten(1), range(len(self.model_config.classes))
        counts = torch.stack([(flat == value).sum(dim=1) for value in classes], dim=1)
        return counts.argmax(dim=1)[:, None, None]

    def _combine(self, loss: torch.Tensor) -> float:
        """Add up gradients and loss over the world; give the loss."""
        if self.world.size == 1:
            return float(loss)
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.learned]
        together = torch.cat(
            [*(micro_batch.flatten() for micro_batch in mine), loss[None]]
        )
        self.world.add(together)
        sizes = [p.numel() for p in self.learned]
        sums = torch.split(together[:-1], sizes)
        for parameter, total in zip(self.learned, sums, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(total.view_as(parameter))
        return float(together[-1])

    def _note_losses(
        self, patches: npt.NDArray[np.int64], losses: torch.Tensor
    ) -> None:
        index = torch.from_numpy(patches)
        known, new = self.losses[index], losses.detach().cpu().double()
        mixed = _OLD * known + (1 - _OLD) * new
        self.losses[index] = torch.where(known.isnan(), new, mixed)

    # --- an epoch ---------------------------------------------------------------------

    @property
    def phase(self) -> Phase | None:
        """The phase that the epoch is in, if there are any."""
        schedule = self.recipe.schedule
        return schedule.phases[self._phase_number] if schedule.phases else None

    @property
    def _phase_number(self) -> int:
        return self.recipe.schedule.phase_at(self.epoch)

    @property
    def learning(self) -> tuple[str, ...] | None:
        """Names of the encoder's stages that learn; None of a phase not about stages.

        A function of the epoch, and for adaptive phases of what was decided at their
        start, which is part of the state.
        """
        if self.phase is None or self.phase.train in ("head", "all"):
            return None
        if self.phase.train == "adaptive":
            return most_important(self.decided[self._phase_number], self.phase.share)
        return tuple(stage.name for stage in self.stages[-self.phase.stages :])

    def must_decide(self) -> bool:
        """Tell whether an adaptive phase begins of which nothing is decided yet."""
        adaptive = self.phase is not None and self.phase.train == "adaptive"
        return adaptive and self._phase_number not in self.decided

    def weigh_stages(
        self, crops: Sequence[tuple[UInt8, UInt8, npt.NDArray[np.int64]]]
    ) -> dict[str, float]:
        """Tell how much each stage of the encoder matters to the network that is kept.

        Args:
            crops: Batches of validation images (N, 3, S, S), masks (N, S, S) and the
                indices (N,) of their patches.

        Raises:
            ConfigError: They hold no image.
        """
        count = sum(len(images) for images, _, _ in crops)
        if not count:
            raise ConfigError(
                "schedule.phases: train: adaptive weighs the stages on validation "
                "images, and none could be read; ingest some, or train: last"
            )

        def loss() -> float:
            losses = [self.predict(*batch)[1] * len(batch[0]) for batch in crops]
            return sum(losses) / count

        encoder: Any = self.kept.eval().encoder
        return importance(encoder, self.stages, loss)

    def decide(self, weighed: dict[str, float]) -> None:
        """Note how much the stages matter; until the phase ends it stays so."""
        self.decided[self._phase_number] = weighed

    @torch.inference_mode()
    def predict(
        self,
        images: UInt8,
        masks: UInt8,
        patches: npt.NDArray[np.int64] | None = None,
    ) -> tuple[UInt8, float]:
        """Give the classes (N, H, W) of the network that is kept, and the mean loss.

        Those of a classifier are (N, 1, 1). `patches` (N,), the indices of validation
        patches, are for a model that takes their measures.
        """
        network = self.kept.eval()
        inputs = self.normalise(_to_device(images, self.world.device))
        logits = self._forward(network, inputs, *self._beside("val", patches))
        labels = self._labels(_to_device(masks, self.world.device))
        classes = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return classes, float(self.loss(logits, labels))

    @torch.inference_mode()
    def predict_as_teacher(self, images: UInt8) -> UInt8:
        """Give the teacher's classes (N, H, W)."""
        assert self.teacher is not None
        inputs = self.teacher_normalise(_to_device(images, self.world.device))
        classes = self._forward(self.teacher.eval(), inputs).argmax(dim=1)
        predicted: UInt8 = classes.to(torch.uint8).cpu().numpy()
        return predicted

    def share_what_was_seen(self) -> None:
        """Bring together running statistics, losses of patches and damaged patches."""
        if self.world.size == 1:
            return
        networks = [self.network, *([self.average] if self.average else [])]
        for network in networks:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    self.world.add(buffer).div_(self.world.size)
        for damaged in self.world.gather(self.damaged):
            self.damaged |= damaged
        seen = self.world.gather(self.losses)
        changed = [now for now in seen if not now.equal(self.order_losses)]
        for now in changed:
            new = (now != self.order_losses) & ~now.isnan()
            self.losses[new] = now[new]

    def end_epoch(self, scores: Row, seconds: float) -> tuple[Row, Row | None]:
        """Note an epoch's scores.

        Args:
            scores: Of the validation patches; `f1` decides, then the loss.
            seconds: That validation took.

        Returns:
            The epoch's entry, and the weights to keep if they are the best so far.
        """
        crops = self.steps * self.recipe.batch
        entry: Row = {
            "epoch": self.epoch,
            "loss": self.loss_sum / self.steps,
            "learning_rate": self.rate,
            "seconds": self.seconds + seconds,
            "crops_per_second": crops / max(self.seconds, 1e-9),
            "waiting": self.waited / max(self.seconds, 1e-9),
            "damaged": len(self.damaged),
        }
        entry |= scores | self._told_of_phase()
        entry["score"] = scores["f1"] if scores["f1"] is not None else -entry["loss"]
        self.history.append(entry)
        weights = None
        if entry["score"] > self.best["score"]:
            self.best = {"epoch": self.epoch, "score": entry["score"]}
            weights = {k: v.cpu() for k, v in self.kept.state_dict().items()}
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum = self.seconds = self.waited = 0.0
        self.order_losses = self.losses.clone()
        return entry, weights

    def _told_of_phase(self) -> Row:
        if self.phase is None:
            return {}
        number = self._phase_number
        told: Row = {"phase": number, "train": self.phase.train}
        if self.learning is not None:
            told["learning"] = list(self.learning)
        if number in self.decided:
            told["importance"] = self.decided[number]
        return told

    @property
    def total_steps(self) -> int:
        """Of the longest training."""
        return self.steps * self.recipe.schedule.epochs

    def is_over(self) -> bool:
        """Tell whether all epochs are done, or nothing has improved for too long."""
        # What all can do together shows in the last phase.
        last = self.recipe.schedule.first_epochs[-1]
        best = max(self.best["epoch"], last - 1)
        since_best: int = self.epoch - 1 - best
        return (
            self.epoch >= self.recipe.schedule.epochs
            or since_best >= self.recipe.schedule.patience
        )

    # --- state ------------------------------------------------------------------------

    _VALUES = ("epoch", "step", "rate", "loss_sum", "seconds", "waited")
    _MORE = ("history", "best", "damaged", "decided", "losses", "order_losses")

    def state(self) -> Row:
        """Give all that the next step depends on."""
        state: Row = {name: getattr(self, name) for name in self._VALUES + self._MORE}
        return state | {
            name: micro_batch.state_dict()
            for name, micro_batch in self._stateful().items()
        }

    def load_state(self, state: Row) -> None:
        """Take up where `state` left off."""
        for name in self._VALUES + self._MORE:
            setattr(self, name, state[name])
        for name, micro_batch in self._stateful().items():
            micro_batch.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        micro_batches = {
            "network": self.network,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "hints": self.hints,
            "average": self.average,
        }
        return {
            name: micro_batch
            for name, micro_batch in micro_batches.items()
            if micro_batch is not None
        }


def build_network(recipe: Recipe, classes: int) -> nn.Module:
    """Build the network that a recipe starts from.

    Raises:
        ConfigError: It, its weights or the model to prune are not to be had, or it
            cannot go through the phases.
    """
    network = _build(recipe, classes)
    check_phases(network, recipe)
    return network


def _build(recipe: Recipe, classes: int) -> nn.Module:
    if recipe.prune is not None:
        network, config = load_model(recipe.prune.model)
        if config.architecture != recipe.model or len(config.classes) != classes:
            raise ConfigError(
                f"prune.model: {recipe.prune.model} is {config.architecture} of "
                f"{len(config.classes)} classes, the recipe asks for {recipe.model} of "
                f"{classes}; make them the same"
            )
        return thinned(network, recipe.prune.share)
    if recipe.classifies:
        return build_classifier(recipe.model, classes, recipe.weights)
    return build_segmenter(recipe.model, classes, recipe.weights)


def _to_device(pixels: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy pixels, which lie in Ray's object store and must not be written to."""
    tensor = torch.from_numpy(pixels.copy())
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
