"""Images at each step from class folders into a dataset.

    ImageFile      found in a folder, its patient and its split said
    CheckedImage   looked at: its digest, and whether it can be read; dealt to a split
    PlacedImage    given its place on a Sheet

No step changes a value: it returns new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medray.geometry import Rectangle


@dataclass(frozen=True)
class Contours:
    """The contours of a cell.

    Attributes:
        nucleus: Address of the nucleus' file.
        cytoplasm: Of the cytoplasm's.
        fingerprints: Of the cytoplasm's file and the nucleus'.
    """

    nucleus: str
    cytoplasm: str
    fingerprints: tuple[str, str]


@dataclass(frozen=True)
class MissingContours:
    """Why a cell cannot be measured.

    Attributes:
        message: What is missing, and what to do.
    """

    message: str


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image of a class, or a cell within one, as it was found.

    Attributes:
        image: Its name: the path below the folder, or that with the cell's number.
        uri: Address.
        class_name: The folder that it is in.
        split: That the folders or a table say; "": none.
        fingerprint: Of the file.
        patient: Whose it is; an image that nothing is known of is one by itself.
        contours: Of the cell; None: they were not asked for.
        cut: Whether the cell is to be cut out of an image of several.
    """

    image: str
    uri: str
    class_name: str
    split: str
    fingerprint: str
    patient: str
    contours: Contours | MissingContours | None = None
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckedImage:
    """An image that was checked.

    Attributes:
        file: As it was found.
        split: In which it is: that of the file, until images are dealt out.
        digest: Of its bytes, or of the pixels that are cut out; "": it cannot be read.
        status: "copy": an equal image is taken in its place.
        message: Why it is not taken; "": it is.
        features: What its contours measure; none: that was not asked for.
        box: Where it is cut out of the file; None: it is all of it.
        note: What its reader remarks, such as that it was turned.
    """

    file: ImageFile
    split: str
    digest: str
    status: Literal["done", "copy", "failed"] = "done"
    message: str = ""
    features: tuple[float, ...] = ()
    box: Rectangle | None = None
    note: str = ""

    @property
    def taken(self) -> bool:
        """Whether it becomes part of the dataset, if it is dealt to a split."""
        return self.status == "done"


@dataclass(frozen=True)
class PlacedImage:
    """An image with its place.

    Attributes:
        image: The image.
        sheet: Id of the sheet that it is on.
        y: First row there, pixels.
        x: First column.
    """

    image: CheckedImage
    sheet: str
    y: int
    x: int


@dataclass(frozen=True)
class Sheet:
    """Images of one split, side by side: a slide of the dataset.

    Attributes:
        slide: Id.
        split: Of its images.
        digest: Of their digests and classes.
        height: Pixels.
        width: Pixels.
        images: Row by row.
    """

    slide: str
    split: str
    digest: str
    height: int
    width: int
    images: tuple[PlacedImage, ...]
