"""Small DICOM whole slides (VL Whole Slide Microscopy Image, PS3.3 A.32.8)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    generate_uid,
)

UInt8 = npt.NDArray[np.uint8]
SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


@dataclass(frozen=True)
class Scan:
    """What the instances of a series have in common.

    Attributes:
        codec: `jpeg`, `j2k` (lossless), `j2k_lossy` or `raw`.
        sparse: TILED_SPARSE: each frame says where it lies.
        parts: Each level is a concatenation of so many instances.
        missing: Tiles of level 0 that a sparse one does not store (row, column).
        mpp: Of level 0: (y, x).
        levels: How many, each half of the one before.
        others: Label and overview are in the series too.
        suffix: Of the file names.
    """

    codec: str = "jpeg"
    sparse: bool = False
    parts: int = 1
    missing: tuple[tuple[int, int], ...] = ()
    mpp: tuple[float, float] = (0.5, 0.5)
    levels: int = 3
    others: bool = True
    suffix: str = ".dcm"
    tile: int = 128
    seed: str = "a"
    series: str = field(default="")

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return self.series or generate_uid(entropy_srcs=["series", self.seed])


def picture(height: int, width: int, seed: int = 0) -> UInt8:
    """Draw a smooth picture in colours, different everywhere."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin((y + seed * 7) / 23) * 50 + x * 110 / width + 80,
        np.cos(x / 31) * 50 + y * 110 / height + 80,
        np.sin((x + y) / 41) * 90 + 120,
    ]
    return np.clip(np.stack(waves, axis=2), 0, 255).astype(np.uint8)


def half(pixels: UInt8) -> UInt8:
    """Return the next level."""
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    p = pixels[:height, :width].astype(np.uint16)
    mean = (p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2] + 2) // 4
    return mean.astype(np.uint8)


def write_series(folder: Path, pixels: UInt8, scan: Scan | None = None) -> list[Path]:
    """Write the instances of a slide; give the files, level 0 first."""
    scan = scan or Scan()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for level in range(scan.levels):
        kind = "NONE" if level == 0 else "RESAMPLED"
        written += _write_image(folder, pixels, scan, level, ("VOLUME", kind))
        pixels = half(pixels)
    if scan.others:
        for name in ("LABEL", "OVERVIEW"):
            small = picture(96, 64, len(name))
            written += _write_image(folder, small, scan, 0, (name, "NONE"))
    return written


def _write_image(
    folder: Path, pixels: UInt8, scan: Scan, level: int, kind: tuple[str, str]
) -> list[Path]:
    volume = kind[0] == "VOLUME"
    size = scan.tile if volume else max(pixels.shape)
    rows, columns = (math.ceil(n / size) for n in pixels.shape[:2])
    padded = np.full((rows * size, columns * size, 3), 255, np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    places = [(r, c) for r in range(rows) for c in range(columns)]
    if level == 0 and volume:
        places = [place for place in places if place not in scan.missing]
    frames = [
        _encode(padded[r * size :, c * size :][:size, :size], scan.codec)
        for r, c in places
    ]
    parts = scan.parts if volume else 1
    parts = min(parts, len(frames))
    bounds = [len(frames) * part // parts for part in range(parts + 1)]
    name = f"{kind[0]}{level}"
    written = []
    for part in range(parts):
        span = slice(bounds[part], bounds[part + 1])
        uid = generate_uid(entropy_srcs=[scan.uid, name, str(part)])
        data = _header(uid, scan, kind, pixels, level, size)
        data.NumberOfFrames = len(frames[span])
        data.InstanceNumber = level * 10 + part + 1
        if scan.sparse and volume:
            data.DimensionOrganizationType = "TILED_SPARSE"
            data.PerFrameFunctionalGroupsSequence = [
                _place(r, c, size) for r, c in places[span]
            ]
        if parts > 1:
            data.ConcatenationUID = generate_uid(entropy_srcs=[scan.uid, name, "all"])
            data.SOPInstanceUIDOfConcatenationSource = generate_uid(
                entropy_srcs=[scan.uid, name, "source"]
            )
            data.InConcatenationNumber = part + 1
            data.InConcatenationTotalNumber = parts
            data.ConcatenationFrameOffsetNumber = bounds[part]
        if scan.codec == "raw":
            data.PixelData = b"".join(frames[span])
        else:
            data.PixelData = encapsulate(frames[span])
            data["PixelData"].is_undefined_length = True
        data["PixelData"].VR = "OB"
        path = folder / f"{scan.seed}-{name}-{part}{scan.suffix}"
        data.save_as(path, enforce_file_format=True)
        written.append(path)
    return written


def _encode(tile: UInt8, codec: str) -> bytes:
    tile = np.ascontiguousarray(tile)
    if codec == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(tile, level=95, subsampling="444"))
    if codec == "j2k":
        return bytes(
            imagecodecs.jpeg2k_encode(tile, reversible=True, codecformat="j2k")
        )
    if codec == "j2k_lossy":
        return bytes(imagecodecs.jpeg2k_encode(tile, level=45, codecformat="j2k"))
    return tile.tobytes()


def _header(
    uid: str, scan: Scan, kind: tuple[str, str], pixels: UInt8, level: int, size: int
) -> Any:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SLIDE_CLASS
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = {
        "jpeg": JPEGBaseline8Bit,
        "j2k": JPEG2000Lossless,
        "j2k_lossy": JPEG2000,
        "raw": ExplicitVRLittleEndian,
    }[scan.codec]
    data: Any = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.ImageType = ["ORIGINAL", "PRIMARY", *kind]
    data.SOPClassUID, data.SOPInstanceUID = SLIDE_CLASS, uid
    data.Modality, data.Manufacturer = "SM", "medray tests"
    data.ManufacturerModelName, data.DeviceSerialNumber = "drawn", "1"
    data.SoftwareVersions = "1"
    data.StudyDate = data.ContentDate = "20260101"
    data.StudyTime = data.ContentTime = "000000"
    data.AcquisitionDateTime = "20260101000000"
    data.AccessionNumber = data.StudyID = data.ReferringPhysicianName = ""
    data.PatientName = data.PatientID = "none"
    data.PatientBirthDate = data.PatientSex = ""
    data.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    data.SeriesInstanceUID, data.SeriesNumber = scan.uid, 1
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=[scan.uid, "frame"])
    data.PositionReferenceIndicator = "SLIDE_CORNER"
    data.ContainerIdentifier = "glass"
    data.VolumetricProperties = "VOLUME"
    data.FocusMethod, data.ExtendedDepthOfField = "AUTO", "NO"
    data.SpecimenLabelInImage = "YES" if kind[0] == "LABEL" else "NO"
    data.BurnedInAnnotation = "NO"
    lossy = scan.codec in ("jpeg", "j2k_lossy")
    data.LossyImageCompression = "01" if lossy else "00"
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    colors = {"jpeg": "YBR_FULL_422", "j2k": "YBR_RCT", "j2k_lossy": "YBR_ICT"}
    data.PhotometricInterpretation = colors.get(scan.codec, "RGB")
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.Rows = data.Columns = size
    height, width = pixels.shape[:2]
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = height, width
    spacing = [mpp / 1000 * 2**level for mpp in scan.mpp]
    data.ImagedVolumeWidth = width * spacing[1]
    data.ImagedVolumeHeight = height * spacing[0]
    data.ImagedVolumeDepth = 0.001
    data.DimensionOrganizationType = "TILED_FULL"
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = 10
    data.TotalPixelMatrixOriginSequence = [origin]
    measures, shared, frame = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [f"{value:.8g}" for value in spacing]
    measures.SliceThickness = "0.001"
    frame.FrameType = data.ImageType
    shared.PixelMeasuresSequence = [measures]
    shared.WholeSlideMicroscopyImageFrameTypeSequence = [frame]
    used = Dataset()
    used.OpticalPathIdentifier = "1"
    shared.OpticalPathIdentificationSequence = [used]
    data.SharedFunctionalGroupsSequence = [shared]
    optics = Dataset()
    optics.OpticalPathIdentifier = "1"
    optics.ObjectiveLensPower = "20"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "111744", "DCM"
    code.CodeMeaning = "Brightfield illumination"
    optics.IlluminationTypeCodeSequence = [code]
    data.OpticalPathSequence = [optics]
    return data


def _place(row: int, column: int, size: int) -> Dataset:
    position, group = Dataset(), Dataset()
    position.ColumnPositionInTotalImagePixelMatrix = column * size + 1
    position.RowPositionInTotalImagePixelMatrix = row * size + 1
    position.XOffsetInSlideCoordinateSystem = 10
    position.YOffsetInSlideCoordinateSystem = 10
    position.ZOffsetInSlideCoordinateSystem = 0
    group.PlanePositionSlideSequence = [position]
    return group


def write_ct(path: Path) -> None:
    """Write a CT image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT_CLASS
    meta.MediaStorageSOPInstanceUID = uid = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data: Any = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = CT_CLASS, uid, "CT"
    data.StudyInstanceUID = generate_uid(entropy_srcs=["ct study"])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=["ct series"])
    data.Rows = data.Columns = 16
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PixelData = bytes(512)
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)
