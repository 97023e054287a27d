"""Builders: images and reports to a TFDS data set of array_record shards, resumable and parallel.

    build_phantom(out, train=1000, valid=100, test=200)
    build_folder(out, images=DIR, table=CSV)
    build_ct_rate(out, root=DIR)
    build_rad_chestct(out, root=DIR, mapping="brgsa")
    build_image2d(out, images=DIR, table=CSV), or build_image2d(out, root=DIR) of MIMIC-CXR

The result is a proper TFDS data set (`dataset_info.json`, `features.json`, one record per image,
`group_size:1` so that any record is read alone) plus `dataset.json` with the request, the
preprocess record and the fingerprints, `index_SPLIT.jsonl`, `failures.csv` and `warnings.csv`.
What goes in is planned in `data/plans.py` and its neighbours, how it gets there is in
`data/shards.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from brgsa_jax.config import UserError
from brgsa_jax.data import ctrate, mimic_cxr, plans, radchestct, radiographs, shards
from brgsa_jax.data.image2d import SIZE, Radiograph
from brgsa_jax.data.shards import BuildSummary
from brgsa_jax.data.volume import Preprocess


def build_phantom(out: str | Path, *, seed: int = 0, train: int = 0, valid: int = 0, test: int = 0,
                  shape: tuple[int, int, int] = (64, 64, 32), workers: int | None = None,
                  beam: Sequence[str] | None = None, compression: str = "none",
                  progress: bool = True) -> BuildSummary:
    """Builds a data set of synthetic chest CTs.

    Splits draw their patients from disjoint ranges, so enlarging one leaves the others as they are.

    Args:
        out: the folder to make.
        seed: of all patients.
        train, valid, test: patients per split.
        shape: voxels (X, Y, Z) over a field of view of 384 mm on each axis.
        workers: processes; by default one for each core this process may use. Scripts that use more
            than one need the usual `if __name__ == "__main__":` guard.
        beam: flags of an Apache Beam pipeline instead of processes; see `shards.build`.
        compression: "none", or "zstd" for a smaller folder that is several times slower to read.
        progress: whether to draw a progress bar on a terminal.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: no patients, or `out` holds something else.
    """
    plan, preprocess = plans.plan_phantom(
        seed, {"train": train, "valid": valid, "test": test}, shape, compression)
    return shards.build(out, plan, preprocess, workers=workers, beam=beam, progress=progress)


def build_folder(out: str | Path, *, images: str | Path, table: str | Path, id_column: str = "id",
                 report_column: str = "report", findings_column: str | None = None,
                 patient_column: str | None = None, series_column: str | None = None,
                 summaries: str | Path | None = None,
                 split: str | Mapping[str, float] = "train", preprocess: Preprocess | None = None,
                 workers: int | None = None, beam: Sequence[str] | None = None,
                 compression: str = "none", progress: bool = True) -> BuildSummary:
    """Builds a data set from a folder of volumes and a table of reports.

    Volumes are NIfTI, npz and npy files and folders of DICOM files. A row belongs to the one file
    below `images` whose name, or path below `images`, is its id, with or without extension; a
    folder of DICOM files answers to every part of its path, as long as one folder alone does. Ids
    are only looked up among what is found, never made into paths.
    A row without exactly one file, without a report ("Not given." counts as none), with a repeated
    id or with a file that is no usable CT becomes a row of failures.csv and the rest goes on.
    Files without a row follow there with the reason "no report row in the table".

    Args:
        out: the folder to make.
        images: searched with all its folders; hidden files are left out, links to folders not
            followed.
        table: CSV, TSV, JSON lines or Parquet, by suffix; see `tables.read_table`.
        id_column, report_column: names of columns.
        findings_column: column of canonical positive findings separated by ";"; empty means none.
        patient_column: column of the patient's id; by default every row is its own patient.
        series_column: column of the UID of the series to read of a DICOM folder that holds several.
        summaries: file of `brgsa summarize`, or any table with the columns id and findings, whose
            findings are taken instead of a column's. A row without a summary is a failure.
        split: "train", "valid" or "test" for all rows, or the share of each, e.g.
            {"train": 0.8, "valid": 0.1, "test": 0.1}. The hash of the patient decides, so a patient
            never lies in two splits and adding rows moves nobody.
        preprocess: the canonical grid; by default the reference's.
        workers: processes; by default one for each core this process may use. Scripts that use more
            than one need the usual `if __name__ == "__main__":` guard.
        beam: flags of an Apache Beam pipeline instead of processes; see `shards.build`.
        compression: "none", or "zstd" for a smaller folder that is several times slower to read.
        progress: whether to draw a progress bar on a terminal.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: the folder or table is unusable as a whole, no row is usable (failures.csv then
            says why), or `out` holds something else.
    """
    preprocess = preprocess or Preprocess()
    columns = plans.Columns(id_column, report_column, findings_column, patient_column,
                            series_column)
    plan = plans.plan_folder(Path(images), Path(table), columns, split, preprocess, compression,
                             None if summaries is None else Path(summaries))
    return shards.build(out, plan, preprocess, workers=workers, beam=beam, progress=progress)


def build_ct_rate(out: str | Path, *, root: str | Path, version: str = "auto", twins: str = "all",
                  impressions: bool = False, official_valid: str = "test", holdout: float = 0.0,
                  preprocess: Preprocess | None = None, workers: int | None = None,
                  beam: Sequence[str] | None = None, compression: str = "none",
                  progress: bool = True) -> BuildSummary:
    """Builds a data set from CT-RATE as it is downloaded.

    `root` holds `dataset/` with the volumes and the folders `metadata`,
    `radiology_text_reports` and `multi_abnormality_labels`. Splits that are not there are left out.
    Ids are the names in the tables ("valid_1_a_1.nii.gz"), findings the 18 labels, patients the
    first part of the name ("valid_1"). A volume without a file, a row in each of the three tables
    or a report is a row of failures.csv; so is one whose values, header and metadata disagree about
    HU or orientation. Volumes on the lists without a chest and twins not chosen follow there.

    Args:
        out: the folder to make.
        root: the downloaded tree.
        version: "v1" (raw numbers; slope, intercept, voxel size, position and directions come from
            the metadata), "fixed" (HU and header as they are, compared with the metadata), or
            "auto": for each split the repaired folder if it is there.
        twins: of several reconstructions of a scan keep "all", the "first" or the "thinnest". All
            have one report, which is how the objectives tell them from negatives.
        impressions: whether the impressions follow the findings in the report.
        official_valid: what the official validation split, on which published results are
            measured, becomes: "test" or "valid".
        holdout: share of the official training patients that becomes the split valid.
        preprocess: the canonical grid; by default the reference's.
        workers, beam, compression, progress: as for `build_folder`.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: the tree or a table is unusable as a whole, no volume is usable (failures.csv
            then says why), or `out` holds something else.
    """
    preprocess = preprocess or Preprocess()
    options = ctrate.Options(version, twins, impressions, official_valid, holdout)
    plan = ctrate.plan_ct_rate(Path(root), options, preprocess, compression)
    return shards.build(out, plan, preprocess, workers=workers, beam=beam, progress=progress)


def build_rad_chestct(out: str | Path, *, root: str | Path, mapping: str = "brgsa",
                      split: str = "test", preprocess: Preprocess | None = None,
                      workers: int | None = None, beam: Sequence[str] | None = None,
                      compression: str = "none", progress: bool = True) -> BuildSummary:
    """Builds a data set from RAD-ChestCT as it is downloaded.

    `root` holds the .npz volumes (in any folder), the label tables
    `img{train,valid,test}_Abnormality_and_Location_Labels.csv` and `CT_Scan_Metadata*.csv` or
    `Summary_3630.csv`, which have `NoteAcc_DEID`, `VolumeAcc_DEID` and `orig_orientation`. There
    are no reports: captions are made from the findings.

    Args:
        out: the folder to make.
        root: the downloaded files.
        mapping: "brgsa", "hlip" or "strict", or a YAML file of your own: which of the 84
            abnormalities make which finding. Results under different mappings are not comparable.
        split: "test" for all volumes, as published results are measured, or "official" for the
            release's own three.
        preprocess: the canonical grid; by default the reference's.
        workers, beam, compression, progress: as for `build_folder`.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: the files or the mapping are unusable as a whole, no volume is usable
            (failures.csv then says why), or `out` holds something else.
    """
    preprocess = preprocess or Preprocess()
    plan = radchestct.plan_rad_chestct(Path(root), mapping, split, preprocess, compression)
    return shards.build(out, plan, preprocess, workers=workers, beam=beam, progress=progress)


def build_image2d(out: str | Path, *, images: str | Path | None = None,
                  table: str | Path | None = None, root: str | Path | None = None,
                  reports: str | Path | None = None, id_column: str = "id",
                  report_column: str = "report", findings_column: str | None = None,
                  patient_column: str | None = None, summaries: str | Path | None = None,
                  views: Sequence[str] = mimic_cxr.VIEWS,
                  split: str | Mapping[str, float] | None = None, size: int = SIZE,
                  workers: int | None = None, beam: Sequence[str] | None = None,
                  compression: str = "none", progress: bool = True) -> BuildSummary:
    """Builds a data set of radiographs: from a folder and a table, or from MIMIC-CXR-JPG.

    With `images` and `table`, radiographs are PNG, JPEG and DICOM files; rows are joined to them as
    `build_folder` joins volumes. Every image has an id and a row of its own; images of one study
    repeat its report.

    With `root`, the layout is that of MIMIC-CXR-JPG: `files/p10/p10000032/s50414267/DICOM_ID.jpg`
    and the tables metadata, split and chexpert. Ids are dicom_ids, patients subject_ids, splits the
    official ones (validate becomes valid). Findings are CheXpert's with label 1; uncertain ones are
    not positive. The report is its impression, then its findings; one without either, or of fewer
    than three words, is a row of failures.csv, as is an image without file, report or a row in each
    table. Images of other views follow there.

    Args:
        out: the folder to make.
        images: folder of the radiographs, searched with all its folders.
        table: CSV, TSV, JSON lines or Parquet.
        root: the downloaded tree of MIMIC-CXR-JPG.
        reports: folder of the reports, where they do not lie in `root`'s `files`.
        id_column, report_column, findings_column, patient_column, summaries: as for `build_folder`.
        views: which ViewPositions of MIMIC-CXR to take.
        split: as for `build_folder`; MIMIC-CXR has its own.
        size: pixels of a side of the stored square.
        workers, beam, compression, progress: as for `build_folder`.

    Returns:
        The summary; `reused` when `out` already held this data set.

    Raises:
        UserError: the folder, tree or a table is unusable as a whole, no image is usable
            (failures.csv then says why), or `out` holds something else.
    """
    recipe = Radiograph(shape=(size, size))
    if root is not None and images is None and table is None:
        if split is not None:
            raise UserError("the splits of MIMIC-CXR are official; leave split out")
        if summaries is not None or findings_column is not None:
            raise UserError("the findings of MIMIC-CXR are CheXpert's; leave summaries and the "
                            "column of findings out, and name summaries in data.summaries when "
                            "training")
        plan = mimic_cxr.plan_mimic_cxr(Path(root), None if reports is None else Path(reports),
                                        views, recipe, compression)
    elif root is None and images is not None and table is not None:
        if reports is not None:
            raise UserError("a folder of reports belongs to MIMIC-CXR; leave reports out, the "
                            "table has them")
        columns = plans.Columns(id_column, report_column, findings_column, patient_column)
        plan = radiographs.plan_radiographs(Path(images), Path(table), columns, split or "train",
                                            recipe, compression,
                                            None if summaries is None else Path(summaries))
    else:
        raise UserError("radiographs need either images and table, or root of MIMIC-CXR; give one "
                        "of the two")
    return shards.build(out, plan, recipe, workers=workers, beam=beam, progress=progress)
