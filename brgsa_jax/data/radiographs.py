"""A folder of radiographs (PNG, JPEG, DICOM) with a table of reports; see `builders.build_image2d`.

Every file is an image of its own: several of one study have a row each and the same report. The
layout of MIMIC-CXR is planned in `data/mimic_cxr.py`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError
from brgsa_jax.data.dicom_file import is_dicom
from brgsa_jax.data.image2d import Radiograph, load_radiograph
from brgsa_jax.data.plans import (
    DICOM_SUFFIXES,
    Columns,
    FolderTask,
    Listing,
    add_names,
    plan_table,
    walk,
)
from brgsa_jax.data.shards import Plan

SUFFIXES = (".png", ".jpg", ".jpeg", *DICOM_SUFFIXES)


@dataclass(frozen=True)
class RadiographTask(FolderTask):
    """One radiograph with its report."""

    preprocess: Radiograph

    def make(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """See `records.Task`."""
        return radiograph_record(self.id, self.patient, self.report, self.findings, self.path,
                                 self.preprocess, file=self.file)


def radiograph_record(id_: str, patient: str, report: str, findings: Sequence[str], path: str,
                      recipe: Radiograph, **provenance: Any
                      ) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads a radiograph; returns what `records.Task.make` does.

    Raises:
        NotACT: the file is no usable radiograph.
    """
    return {"id": id_, "patient": patient, "report": report, "findings": tuple(findings),
            "volume": load_radiograph(path, recipe.shape[0]), "boxes": {},
            "spacing": recipe.spacing, "provenance": provenance}, ()


def plan_radiographs(images: Path, table: Path, columns: Columns,
                     split: str | Mapping[str, float], recipe: Radiograph,
                     compression: str, summaries: Path | None = None) -> Plan:
    """Joins the rows of a table to the radiographs of a folder; see `builders.build_image2d`.

    Raises:
        UserError: the folder or the table is unusable as a whole.
    """
    return plan_table(images, table, columns, split, recipe, compression, source="image2d",
                      find=_radiographs, task=RadiographTask, summaries=summaries)


def _radiographs(images: Path) -> Listing:
    """Finds the radiographs below a folder: by suffix, or without one by the marks of DICOM."""
    by_name: dict[str, set[str]] = defaultdict(set)
    found = []
    for here, names in walk(images):
        for name in names:
            bare = not Path(name).suffix and name != "DICOMDIR"
            if name.lower().endswith(SUFFIXES) or bare and is_dicom(images / here / name):
                found.append((here / name).as_posix())
                add_names(by_name, found[-1], SUFFIXES)
    if not found:
        raise UserError(f"{images} holds no radiograph ({', '.join(SUFFIXES)}, or DICOM without a "
                        "suffix); check --images")
    return Listing(dict(by_name), sorted(found))
