"""A model and images -> overlays of what speaks for a class, and a page of them.

OUT/
explain.html         the gallery
explain.json         one row per image: class, probability, files, or why there is none
overlays/IMAGE.png   what speaks for the class (Grad-CAM)
overlays/IMAGE.attention.png   of a classifier with self-attention: where it looks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from medray.apps.probe_windows import fullest_window
from medray.datasets import read_resized, with_overrides
from medray.errors import ConfigError, SlideError
from medray.evaluation import Explained, Explainer, as_png, data_uri, render
from medray.models import ModelConfig, model_digest, read_config
from medray.slides import SlideFile, find_slides, open_slide
from medray.storage import files
from medray.types import Columns, UInt8


@dataclass(frozen=True)
class Explanation:
    """What was explained.

    Attributes:
        out: Folder of the overlays.
        report: The page to open.
        explained: Images.
        failed: Reason of each image that could not be, by its name.
    """

    out: str
    report: str
    explained: int
    failed: dict[str, str]

    def __str__(self) -> str:
        lines = [f"report  {self.report}", f"out     {self.out}"]
        lines += [f"failed  {name}: {why}" for name, why in self.failed.items()]
        lines.append(f"{self.explained} images explained, {len(self.failed)} failed")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """An image on the page.

    Attributes:
        image: Its name.
        class_name: Class that the overlay speaks for.
        predicted: Class that was predicted.
        share: Of `class_name`, as in `Explained`.
        pictures: Data URIs: `image`, `overlay`, and `attention` if there is one.
    """

    image: str
    class_name: str
    predicted: str
    share: float
    pictures: dict[str, str]


def explain(
    model: str,
    images: Sequence[str],
    *,
    out: str,
    name: str = "",
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
) -> Explanation:
    """Draw what in images speaks for a class, and write a page of it.

    Args:
        model: Folder of `medray train`.
        images: Files, globs, folders or addresses of images or slides.
        out: Folder to make.
        name: Class to explain, instead of the predicted one. Of a segmenter that is the
            commonest after the background.
        mpp: Microns per pixel of level 0, instead of the files', or CSV (slide,mpp).
            The CSV has those of some slides.
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.

    Raises:
        ConfigError: The request is wrong, grad-cam is missing, or the encoder has no
            feature map.
    """
    model, out = files.absolute(model), files.absolute(out)
    config = read_config(model)
    if name and name not in config.classes.names:
        raise ConfigError(
            f"--class: expected one of {list(config.classes.names)}, found {name!r}"
        )
    whole = config.classifies and config.mpp is None
    if whole and not (mpp is scene is plane is None):
        raise ConfigError(
            f"{model}: looks at whole images, whatever their resolution; leave --mpp, "
            f"--scene and --plane away"
        )
    explainer = Explainer(model)
    rows: list[Columns] = []
    shown: list[_Shown] = []
    failed: dict[str, str] = {}
    slides = with_overrides(find_slides(images), mpp=mpp, scene=scene, plane=plane)
    for slide in slides:
        try:
            pixels = _read(slide, config)
            label = config.classes.names.index(name) if name else None
            found = explainer.explain(pixels, label)
            one, row = _written(slide.slide, pixels, found, config, out)
        except (SlideError, OSError) as error:
            failed[slide.slide] = str(error)
            rows.append({"image": slide.slide, "error": str(error)})
            continue
        shown.append(one)
        rows.append(row)
    digest = model_digest(model)
    page = render(
        "explain.html.jinja",
        title=f"Why a class: {model.rsplit('/', 1)[-1]}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=shown,
        failed=failed,
        classifies=config.classifies,
        digest=digest,
    )
    report = files.join(out, "explain.html")
    files.write_bytes(report, page.encode())
    values = {"model_digest": digest, "images": rows}
    files.write_json(files.join(out, "explain.json"), values)
    return Explanation(out, report, len(shown), failed)


def _written(
    image: str, pixels: UInt8, found: Explained, config: ModelConfig, out: str
) -> tuple[_Shown, Columns]:
    """Write the overlays of an image; return what the page and the table say of it."""
    pictures = {"image": as_png(pixels), "overlay": as_png(found.overlay)}
    overlay, attention = f"overlays/{image}.png", f"overlays/{image}.attention.png"
    row: Columns = {"image": image, "overlay": overlay}
    files.write_bytes(files.join(out, overlay), pictures["overlay"])
    if found.attention is not None:
        pictures["attention"] = as_png(found.attention)
        row["attention"] = attention
        files.write_bytes(files.join(out, attention), pictures["attention"])
    shown = _Shown(
        image=image,
        class_name=config.classes.names[found.label],
        predicted=config.classes.names[found.predicted],
        share=found.share,
        pictures={key: data_uri(picture) for key, picture in pictures.items()},
    )
    row |= {"class": shown.class_name, "predicted": shown.predicted}
    return shown, row | {"share": shown.share}


def _read(file: SlideFile, config: ModelConfig) -> UInt8:
    """Read what the model looks at: (S, S, 3) uint8.

    A classifier of images sees the whole, resized as ingest does; any other model a
    window at its resolution, the one with the most tissue.
    """
    if config.classifies and config.mpp is None:
        return read_resized(file.uri, config.window.size)
    with open_slide(file.uri, scene=file.scene, plane=file.plane) as slide:
        return fullest_window(slide, config, file.mpp)
