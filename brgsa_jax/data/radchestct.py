"""RAD-ChestCT from its downloaded files: npz volumes, wide label tables, a mapping of labels.

The axes of an array are told by the release's own code, rachellea/ct-volume-preprocessing: axis 2
runs along the rows of the slices, axis 1 down their columns, and axis 0 *against* the normal of the
slices, since they were sorted by falling position. With the orientation that this code demands of
every scan, (1,0,0,0,1,0), these are left, posterior and inferior, as the names of the release's
table of lung extrema say too (sup_axis0min, ant_axis1min, rig_axis2min). BrgSA's flip of axis 0 is
therefore right, and HLIP, which does not flip, reads the scans head first.

There are no reports; captions are made from the findings. See `builders.build_rad_chestct`.
"""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data import arrays, orientation, tables
from brgsa_jax.data.plans import file_state, record_of, shares_of, split_of
from brgsa_jax.data.records import Failure
from brgsa_jax.data.shards import Plan
from brgsa_jax.data.volume import Preprocess, place

MAPPINGS = Path(__file__).parent / "mappings"
OFFICIAL = "official"
_SPLITS = {"imgtrain": "train", "imgvalid": "valid", "imgtest": "test"}
_LABELS = "{}_Abnormality_and_Location_Labels.csv"
_METADATA = "CT_Scan_Metadata_Complete*.csv"
_NOTE, _VOLUME, _PATIENT = "NoteAcc_DEID", "VolumeAcc_DEID", "MRN_DEID"
_ORIENTATION = "orig_orientation"
_SUFFIX = ".npz"
_SPACING_MM = 0.8
_YES, _NO = {"1", "1.0", "True"}, {"0", "0.0", "False"}
_SOURCE = re.compile(r"(?P<abnormality>\w+)(@(?P<location>\w+))?")


class LabelMapping(NamedTuple):
    """Which of RAD-ChestCT's labels make which finding.

    Attributes:
        name, version: as the file states them.
        digest: of the file's bytes.
        findings: {finding: [(abnormality, its locations or None for any)]}, in the file's order.
    """

    name: str
    version: str
    digest: str
    findings: dict[str, list[tuple[str, tuple[str, ...] | None]]]


class _LabelRow(NamedTuple):
    """A row of a label table: its findings, or the problem with it."""

    split: str
    note: str
    findings: tuple[str, ...]
    problem: str


@dataclass(frozen=True)
class RadChestCtTask:
    """One volume of RAD-ChestCT; `cosines` is ImageOrientationPatient of its slices."""

    split: str
    id: str
    patient: str
    findings: tuple[str, ...]
    file: str
    path: str
    cosines: tuple[float, ...]
    preprocess: Preprocess

    def stamp(self) -> list[Any]:
        """See `records.Task`."""
        return [self.patient, self.findings, self.file, self.cosines, file_state(self.path)]

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        affine = affine_of_array(self.cosines)
        loaded = place(arrays.read_array(self.path, self.preprocess, affine), self.preprocess)
        return record_of(self.id, self.patient, "", self.findings, loaded, self.file)


def affine_of_array(cosines: Sequence[float]) -> np.ndarray:
    """Returns the affine of an array of the release, index to RAS+ millimetres; see the module.

    Args:
        cosines: six numbers, ImageOrientationPatient of the slices it was stacked from.

    Raises:
        ValueError: they are not two unit vectors at right angles.
    """
    row, column, normal = orientation.plane_axes(cosines).T
    axes = np.stack([-normal, column, row], axis=1)
    return orientation.affine_of(axes, (_SPACING_MM,) * 3, (0.0, 0.0, 0.0))


def read_mapping(mapping: str) -> LabelMapping:
    """Reads a mapping that comes with the package by its name, or any by its path.

    Raises:
        UserError: it is unknown or its YAML is not as documented; the message says where.
    """
    import yaml

    known = sorted(file.stem for file in MAPPINGS.glob("*.yaml"))
    path = MAPPINGS / f"{mapping}.yaml" if mapping in known else Path(mapping)
    try:
        text = path.read_bytes()
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UserError(f"the mapping {mapping} is neither one of {', '.join(known)} nor a file"
                        ) from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the mapping {path} is no readable YAML ({' '.join(str(error).split())})"
                        ) from error
    if not isinstance(content, dict) or not all(
            isinstance(content.get(key), str) for key in ("name", "version")):
        raise UserError(f"the mapping {path} must have a name and a version, both text in quotes")
    unknown = sorted(map(str, set(content) - {"name", "version", "source", "locations", "findings",
                                              "scores", "left_out"}))
    if unknown:
        raise UserError(f"the mapping {path} has an unknown key {unknown[0]!r}; choose among name, "
                        "version, source, locations, findings, scores, left_out")
    locations = _lists(path, "locations", content.get("locations") or {})
    findings = {finding: [_source(path, finding, text, locations) for text in sources]
                for finding, sources in _lists(path, "findings", content.get("findings")).items()}
    return LabelMapping(content["name"], content["version"],
                        hashlib.sha256(text).hexdigest()[:16], findings)


def _lists(path: Path, key: str, found: Any) -> dict[str, list[str]]:
    if not isinstance(found, dict) or (key == "findings" and not found) or not all(
            isinstance(name, str) and isinstance(items, list) and items
            and all(isinstance(item, str) for item in items) for name, items in found.items()):
        raise UserError(f"the mapping {path} must have {key} as names with lists of names")
    return found


def _source(path: Path, finding: str, text: str, locations: Mapping[str, Sequence[str]]
            ) -> tuple[str, tuple[str, ...] | None]:
    match = _SOURCE.fullmatch(text)
    if not match or (match["location"] and match["location"] not in locations):
        raise UserError(f"the mapping {path} has {text!r} under {finding!r}; write an abnormality, "
                        "or abnormality@group with a group of its locations")
    group = match["location"]
    return match["abnormality"], tuple(locations[group]) if group else None


def plan_rad_chestct(root: Path, mapping: str, split: str | Mapping[str, float],
                     preprocess: Preprocess, compression: str) -> Plan:
    """Joins volumes, labels and metadata by their ids; see `builders.build_rad_chestct`.

    Raises:
        UserError: the files, the mapping or the split are unusable as a whole.
    """
    shares = None if split == OFFICIAL else shares_of(split)
    labels = read_mapping(mapping)
    files = _find(root)
    metadata = _read_metadata(root)
    rows = list(_read_labels(root, labels))
    repeats = Counter(row.note for row in rows)
    homes, named = defaultdict(set), {row.note for row in rows}
    for row in rows:
        for scan in metadata.get(row.note, ()):
            homes[scan[_PATIENT]].add(row.split)
            named.add(scan[_VOLUME].removesuffix(_SUFFIX))
    tasks, failures, told = [], [], set()
    for row in rows:
        file = ""
        try:
            if repeats[row.note] > 1:
                raise _Unusable(f"{repeats[row.note]} rows of the label tables have this id; keep "
                                "one")
            scan, cosines = _scan(metadata, row.note)
            file = _file(files, scan[_VOLUME])
            if row.problem:
                raise _Unusable(row.problem)
            patient = scan[_PATIENT]
            if not shares and len(homes[patient]) > 1:
                raise _Unusable(f"its patient {patient} has scans in several official splits "
                                f"({', '.join(sorted(homes[patient]))}); split by shares instead")
        except _Unusable as error:
            if row.note not in told:
                failures.append(Failure(row.note, file, str(error)))
            told.add(row.note)
            continue
        tasks.append(RadChestCtTask(
            split=split_of(patient, shares) if shares else row.split, id=row.note, patient=patient,
            findings=row.findings, file=file, path=str(root / file), cosines=cosines,
            preprocess=preprocess))
    unlisted = [Failure("", file, "no row in the label tables") for name, paths in files.items()
                if name not in named for file in paths]
    request = {"source": "rad-chestct", "split": shares or OFFICIAL, "compression": compression,
               "mapping": [labels.name, labels.version, labels.digest],
               "preprocess": preprocess.as_dict()}
    return Plan(sorted(tasks, key=lambda task: task.id), failures, sorted(unlisted),
                tuple(labels.findings), request)


class _Unusable(Exception):  # noqa: N818
    """Why a volume cannot be planned."""


def _find(root: Path) -> dict[str, list[str]]:
    """Returns {name without suffix: paths below `root`} of the volumes."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; check --root")
    found = defaultdict(list)
    for here, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.endswith(_SUFFIX) and not name.startswith("."):
                found[name.removesuffix(_SUFFIX)].append(
                    (Path(here) / name).relative_to(root).as_posix())
    if not found:
        raise UserError(f"{root} holds no {_SUFFIX} volume; check --root")
    return dict(found)


def _read_metadata(root: Path) -> dict[str, list[dict[str, str]]]:
    """Returns {note id: rows} of the scans' metadata."""
    found = sorted(root.rglob(_METADATA))
    if len(found) != 1:
        raise UserError(f"{root} holds {len(found) or 'no'} {_METADATA}, of which one is needed "
                        "for ids, patients and orientations; "
                        + ("keep one" if found else "download it"))
    rows = defaultdict(list)
    for row in tables.read_table(found[0], [_NOTE, _VOLUME, _PATIENT, _ORIENTATION]):
        rows[row[_NOTE]].append(row)
    return dict(rows)


def _file(files: Mapping[str, list[str]], volume: str) -> str:
    paths = files.get(volume.removesuffix(_SUFFIX), [])
    if len(paths) != 1:
        raise _Unusable(f"{len(paths)} files are named {volume}; keep one" if paths else
                        f"there is no file {volume}; download it")
    return paths[0]


def _scan(metadata: Mapping[str, list[dict[str, str]]], note: str
          ) -> tuple[dict[str, str], tuple[float, ...]]:
    """The metadata of a scan and its orientation."""
    rows = metadata.get(note, [])
    if len(rows) != 1:
        raise _Unusable(f"{len(rows) or 'no'} rows of the metadata have this id; "
                        + ("keep one" if rows else "download the table again"))
    row = rows[0]
    missing = [column for column in (_VOLUME, _PATIENT, _ORIENTATION) if not row[column]]
    if missing:
        raise _Unusable(f"its row of the metadata has no {missing[0]}")
    try:
        cosines = tables.numbers({_ORIENTATION: f"[{row[_ORIENTATION]}]"}, _ORIENTATION, 6)
        affine_of_array(cosines)
    except ValueError as error:
        raise _Unusable(f"its orientation in the metadata is not known: {error}") from error
    return row, cosines


def _read_labels(root: Path, labels: LabelMapping) -> Iterator[_LabelRow]:
    """Yields every row of the label tables with what the mapping makes of it.

    A finding is there if any of its columns is: the tables have one for each abnormality and
    location. They are read row by row, since they have thousands of columns.
    """
    files = {split: sorted(root.rglob(_LABELS.format(name))) for name, split in _SPLITS.items()}
    if not any(files.values()):
        raise UserError(f"{root} holds no {_LABELS.format('img*')}; download the label tables")
    for split, found in files.items():
        for file in found:
            with tables.open_rows(file) as (columns, rows):
                name = tables.find_columns(file, columns, [_NOTE])[_NOTE]
                places = {finding: _places(file, columns, finding, sources)
                          for finding, sources in labels.findings.items()}
                for number, cells in enumerate(rows, start=1):
                    bad = [p for wanted in places.values() for p in wanted
                           if cells[p] not in _YES and cells[p] not in _NO]
                    problem = (f"row {number} of {file.name}: column {columns[bad[0]]!r} is "
                               f"{cells[bad[0]][:40]!r}, not 0 or 1") if bad else ""
                    present = tuple(finding for finding, wanted in places.items()
                                    if any(cells[p] in _YES for p in wanted))
                    yield _LabelRow(split, cells[name], present, problem)


def _places(file: Path, columns: Sequence[str], finding: str,
            sources: Sequence[tuple[str, tuple[str, ...] | None]]) -> list[int]:
    """Positions of all columns of a finding; an abnormality without any is an error."""
    positions = []
    for abnormality, locations in sources:
        found = [position for position, column in enumerate(columns)
                 if column.split("*")[0] == abnormality
                 and (locations is None or column.partition("*")[2] in locations)]
        if not found:
            raise UserError(f"{file} has no column {abnormality}*… for {finding!r}; check the "
                            "mapping")
        positions += found
    return positions
