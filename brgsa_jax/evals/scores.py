"""Zero-shot scores from embeddings, and score and label tables as CSV, always joined by id."""

import csv
import io
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from brgsa_jax.config import UserError
from brgsa_jax.data.tables import quoted, unquoted

SCORE_MODES = ("direct", "bridged", "image_bridged", "text_bridged", "mean")
"""cos(v,t), cos(v̂,t̂), cos(v̂,t), cos(v,t̂), and the average of direct and image_bridged."""

_TRUE = {"1", "1.0", "true"}
_FALSE = {"0", "0.0", "false"}


class ScoreTable(NamedTuple):
    """Scores of a file: `values` is [N,P] for N ids and P names."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray


class LabelTable(NamedTuple):
    """Labels of a file: `values` is [N,P] bool; `patients` has N entries, or is None."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray
    patients: tuple[str, ...] | None


def unit(x: np.ndarray) -> np.ndarray:
    """L2-normalises the rows of x[N,D] in float64; a zero row stays zero.

    Raises:
        UserError: an entry is not finite.
    """
    x = np.asarray(x, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=-1))
    if bad.size:
        raise UserError(f"{bad.size} of {len(x)} embeddings are not finite, the first in row "
                        f"{bad[0]}; the model has diverged, so use an earlier checkpoint")
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


def cosine(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns the cosines [N,P] of image[N,D] with text[P,D], in float64."""
    return unit(image) @ unit(text).T


def score_matrix(image: np.ndarray, text: np.ndarray, image_bridged: np.ndarray | None = None,
                 text_bridged: np.ndarray | None = None, mode: str = "mean") -> np.ndarray:
    """Zero-shot scores of one mode (BrgSA: S = ½[cos(v,t) + cos(v̂,t)] is "mean").

    Args:
        image: v, [N,D], un-normalised.
        text: t, [P,D].
        image_bridged: v̂, [N,D], or None for a model without a bank.
        text_bridged: t̂, [P,D], or None.
        mode: one of `SCORE_MODES`.

    Returns:
        [N,P] float64.

    Raises:
        UserError: the mode is unknown or needs a bridged embedding that is None.
    """
    scores = all_scores(image, text, image_bridged, text_bridged)
    if mode not in scores:
        raise UserError(f"the score {mode!r} is not available here; choices: "
                        f"{', '.join(scores)}")
    return scores[mode]


def all_scores(image: np.ndarray, text: np.ndarray, image_bridged: np.ndarray | None = None,
               text_bridged: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every score mode that the given embeddings allow, in the order of `SCORE_MODES`.

    Args and shapes as in `score_matrix`; without bridged embeddings only "direct" is there.
    """
    found = {"direct": cosine(image, text)}
    if image_bridged is not None:
        found["image_bridged"] = cosine(image_bridged, text)
        found["mean"] = 0.5 * (found["direct"] + found["image_bridged"])
    if text_bridged is not None:
        found["text_bridged"] = cosine(image, text_bridged)
    if image_bridged is not None and text_bridged is not None:
        found["bridged"] = cosine(image_bridged, text_bridged)
    return {mode: found[mode] for mode in SCORE_MODES if mode in found}


def protocol_scores(protocol: Any, embeddings: Any) -> dict[str, np.ndarray]:
    """Scores of a protocol's findings under every score mode the embeddings allow.

    The score of a finding is the mean over its positive prompts. With the contrast "softmax" it is
    the softmax of that mean and the one over its negative prompts at the protocol's temperature,
    P(positive) = 1 / (1 + exp((s₋ − s₊) / τ)). A combined finding has the largest score of its
    parts.

    Args:
        protocol: a `protocol.Protocol`.
        embeddings: an `evaluate.Embeddings`, its prompts [T,D] those of `protocol.texts`.

    Returns:
        {mode: [N,P]} in the order of `SCORE_MODES` and of `protocol.findings`.
    """
    modes = all_scores(embeddings.image, embeddings.prompts, embeddings.image_bridged,
                       embeddings.prompts_bridged)
    return {mode: _finding_scores(protocol, cosines) for mode, cosines in modes.items()}


def _finding_scores(protocol: Any, cosines: np.ndarray) -> np.ndarray:
    """Scores [N,P] of the findings from those of the texts, [N,T]."""
    row = {text: number for number, text in enumerate(protocol.texts)}

    def mean(column: str, side: str) -> np.ndarray:
        return cosines[:, [row[text] for text in protocol.sentences(column, side)]].mean(axis=1)

    scores = {column: mean(column, "positive") for column in protocol.columns}
    if protocol.contrast == "softmax":
        scores = {column: expit((score - mean(column, "negative")) / protocol.temperature)
                  for column, score in scores.items()}
    return np.stack([np.max([scores[part] for part in protocol.combine.get(name, (name,))], axis=0)
                     for name in protocol.findings], axis=1)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes the file whole or not at all; makes the folder above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scores(path: str | Path, ids: Sequence[str], names: Sequence[str],
                 scores: np.ndarray) -> None:
    """Writes `id,NAME,…` with full float precision.

    Text that a spreadsheet would run as a formula is quoted by a leading apostrophe, which
    `read_scores` takes away again.

    Args:
        path: the CSV file.
        ids: N ids, each once.
        names: P finding or prompt names, each once.
        scores: [N,P], finite.

    Raises:
        UserError: repeated ids or names, or scores that are not finite.
        ValueError: shapes that do not fit.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(ids), len(names)):
        raise ValueError(f"scores of shape {scores.shape} for {len(ids)} ids and "
                         f"{len(names)} names")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise UserError(f"scores of {ids[row]!r} are not finite, so {path} was not written; "
                        "check the model and the volume")
    rows = [[repr(float(value)) for value in row] for row in scores]
    _write_table(path, ["id", *names], ids, rows)


def write_labels(path: str | Path, ids: Sequence[str], names: Sequence[str], labels: np.ndarray,
                 patients: Sequence[str] | None = None) -> None:
    """Writes `id[,patient],NAME,…` with labels[N,P] as 0 and 1; quoting as in `write_scores`."""
    rows = [[str(int(value)) for value in row] for row in np.asarray(labels, dtype=bool)]
    header = ["id", *names]
    if patients is not None:
        header.insert(1, "patient")
        rows = [[quoted(str(patient)), *row] for patient, row in zip(patients, rows, strict=True)]
    _write_table(path, header, ids, rows)


def read_scores(path: str | Path) -> ScoreTable:
    """Reads a score file: first column the id, every other column a score.

    Raises:
        UserError: no such file, ragged rows, repeated or empty ids or names, or a cell that is
            not a finite number; the message names file, line and column.
    """
    header, rows = _read_table(path)
    values = np.empty((len(rows), len(header) - 1))
    for index, (line, cells) in enumerate(rows):
        for column, cell in enumerate(cells[1:]):
            try:
                # Python also reads digits of other scripts, and 1_000.
                value = float(cell) if cell.isascii() and "_" not in cell else math.nan
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UserError(f"{path} line {line}, column {header[column + 1]!r}: {cell!r} is "
                                "not a finite number; every column after the id must be a score")
            values[index, column] = value
    return ScoreTable(tuple(cells[0] for _, cells in rows), tuple(header[1:]), values)


def read_labels(path: str | Path, names: Sequence[str] | None = None,
                patients: str | None = None) -> LabelTable:
    """Reads a label file: first column the id, then 0/1 or True/False columns by name.

    Args:
        path: the CSV file.
        names: the columns to take, in this order; None takes all but id and patients.
        patients: the column that tells which rows belong to one patient.

    Raises:
        UserError: a missing column, or a cell that is neither 0 nor 1; otherwise as
            `read_scores`.
    """
    header, rows = _read_table(path)
    columns = {name: index for index, name in enumerate(header) if index}
    wanted = [name for name in columns if name != patients] if names is None else list(names)
    missing = [name for name in (*wanted, *([patients] if patients else [])) if name not in columns]
    if missing:
        raise UserError(f"{path} has no column {', '.join(map(repr, missing[:5]))}"
                        f"{' …' if len(missing) > 5 else ''}; its columns are "
                        f"{', '.join(header[1:])}")
    values = np.empty((len(rows), len(wanted)), dtype=bool)
    for index, (line, cells) in enumerate(rows):
        for position, name in enumerate(wanted):
            cell = cells[columns[name]].strip().lower()
            if cell not in _TRUE and cell not in _FALSE:
                raise UserError(f"{path} line {line}, column {name!r}: {cell!r} is neither 0 nor "
                                "1; decide uncertain and missing labels before judging scores")
            values[index, position] = cell in _TRUE
    owners = None
    if patients:
        owners = tuple(cells[columns[patients]] for _, cells in rows)
        if len(rows) > 2 and {owner.lower() for owner in owners} <= _TRUE | _FALSE:
            raise UserError(f"{path} holds only 0 and 1 in column {patients!r}, which is that of "
                            "a label; give the column that names the patients")
        blank = [line for (line, _), owner in zip(rows, owners, strict=True) if not owner]
        if blank:
            raise UserError(f"{path} line {blank[0]} names no patient in column {patients!r}; "
                            "fill it, or leave out the patients column")
    return LabelTable(tuple(cells[0] for _, cells in rows), tuple(wanted), values, owners)


def join(scores: ScoreTable, labels: LabelTable) -> LabelTable:
    """Brings labels into the row order of the scores, by id.

    Raises:
        UserError: an id of one table is not in the other; counts and first names are told.
    """
    position = {key: row for row, key in enumerate(labels.ids)}
    known = set(scores.ids)
    unlabelled = [key for key in scores.ids if key not in position]
    unscored = [key for key in labels.ids if key not in known]
    if unlabelled or unscored:
        parts = [f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
                 for keys, what in ((unlabelled, "scored ids have no labels"),
                                    (unscored, "labelled ids have no scores")) if keys]
        # A letter and its accent are one character or two, and look the same.
        composed = [{unicodedata.normalize("NFC", key) for key in keys}
                    for keys in (unlabelled, unscored)]
        if composed[0] & composed[1]:
            parts.append("some of them differ only in how accents are stored (Unicode NFC and NFD)")
        raise UserError(f"scores and labels do not cover the same ids: {' and '.join(parts)}; "
                        "bring both tables to the same rows, or judge the common ids with "
                        "--allow-missing")
    rows = [position[key] for key in scores.ids]
    patients = None if labels.patients is None else tuple(labels.patients[r] for r in rows)
    return LabelTable(scores.ids, labels.names, labels.values[rows], patients)


def _repeated(items: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return list(dict.fromkeys(item for item in items if item in seen or seen.add(item)))


def _write_table(path: str | Path, header: Sequence[str], ids: Sequence[str],
                 rows: Sequence[Sequence[str]]) -> None:
    for what, items in (("id", list(ids)), ("column", list(header))):
        repeated = _repeated(items)
        if repeated:
            raise UserError(f"{path} was not written because the {what} {repeated[0]!r} comes "
                            "more than once; make each one unique")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([quoted(str(name)) for name in header])
    for key, row in zip(ids, rows, strict=True):
        writer.writerow([quoted(str(key)), *row])
    write_atomic(path, buffer.getvalue())


def _read_table(path: str | Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header and (line number, cells) of every row, with text un-quoted."""
    path = Path(path)
    try:
        # Spreadsheets write a byte-order mark, which utf-8-sig takes away.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give the path of a CSV "
                        "file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file: {error}; save it as one") from error
    if not lines:
        raise UserError(f"{path} is empty; its first line must name the columns, id first")
    header = [unquoted(cell.strip()) for cell in lines[0][1]]
    if len(header) < 2:
        raise UserError(f"{path} has only the column {header[0][:60]!r}; expected an id and at "
                        "least one more, separated by commas"
                        + (", not by semicolons" if ";" in header[0] else ""))
    repeated = _repeated(header)
    if repeated:
        raise UserError(f"{path} has the column {repeated[0]!r} more than once; remove one")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path} line {line} has {len(cells)} cells where the header has "
                            f"{len(header)}; mend that row")
        cells = [unquoted(cell.strip()) for cell in cells]
        if not cells[0]:
            raise UserError(f"{path} line {line} has an empty id; every row needs one")
        rows.append((line, cells))
    if not rows:
        raise UserError(f"{path} has a header and no rows; there is nothing to judge")
    repeated = _repeated([cells[0] for _, cells in rows])
    if repeated:
        raise UserError(f"{path} has the id {repeated[0]!r} more than once ({len(repeated)} ids "
                        "repeated); keep one row for each")
    return header, rows


def columns(table: ScoreTable, names: Sequence[str]) -> np.ndarray:
    """Returns the scores [N,len(names)] of the named columns.

    Raises:
        UserError: a name is not there.
    """
    missing = [name for name in names if name not in table.names]
    if missing:
        raise UserError(f"the scores have no column {', '.join(map(repr, missing[:5]))}"
                        f"{' …' if len(missing) > 5 else ''}; their columns are "
                        f"{', '.join(table.names)}")
    return table.values[:, [table.names.index(name) for name in names]]


def write_all_scores(folder: str | Path, ids: Sequence[str], names: Sequence[str],
                     scores: Mapping[str, np.ndarray], mode: str) -> list[Path]:
    """Writes scores.csv of the protocol's mode and scores_MODE.csv of every other one.

    Each file is complete by itself, so that `brgsa metrics` can judge any of them.

    Returns:
        The files written, scores.csv first.
    """
    folder = Path(folder)
    files = []
    for name in (mode, *(other for other in scores if other != mode)):
        files.append(folder / ("scores.csv" if name == mode else f"scores_{name}.csv"))
        write_scores(files[-1], ids, names, scores[name])
    return files
