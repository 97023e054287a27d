"""CT-RATE from a downloaded tree: which file is which, and in which of its two versions.

Version 1 (`train`, `valid`) holds raw stored numbers under a header that says slope 1, intercept 0
and wrong voxel sizes and directions; the metadata table has the true ones. The repaired version
(`train_fixed`, `valid_fixed`) is in HU; whoever applies the table to it turns every voxel into air.
So the folder says which version a file should be, its values say which it is (`data/readings.py`),
and where the two disagree the volume is refused.

Everything is joined by the volume's name; see `builders.build_ct_rate`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import orientation, readings, tables
from brgsa_jax.data.plans import NO_REPORT, file_state, record_of, split_of
from brgsa_jax.data.records import Failure
from brgsa_jax.data.shards import Plan
from brgsa_jax.data.volume import NotACT, Preprocess, Stored, place, read_stored, rescale
from brgsa_jax.summarize.vocabulary import CT_RATE_18

VERSIONS = ("auto", "v1", "fixed")
TWINS = ("all", "first", "thinnest")
_SPLITS = ("train", "valid")
_FOLDERS = {"v1": "{}", "fixed": "{}_fixed"}
_METADATA = {"train": "metadata/train_metadata.csv", "valid": "metadata/validation_metadata.csv"}
_REPORTS = {"train": "radiology_text_reports/train_reports.csv",
            "valid": "radiology_text_reports/validation_reports.csv"}
_LABELS = "multi_abnormality_labels/{}_predicted_labels.csv"
_NO_CHEST = "metadata/no_chest_{}.txt"
_SUFFIX = ".nii.gz"
_NAME = re.compile(r"(?P<patient>(?P<split>train|valid)_(?P<number>\d+))_(?P<scan>[a-z]+)"
                   r"_(?P<reconstruction>\d+)")
_GEOMETRY = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "ImagePositionPatient",
             "ImageOrientationPatient", "Rows", "Columns", "NumberofSlices")
_SPACING_TOLERANCE = 0.02
_DIRECTION_TOLERANCE = 0.1  # Radians, about 6 degrees.


class Options(NamedTuple):
    """What of CT-RATE to take; see `builders.build_ct_rate`."""

    version: str = "auto"
    twins: str = "all"
    impressions: bool = False
    official_valid: str = "test"
    holdout: float = 0.0


class Geometry(NamedTuple):
    """What the metadata table says about a volume.

    Attributes:
        slope, intercept: HU = slope * stored number + intercept.
        spacing: (x, y, z) millimetres.
        affine: rows of [4, 4], voxel index to RAS+ millimetres.
        shape: (columns, rows, slices); 0 where the table is silent.
    """

    slope: float
    intercept: float
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class CtRateTask:
    """One volume of CT-RATE.

    Attributes:
        scan: the examination, e.g. "train_1_a"; all its reconstructions have one report.
        version: "v1" or "fixed", by the folder it lies in.
        geometry: None where the table's row is incomplete, which only "fixed" survives.
        note: what is incomplete about it.
    """

    split: str
    id: str
    patient: str
    scan: str
    report: str
    findings: tuple[str, ...]
    file: str
    path: str
    version: str
    geometry: Geometry | None
    note: str
    preprocess: Preprocess

    def stamp(self) -> list[Any]:
        """See `records.Task`."""
        return [self.patient, self.report, self.findings, self.file, self.version, self.geometry,
                self.note, file_state(self.path)]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        if self.version == "v1":
            stored = _read_v1(self.path, self.geometry)
        else:
            stored = _read_fixed(self.path, self.geometry, self.note)
        loaded = place(rescale(stored), self.preprocess)
        return record_of(self.id, self.patient, self.report, self.findings, loaded, self.file,
                         scan=self.scan, version=self.version, slope=stored.slope,
                         intercept=stored.intercept)


def plan_ct_rate(root: Path, options: Options, preprocess: Preprocess, compression: str) -> Plan:
    """Joins the files of a CT-RATE tree to its tables by name; see `builders.build_ct_rate`.

    Raises:
        UserError: the tree or a table is unusable as a whole, or an option is unknown.
    """
    _check_options(options)
    data = root / "dataset" if (root / "dataset").is_dir() else root
    folders = _folders(root, data, options.version)
    tasks: list[CtRateTask] = []
    failures: list[Failure] = []
    unlisted: list[Failure] = []
    for split, version in folders.items():
        split_tasks = _plan_split(data, split, version, options, preprocess, failures, unlisted)
        tasks += _choose_twins(split_tasks, options.twins, unlisted)
    tasks.sort(key=lambda task: _order(task.id))
    request = {"source": "ct-rate", "folders": folders, **options._asdict(),
               "compression": compression, "preprocess": preprocess.as_dict()}
    return Plan(tasks, failures, unlisted, CT_RATE_18, request)


def _check_options(options: Options) -> None:
    for name, choices in (("version", VERSIONS), ("twins", TWINS),
                          ("official_valid", ("test", "valid"))):
        if getattr(options, name) not in choices:
            raise UserError(f"{name} {getattr(options, name)!r} is not known; choose one of "
                            f"{', '.join(choices)}")
    if not 0 <= options.holdout < 1:
        raise UserError(f"holdout={options.holdout} must be a share of the training patients from "
                        "0 to below 1")
    if options.holdout and options.official_valid == "valid":
        raise UserError("holdout makes a split valid of training patients, so the official valid "
                        "cannot have that name too; leave official_valid at test")


def _folders(root: Path, data: Path, version: str) -> dict[str, str]:
    """Returns {split: version} of the folders that are there; auto prefers the repaired one."""
    found = {}
    for split in _SPLITS:
        for choice in ("fixed", "v1") if version == "auto" else (version,):
            if (data / _FOLDERS[choice].format(split)).is_dir():
                found[split] = choice
                break
    if not found:
        versions = VERSIONS[1:] if version == "auto" else (version,)
        names = [_FOLDERS[choice].format(split) for split in _SPLITS for choice in versions]
        raise UserError(f"{root} has none of the folders {', '.join(names)}; give the folder that "
                        "holds CT-RATE's dataset/")
    return found


def _plan_split(data: Path, split: str, version: str, options: Options, preprocess: Preprocess,
                failures: list[Failure], unlisted: list[Failure]) -> list[CtRateTask]:
    """Plans an official split; what cannot be joined goes to `failures`, the rest to `unlisted`."""
    folder = _FOLDERS[version].format(split)
    files = _find(data, folder, unlisted)
    metadata = _Rows.read(data / _METADATA[split], _GEOMETRY)
    reports = _Rows.read(data / _REPORTS[split], (
        "Findings_EN", *(["Impressions_EN"] if options.impressions else [])))
    labels = _Rows.read(data / _LABELS.format(split), CT_RATE_18)
    no_chest = _no_chest(data / _NO_CHEST.format(split))
    known = {*metadata.rows, *reports.rows, *labels.rows}
    tasks = []
    for name in sorted({*files, *known}, key=_order):
        match = _NAME.fullmatch(name)
        scan = name.rsplit("_", 1)[0]
        paths = files.get(name, [])
        file = paths[0] if len(paths) == 1 else ""
        if name in no_chest or scan in no_chest:
            unlisted.append(Failure(name + _SUFFIX, file, f"left out: {_NO_CHEST.format(split)} "
                                    "lists it as no chest"))
            continue
        try:
            if not match or match["split"] != split:
                raise _Unusable(f"the name is not one of CT-RATE's {split} split")
            if not paths:
                raise _Unusable(f"there is no such file below {folder}; download it")
            if len(paths) > 1:
                raise _Unusable(f"{len(paths)} files have this name ({', '.join(paths[:3])}); keep "
                                "one")
            absent = [str(t.file.relative_to(data)) for t in (metadata, reports, labels)
                      if name not in t.rows]
            if absent:
                raise _Unusable(f"it has no row in {' and '.join(absent)}; download the tables "
                                "again, or leave the volume out")
            report = _report(reports.of(name))
            findings = labels.cells(name, lambda row: tuple(
                finding for finding in CT_RATE_18 if tables.flag(row, finding)))
            geometry, note = _geometry(metadata, name, version)
        except _Unusable as error:
            failures.append(Failure(name + _SUFFIX, file, str(error)))
            continue
        tasks.append(CtRateTask(
            split=_split(split, match["patient"], options), id=name + _SUFFIX,
            patient=match["patient"], scan=scan, report=report, findings=findings, file=file,
            path=str(data / file), version=version, geometry=geometry, note=note,
            preprocess=preprocess))
    return tasks


class _Unusable(Exception):  # noqa: N818
    """Why a volume cannot be planned."""


class _Rows(NamedTuple):
    """A table of CT-RATE by volume name, without suffix.

    Attributes:
        file: the table.
        rows: {name: [(row number, cells)]}.
    """

    file: Path
    rows: dict[str, list[tuple[int, dict[str, str]]]]

    @classmethod
    def read(cls, file: Path, columns: Sequence[str]) -> "_Rows":
        rows = defaultdict(list)
        for number, row in enumerate(tables.read_table(file, ["VolumeName", *columns]), start=1):
            rows[row["VolumeName"].removesuffix(_SUFFIX)].append((number, row))
        return cls(file, dict(rows))

    def of(self, name: str) -> dict[str, str]:
        found = self.rows[name]
        if len(found) > 1:
            raise _Unusable(f"{len(found)} rows of {self.file.name} have this name; keep one")
        return found[0][1]

    def cells(self, name: str, read: Any) -> Any:
        """What `read` makes of the row; a bad cell is named by table and row."""
        row = self.of(name)
        try:
            return read(row)
        except ValueError as error:
            raise _Unusable(f"row {self.rows[name][0][0]} of {self.file.name}: {error}") from error


def _find(data: Path, folder: str, unlisted: list[Failure]) -> dict[str, list[str]]:
    """Returns {volume name: paths below `data`} of a folder; other files are unlisted."""
    found: dict[str, list[str]] = defaultdict(list)
    for here, folders, names in os.walk(data / folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            file = (Path(here) / name).relative_to(data).as_posix()
            if name.endswith(_SUFFIX):
                found[name.removesuffix(_SUFFIX)].append(file)
            else:
                unlisted.append(Failure("", file, f"left out: no {_SUFFIX} file"))
    return dict(found)


def _no_chest(file: Path) -> set[str]:
    """Names of volumes and scans that show no chest; the list has paths, of which names count."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list of volumes without a chest {file} cannot be read ({error}); "
                        "download it, or make an empty file to keep every volume") from error
    return {line.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(_SUFFIX) for line in lines}


def _report(row: Mapping[str, str]) -> str:
    parts = [row[name] for name in ("Findings_EN", "Impressions_EN") if name in row]
    given = [part for part in parts if part.casefold() not in NO_REPORT]
    if not given:
        raise _Unusable("the report is empty (\"Not given.\")")
    return "\n".join(given)


def _geometry(metadata: _Rows, name: str, version: str) -> tuple[Geometry | None, str]:
    """Reads a volume's row; for the repaired version an incomplete row is only worth a note."""
    try:
        return metadata.cells(name, _parse_geometry), ""
    except _Unusable as error:
        if version == "v1":
            raise
        return None, f"not compared with the metadata: {error}"


def _parse_geometry(row: Mapping[str, str]) -> Geometry:
    slope, intercept = tables.number(row, "RescaleSlope"), tables.number(row, "RescaleIntercept")
    x, y = tables.numbers(row, "XYSpacing", 2)
    z = tables.number(row, "ZSpacing")
    if slope <= 0:
        raise ValueError(f"column 'RescaleSlope' is {slope:g}, not positive")
    if min(x, y) <= 0 or z == 0:
        raise ValueError(f"the voxel size {x:g}, {y:g}, {z:g} is not positive")
    if abs(x / y - 1) > _SPACING_TOLERANCE:
        # DICOM writes rows before columns, the table's name says x before y.
        raise ValueError(f"column 'XYSpacing' has two sizes, {x:g} and {y:g}, in an order that is "
                         "not known")
    axes = orientation.plane_axes(tables.numbers(row, "ImageOrientationPatient", 6))
    origin = tables.numbers(row, "ImagePositionPatient", 3)
    affine = orientation.affine_of(axes, (x, y, z), origin)
    shape = tuple(int(tables.number(row, column)) if row[column] else 0
                  for column in ("Columns", "Rows", "NumberofSlices"))
    return Geometry(slope, intercept, (x, y, abs(z)), tuple(map(tuple, affine.tolist())), shape)


def _split(official: str, patient: str, options: Options) -> str:
    if official == "valid":
        return options.official_valid
    return split_of(patient, {"valid": options.holdout, "train": 1 - options.holdout})


def _choose_twins(tasks: Sequence[CtRateTask], policy: str,
                  unlisted: list[Failure]) -> list[CtRateTask]:
    """Keeps one reconstruction of each scan, or all."""
    if policy == "all":
        return list(tasks)
    groups = defaultdict(list)
    for task in tasks:
        groups[task.scan].append(task)
    kept = []
    for scan, twins in groups.items():
        best = min(twins, key=lambda task: (_thickness(task) if policy == "thinnest" else 0,
                                            _order(task.id)))
        kept.append(best)
        unlisted += [Failure(task.id, task.file, f"left out: another reconstruction of {scan}, of "
                             f"which {best.id} is the {policy}") for task in twins
                     if task is not best]
    return kept


def _thickness(task: CtRateTask) -> float:
    return task.geometry.spacing[2] if task.geometry else float("inf")


def _order(name: str) -> tuple[Any, ...]:
    """Sorts volumes as people count: train_2 before train_10."""
    return tuple(int(part) if place % 2 else part
                 for place, part in enumerate(re.split(r"(\d+)", name)))


def _read_v1(path: str, geometry: Geometry) -> Stored:
    """Reads raw stored numbers and puts the table's geometry, slope and intercept on them."""
    stored = read_stored(path, np.asarray(geometry.affine))
    if (stored.slope, stored.intercept) != (1, 0):
        raise NotACT(path, f"its header has slope {stored.slope:g} and intercept "
                     f"{stored.intercept:g}, a file of version 1 has 1 and 0; download it again")
    differs = _other_shape(stored, geometry)
    if differs:
        raise NotACT(path, f"{differs}, so the row may belong to another series; download both "
                     "again")
    said = readings.Reading(geometry.slope, geometry.intercept)
    found = readings.readings_of(stored, said)
    if found != [said]:
        raise NotACT(path, f"it lies in a folder of version 1 and the metadata give it slope "
                     f"{said.slope:g} and intercept {said.intercept:g}, but its values "
                     f"{readings.describe(found)}; find out which is right, nothing is guessed")
    return stored._replace(slope=said.slope, intercept=said.intercept)


def _read_fixed(path: str, geometry: Geometry | None, note: str) -> Stored:
    """Reads HU with their repaired header and compares that with the table."""
    stored = read_stored(path)
    found = readings.readings_of(stored)
    if found != [readings.HU]:
        raise NotACT(path, "it lies in a folder of the repaired version, which is in HU, but its "
                     f"values {readings.describe(found)}; find out which is right, nothing is "
                     "guessed")
    if geometry is None:
        return stored._replace(warnings=(*stored.warnings, note))
    theirs = np.asarray(geometry.affine)
    mine = "".join(nib.aff2axcodes(stored.affine))
    if mine != "".join(nib.aff2axcodes(theirs)):
        raise NotACT(path, f"its header says that its axes run {mine}, the metadata say "
                     f"{''.join(nib.aff2axcodes(theirs))}, so left and right are unknown; find out "
                     "which is right, nothing is guessed")
    differs = _other_shape(stored, geometry)
    warnings = [differs] if differs else []
    spacing = np.linalg.norm(stored.affine[:3, :3], axis=0)
    if (np.abs(spacing / geometry.spacing - 1) > _SPACING_TOLERANCE).any():
        warnings.append(f"its voxel size {_numbers(spacing)} mm differs from the metadata's "
                        f"{_numbers(geometry.spacing)} mm; the header is used")
    cosines = (stored.affine[:3, :3] * theirs[:3, :3]).sum(axis=0)
    cosines /= spacing * geometry.spacing
    if cosines.min() < np.cos(_DIRECTION_TOLERANCE):
        warnings.append("its axes are turned by more than 6 degrees against the metadata's; the "
                        "header is used")
    return stored._replace(warnings=(*stored.warnings, *warnings))


def _other_shape(stored: Stored, geometry: Geometry) -> str:
    """Says how a file's size differs from the metadata's; "" if it does not."""
    names = ("columns", "rows", "slices")
    wrong = [f"{size} {name}, not {said}" for name, size, said in
             zip(names, stored.values.shape, geometry.shape, strict=True) if said and size != said]
    return f"it has {', '.join(wrong)} as in the metadata" if wrong else ""


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)
