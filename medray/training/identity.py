"""The digest that names a training, by recipe and data; and the data it has seen."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator

from medray.datasets import holds_images, morphology_uri, read_slides
from medray.errors import ConfigError
from medray.models import is_file, model_digest, read_seen, with_seen
from medray.slides import scan_digest
from medray.storage import files, to_dict
from medray.training.recipe import Recipe
from medray.training.sampler import usable_patches
from medray.types import Row


def provenance_of(recipe: Recipe, data: str) -> Row:
    """Return the provenance of a training: equal digests mean equal recipe and data."""
    digest = hashlib.blake2b(digest_size=16)
    plain = to_dict(recipe)
    # By its name when digests began: a training of medray 0.1 goes on.
    plain["at_once"] = plain.pop("micro_batch_size")
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for other in (recipe.teacher, recipe.prune):
        if other is not None:
            digest.update(model_digest(other.model).encode())
    for part in data_parts(data, morphology=recipe.model.morphology):
        digest.update(part)
    packages = ("medray", "torch", "torchvision", "segmentation-models-pytorch")
    return {
        "digest": f"blake2b:{digest.hexdigest()}",
        "data": data.rsplit("/", 1)[-1],
        "recipe": to_dict(recipe),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def data_parts(data: str, *, morphology: bool) -> Iterator[bytes]:
    """Yield what a dataset is: equal parts mean equal pixels and labels.

    Args:
        data: Dataset.
        morphology: What contours measure counts, too.

    Raises:
        ConfigError: There is no dataset.
    """
    names = ["dataset.yaml", "patches.parquet"]
    if morphology and files.exists(morphology_uri(data)):
        names.append("morphology.parquet")
    for name in names:
        uri = files.join(data, name)
        if not files.exists(uri):
            raise ConfigError(
                f"{uri} is missing; `medray ingest IMAGES --annotations MASKS --out "
                f"DATASET` makes a dataset of images and their masks or outlines"
            )
        yield files.read_bytes(uri)
    if not holds_images(data):  # whose patches have digests themselves
        digests = sorted((row["slide"], row["digest"]) for row in read_slides(data))
        yield json.dumps(digests).encode()


def check_checkpoints(out: str, provenance: Row) -> None:
    """Raise an error for a folder in which a different training was interrupted.

    Raises:
        ConfigError: Its checkpoints are there.
    """
    name = provenance["digest"].removeprefix("blake2b:")
    places = files.list_folder(files.join(out, "checkpoints"))
    others = [place for place in places if place.endswith("-last.pt")]
    if others and f"{name}-last.pt" not in others:
        raise ConfigError(
            f"{out}: holds an interrupted training of another recipe or dataset; "
            f"choose another --out, or remove its folder checkpoints, and the training "
            f"starts from the beginning"
        )


def seen_of(
    settings: Recipe, patches: dict[str, list[Row]], data: str
) -> dict[str, str]:
    """Return the images or slides that a model has seen: "train" or "val" by digest.

    What another model has learned from comes along with its weights, and with what it
    teaches.
    """
    parts = [(split, patches[split]) for split in ("val", "train")]
    if settings.unlabelled is not None:
        parts.append(("train", usable_patches(data, "", settings.data)))
    of_images = holds_images(data)
    rows = [] if of_images else read_slides(data)
    scans = {row["slide"]: scan_digest(row["digest"]) for row in rows}
    seen: dict[str, str] = {}
    for split, rows in parts:
        digests = {row["digest"] if of_images else scans[row["slide"]] for row in rows}
        seen |= dict.fromkeys(digests, split)
    others = [other.model for other in (settings.teacher, settings.prune) if other]
    if settings.weights and is_file(settings.weights):
        others.append(settings.weights.rpartition("/")[0])
    for folder in others:
        seen = with_seen(seen, read_seen(folder))
    return seen
