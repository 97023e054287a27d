"""Whether a built data set can be trusted: one pass over its records, and what they say.

    quality = check("data/ct-rate")
    write_page(quality, "check.html")  # evals/quality_page.py

`evals/quality_scan.py` reads, the `quality_*` files beside it judge, this one puts it together.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from brgsa_jax.config import UserError
from brgsa_jax.data.image2d import Radiograph
from brgsa_jax.data.sources import (
    DATASET_FILE,
    Source,
    chain_digests,
    index_file,
    open_source,
    read_dataset_file,
    splits,
)
from brgsa_jax.data.volume import Preprocess
from brgsa_jax.evals import quality_checks, quality_duplicates, quality_texts
from brgsa_jax.evals.quality_checks import ERROR, INFO, LOOK, Problem
from brgsa_jax.evals.quality_scan import Progress, Scale, scan
from brgsa_jax.evals.volume_picture import Window, radiograph_picture, volume_picture

_FIELDS = {"source": str, "builder_version": str, "fingerprint": str, "preprocess": dict,
           "request": dict, "findings": list, "failed": int, "unlisted": int, "splits": dict}
MOST_PICTURES = 9  # Of one kind.
_WINDOW = Window("", -350.0, 1300.0)  # Lung and soft tissue in one picture.


@dataclass(frozen=True)
class Quality:
    """What `check` found.

    Attributes:
        name: of the data set's folder.
        problems: the gravest first.
        facts: what the set is: source, recipe, counts, fingerprint.
        records: damaged records.
        leakage: patients in several splits, repeated ids.
        duplicates: groups of identical and nearly identical volumes, and of identical reports.
        values: histograms, classes of voxels, outliers.
        geometry: voxel sizes and orientations of the source files.
        view: padding, and where the box cuts the body.
        build: failures and warnings by reason.
        captions: lengths of reports and prevalence of findings.
        pictures: {"SPLIT POSITION": PNG bytes} of the records worth a look.
    """

    name: str
    problems: tuple[Problem, ...]
    facts: dict[str, Any]
    records: dict[str, Any]
    leakage: dict[str, Any]
    duplicates: dict[str, Any]
    values: dict[str, Any]
    geometry: dict[str, Any]
    view: dict[str, Any]
    build: dict[str, Any]
    captions: dict[str, Any]
    pictures: Mapping[str, bytes]

    def count(self, severity: str) -> int:
        """Returns the number of problems of a severity: "error", "look" or "info"."""
        return sum(problem.severity == severity for problem in self.problems)

    @property
    def passed(self) -> bool:
        """Whether there is no error."""
        return not self.count(ERROR)

    def as_dict(self) -> dict[str, Any]:
        """Returns all but the pictures as JSON types."""
        content = {field.name: getattr(self, field.name) for field in fields(self)
                   if field.name != "pictures"}
        return {"passed": self.passed, **content,
                "problems": [problem._asdict() for problem in self.problems]}


def check(path: str | Path, *, workers: int | None = None, verify: bool = True,
          progress: Progress | None = None) -> Quality:
    """Reads every record of a data set once and judges what it finds.

    Args:
        path: the data set's folder.
        workers: processes; by default one for each core this process may use, none for small sets.
            Scripts that use more than one need the usual `if __name__ == "__main__":` guard.
        verify: whether to compare every record with the digest it was built with.
        progress: called with the numbers of records done and in all.

    Returns:
        The findings; damage of single records is among them, not raised.

    Raises:
        UserError: the folder holds no finished data set, or its index is damaged.
    """
    path = Path(path)
    dataset, opened = _open(path)
    recipe = dataset["preprocess"]
    scale = Scale.of(recipe)
    found = scan(opened, scale, workers=workers, verify=verify, progress=progress)
    records = found.measured
    sections = {
        "records": quality_duplicates.damage(found.damaged, verify),
        "leakage": quality_duplicates.leakage(opened),
        "duplicates": quality_duplicates.duplicates(opened, records, scale),
        "values": quality_checks.values(records, scale),
        "geometry": quality_checks.geometry(records),
        "view": quality_checks.field_of_view(records, recipe["spacing"], recipe["shape"]),
        "build": quality_texts.build(records, path, dataset, scale.noun),
        "captions": quality_texts.captions(records, dataset["findings"])}
    order = (ERROR, LOOK, INFO)
    problems = sorted((p for section in sections.values() for p in section.problems),
                      key=lambda problem: order.index(problem.severity))
    contents = {name: section.content for name, section in sections.items()}
    return Quality(name=path.resolve().name, problems=tuple(problems),
                   facts=_facts(path, dataset, opened), pictures=_pictures(opened, contents),
                   **contents)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Opens all splits, and compares their indices with the fingerprints of the set.

    Raises:
        UserError: it is no finished data set, or its index is damaged.
    """
    dataset = read_dataset_file(path)
    try:
        for name, kind in _FIELDS.items():
            if not isinstance(dataset[name], kind):
                raise ValueError(f"{name} is {dataset[name]!r}")
        "".join(dataset["findings"])  # Refuses all but texts.
        recipe = Radiograph if dataset["preprocess"].get("kind") == "radiograph" else Preprocess
        dataset["preprocess"] = recipe.from_dict(dataset["preprocess"]).as_dict()
        opened = {split: open_source(path, split) for split in splits(path)}
        sum(map(len, opened.values()))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / DATASET_FILE} is damaged ({error!r}); copy the folder again or "
                        "build it anew") from error
    for split, source in opened.items():
        _check_index(path / index_file(split), source)
    return dataset, opened


def _check_index(file: Path, source: Source) -> None:
    try:
        intact = (len(source.index) == len(source) and source.fingerprint
                  == chain_digests(source.split, (row.digest for row in source.index)))
        texts = [text for row in source.index for text in (row.id, row.patient, *row.findings)]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); copy the folder again or build it "
                        "anew") from error
    if not intact or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file} is not what was built; copy the folder again or build it anew")


def _facts(path: Path, dataset: Mapping[str, Any], opened: Mapping[str, Source]) -> dict[str, Any]:
    written = (path / DATASET_FILE).stat().st_mtime
    rows = [row for source in opened.values() for row in source.index]
    return {
        "source": dataset["source"], "phantom": dataset["source"] == "phantom",
        "splits": {split: {"volumes": len(source),
                           "patients": len({row.patient for row in source.index})}
                   for split, source in opened.items()},
        "volumes": len(rows), "patients": len({row.patient for row in rows}),
        "findings": list(dataset["findings"]), "preprocess": dataset["preprocess"],
        "request": dataset["request"], "builder_version": dataset["builder_version"],
        "fingerprint": dataset["fingerprint"],
        "bytes": sum(file.stat().st_size for file in path.glob("*.array_record*")),
        "written": datetime.date.fromtimestamp(written).isoformat(),
        "checked": datetime.date.today().isoformat()}


def picture_key(place: Mapping[str, Any]) -> str:
    """The key of a record among `Quality.pictures`: an id may be there twice, a place only once."""
    return f"{place['split']} {place['position']}"


def _pictures(opened: Mapping[str, Source], contents: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws the records that the page asks to look at."""
    lists = [*(contents["values"].get(name, []) for name in ("empty", "saturated", "outliers")),
             contents["build"]["not_a_chest"], contents["view"].get("cut", [])]
    asked = [place for listed in lists for place in listed[:MOST_PICTURES]]
    asked += [place for name in ("identical", "near")
              for group in contents["duplicates"][name][:MOST_PICTURES // 2]
              for place in group["members"][:2]]
    return {key: _picture(opened[place["split"]].item(place["position"]))
            for key, place in {picture_key(place): place for place in asked}.items()}


def _picture(item: Mapping[str, Any]) -> bytes:
    if item["volume"].ndim == 2:
        return radiograph_picture(item["volume"])
    return volume_picture(item["volume"], item["spacing"], windows=(_WINDOW,), width=600)
