"""From a model and a data set to an evaluation: embed the volumes once, then score."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.recipe import centre, check_recipe, grid_text
from brgsa_jax.data.tokenizer import draw, sentences_of
from brgsa_jax.evals.cache import Cache
from brgsa_jax.evals.evaluate import Embeddings, Evaluation, evaluate, judge, write_evaluation
from brgsa_jax.evals.heatmap import Directions, mapper, overlay
from brgsa_jax.evals.localisation import finding_directions, localise_source
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.protocol_checks import CLASSIFIER, SIDES
from brgsa_jax.evals.report import (
    ModelResult,
    ReportData,
    choose_samples,
    describe_environment,
    sample_case,
    write_report,
)
from brgsa_jax.evals.scans import chosen_rows, count_scans, excluded_ids, scan_of
from brgsa_jax.evals.volume_picture import LUNG, radiograph_picture, volume_picture
from brgsa_jax.losses.knowledge import read_bank


class Cases(NamedTuple):
    """A split without its volumes.

    Attributes:
        ids, patients: N each.
        findings: canonical findings of every volume.
        names: P names of the labels' columns.
        labels: [N, P] bool.
    """

    ids: list[str]
    patients: list[str]
    findings: list[tuple[str, ...]]
    names: tuple[str, ...]
    labels: np.ndarray


def bridge(model: Any, x: np.ndarray) -> np.ndarray | None:
    """Reads x [N, D] from the model's bank: x̂ [N, D]; None for a model without a bank."""
    if model.bank is None:
        return None
    read = jax.jit(functools.partial(read_bank, scale=model.config.bank.scale))
    return np.asarray(read(x, model.bank).reconstruction)


def evaluate_model(model: Any, source: Any, protocol: Protocol, *,
                   normal_caption: str = "There is no abnormality",
                   batch_size: int = 16, cache: Cache | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """Evaluates a model on a split: zero-shot, or by its classifier where it has one.

    Args:
        model: a `model.Model`.
        source: the split; every record carries its canonical findings.
        protocol: findings, prompts, score.
        normal_caption: stands for the report of a volume without findings.
        batch_size: volumes encoded at once.
        cache: where embeddings are kept; None keeps none.
        progress: called with (volumes done, all volumes).

    Raises:
        UserError: empty split, volumes of another grid than the model's, labels of another
            mapping than the protocol's, or a classifier that lacks a finding of the protocol.
    """
    cases = read_cases(source, protocol)
    excluded_ids(protocol, cases.ids)
    check_recipe(source, model.config.input)
    if protocol.score == CLASSIFIER and not model.classes:
        raise UserError(f"the protocol {protocol.name!r} is for a classifier, and this model has "
                        "none; choose another protocol, or train one with the recipe finetune")
    if model.classes:
        protocol = classifier_protocol(protocol, model.classes)
    kind, function = (("probabilities", model.classify) if model.classes else
                      ("volumes", model.encode_volume))
    encode = functools.partial(_over_volumes, function, model, source, batch_size, progress)
    found = encode() if cache is None else cache.volumes(model, source, encode, kind)
    if progress is not None:
        progress(len(source), len(source))
    if model.classes:
        evaluation = judge_classifier(model.classes, found, cases, protocol)
    else:
        evaluation = evaluate_embedded(model, found, cases, protocol, cache=cache,
                                       normal_caption=normal_caption)
    data = describe_data(source, cases, protocol)
    return dataclasses.replace(evaluation, metrics={**evaluation.metrics, "data": data})


def classifier_protocol(protocol: Protocol, classes: Sequence[str]) -> Protocol:
    """The same protocol by the probabilities of a classifier, which reads no prompt.

    Raises:
        UserError: a finding of the protocol that is none of the classes.
    """
    missing = [name for name in protocol.columns if name not in classes]
    if missing:
        raise UserError(f"the model classifies {', '.join(classes[:5])}"
                        f"{' …' if len(classes) > 5 else ''}, and the protocol {protocol.name!r} "
                        f"needs {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} too; "
                        "choose another protocol, or train with model.classes of its findings")
    return dataclasses.replace(protocol, score=CLASSIFIER)


def judge_classifier(classes: Sequence[str], probabilities: np.ndarray, cases: Cases,
                     protocol: Protocol) -> Evaluation:
    """Judges probabilities [N, C] of a split's volumes; a combined finding has its parts' largest.

    Args:
        classes: names of the C columns.
        probabilities: of all volumes of the split.
        cases: of the same volumes.
        protocol: from `classifier_protocol`.
    """
    rows = chosen_rows(protocol, cases.ids)
    parts = [[classes.index(part) for part in protocol.combine.get(name, (name,))]
             for name in protocol.findings]
    scores = np.stack([probabilities[rows][:, part].max(axis=1) for part in parts], axis=1)
    columns = [cases.names.index(name) for name in protocol.findings]
    ids, patients = ([values[row] for row in rows] for values in (cases.ids, cases.patients))
    return judge(protocol, CLASSIFIER, ids, patients, cases.labels[rows][:, columns],
                 {CLASSIFIER: scores.astype(np.float64)}, {}, {})


def evaluate_embedded(model: Any, image: np.ndarray, cases: Cases, protocol: Protocol, *,
                      normal_caption: str, cache: Cache | None = None) -> Evaluation:
    """Scores volumes that are embedded already, [N, D]; see `evaluate_model`.

    Retrieval and the modality gap are those of captions with all findings of a volume, however
    many a model was trained with: other captions are other queries.
    """
    rows = chosen_rows(protocol, cases.ids)
    if not rows:
        raise UserError(f"the protocol {protocol.name!r} excludes every volume of the split; "
                        "shorten its list of exclusions")
    ids, patients = ([values[row] for row in rows] for values in (cases.ids, cases.patients))
    # In an order drawn by the volume's id: as in training, and the same for every model.
    drawn = [draw(sentences_of(cases.findings[row]), limit=0, normal=normal_caption,
                  rng=np.random.default_rng(zlib.crc32(cases.ids[row].encode())))
             for row in rows]
    captions = [" ".join(parts) for parts in drawn]
    texts = list(dict.fromkeys([*protocol.texts, *captions]))
    embedded = model.encode_text(texts) if cache is None else cache.texts(model, texts)
    place = {text: row for row, text in enumerate(texts)}
    prompts = embedded[:len(protocol.texts)]
    told = embedded[[place[text] for text in captions]]
    volumes = image[rows]
    embeddings = Embeddings(volumes, prompts, told, bridge(model, volumes), bridge(model, prompts),
                            bridge(model, told), [" ".join(sorted(parts)) for parts in drawn])
    return evaluate(protocol, ids=ids, patients=patients, findings=cases.names,
                    labels=cases.labels[rows], embeddings=embeddings)


def read_cases(source: Any, protocol: Protocol) -> Cases:
    """Reads ids, patients and labels of a split.

    A finding of the protocol that no volume has is negative for all; its AUROC is undefined. A
    combined finding is present where it or one of its parts is.

    Raises:
        UserError: the split is empty, has none of the protocol's findings, or has labels of
            another mapping than the protocol's.
    """
    if not len(source):
        raise UserError("the split to evaluate holds no volume; build the data set with one")
    mapping = source.metadata["request"].get("mapping")
    if protocol.labels and mapping and "-".join(mapping[:2]) != protocol.labels:
        raise UserError(f"the labels of {source.path} were made by the mapping "
                        f"{'-'.join(mapping[:2])}, the protocol {protocol.name!r} is for "
                        f"{protocol.labels}; build the data set with that mapping, or choose "
                        "another protocol")
    rows = source.index
    sources = {name: {name, *protocol.combine.get(name, ())} for name in protocol.findings}
    if not any(set(row.findings) & set().union(*sources.values()) for row in rows):
        raise UserError(f"no volume has a finding of the protocol {protocol.name!r}; build the "
                        "data set with a column of canonical findings, or choose another protocol")
    names = tuple(dict.fromkeys([*protocol.findings, *source.metadata["findings"]]))
    labels = np.array([[not sources.get(name, {name}).isdisjoint(row.findings) for name in names]
                       for row in rows])
    return Cases([row.id for row in rows], [row.patient for row in rows],
                 [row.findings for row in rows], names, labels)


def describe_data(source: Any, cases: Cases, protocol: Protocol) -> dict[str, Any]:
    """What was judged and how: the entry "data" of metrics.json."""
    metadata, rows = source.metadata, chosen_rows(protocol, cases.ids)
    judged = [cases.ids[row] for row in rows]
    return {"name": metadata["name"], "source": metadata["source"], "split": source.split,
            "fingerprint": source.fingerprint, "volumes_in_split": len(cases.ids),
            "volumes": len(judged), "scans": count_scans(judged),
            "patients": len({cases.patients[row] for row in rows}),
            "excluded": excluded_ids(protocol, cases.ids),
            "reconstructions": protocol.reconstructions, "classes": list(protocol.findings),
            "combine": protocol.combine, "captions": "all findings",
            "prompts": {} if protocol.score == CLASSIFIER else {
                column: {side: protocol.sentences(column, side) for side in SIDES}
                for column in protocol.columns},
            "mapping": metadata["request"].get("mapping")}


def embed_volumes(model: Any, source: Any, *, batch_size: int = 16,
                  progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Embeds all volumes of a split, or as much of radiographs as a model reads, to [N, D]."""
    return _over_volumes(model.encode_volume, model, source, batch_size, progress)


def _over_volumes(function: Callable[..., np.ndarray], model: Any, source: Any, batch_size: int,
                  progress: Callable[[int, int], None] | None) -> np.ndarray:
    """Rows that a function of the model makes of all volumes of a split, [N, …]."""
    parts = []
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        volumes = [centre(source[i]["volume"], model.shape) for i in range(start, stop)]
        # A last short batch is filled up, so that one shape is compiled.
        volumes += [volumes[-1]] * (batch_size - len(volumes))
        found = function(np.stack(volumes), batch_size=batch_size)
        parts.append(found[:stop - start])
        if progress is not None:
            progress(stop, len(source))
    return np.concatenate(parts)


# First findings of a report's sample patients whose heat-maps are drawn.
MAPPED = 2


class Candidate(NamedTuple):
    """A model to evaluate for a report.

    Attributes:
        name: short and unique; names its sub-folder.
        label: as the report shows it.
        model: a `model.Model`.
        history: rows of metrics.jsonl.
        untrained: drawn as the level the others start from.
    """

    name: str
    label: str
    model: Any
    history: list[dict[str, Any]]
    untrained: bool = False


def overlays_of(model: Any, protocol: Protocol, cache: Cache | None) -> Callable[..., Any]:
    """What draws heat-maps of findings over an image [*shape], as PNG by finding.

    It draws none where the model has no such maps.
    """
    encode = None if cache is None else functools.partial(cache.texts, model)
    try:
        told = finding_directions(model, protocol, encode=encode)
    except UserError:
        told = None

    def draw(image: np.ndarray, spacing: Sequence[float],
             findings: Sequence[str]) -> dict[str, bytes]:
        if told is None:
            return {}
        wanted = [protocol.findings.index(name) for name in findings]
        try:
            maps = mapper(model, Directions(*(part[wanted] for part in told)))(image)
        except UserError:
            return {}
        return {name: overlay(image, heat, spacing, width=720, **({} if image.ndim == 2 else {
            "windows": (LUNG,)})) for name, heat in zip(findings, maps, strict=True)}

    return draw


def report_models(candidates: Sequence[Candidate], source: Any, protocol: Protocol,
                  out: str | Path, *, title: str, normal_caption: str,
                  cache: Cache | None = None, places: str | Path | None = None,
                  progress: Callable[[str, int, int], None] | None = None) -> Evaluation:
    """Evaluates models on one split, writes their files and one report.

    The first model's scores.csv, labels.csv and metrics.json go into `out`, those of the others
    into sub-folders by name; report.html shows them side by side.

    Args:
        candidates: the model reported on, then those it is compared with.
        source: the split.
        protocol: how to score.
        out: folder of the files.
        title: of the report.
        normal_caption: stands for the report of a volume without findings.
        cache: where embeddings are kept; None keeps none.
        places: where findings are, to score the first model's heat-maps: "boxes" of the data set,
            or a folder of masks; None draws no maps. See `localisation.localise_source`.
        progress: called with (label, volumes done, all volumes).

    Returns:
        The evaluation of the first model.
    """
    out = Path(out)
    results = []
    for candidate in candidates:
        tell = None if progress is None else functools.partial(progress, candidate.label)
        evaluation = evaluate_model(candidate.model, source, protocol, cache=cache, progress=tell,
                                    normal_caption=normal_caption)
        if places is not None and not results:
            localisation = localise_source(candidate.model, source, protocol, progress=tell,
                                           masks=None if places == "boxes" else places)
            evaluation = dataclasses.replace(
                evaluation, metrics={**evaluation.metrics, "localisation": localisation})
        write_evaluation(out if not results else out / candidate.name, evaluation)
        results.append(ModelResult(candidate.name, candidate.label, evaluation,
                                   candidate.history, candidate.untrained))
    metadata, first = source.metadata, results[0].evaluation
    rows: dict[str, int] = {}
    for row, volume in enumerate(source.index):
        # Of a scan that is judged as one, its first volume is shown.
        for name in (volume.id, scan_of(volume.id)[0]):
            rows.setdefault(name, row)
    draw_overlays = overlays_of(candidates[0].model, protocol, cache)
    samples = []
    for volume_id in choose_samples(first):
        volume = source[rows[volume_id]]["volume"]
        picture = (radiograph_picture(volume) if volume.ndim == 2 else
                   volume_picture(volume, metadata["spacing"], width=720))
        sample = sample_case(first, volume_id, picture)
        samples.append(dataclasses.replace(sample, overlays=draw_overlays(
            centre(volume, candidates[0].model.shape), metadata["spacing"],
            [finding.name for finding in sample.top[:MAPPED]])))
    phantom = metadata["source"] == "phantom"
    dataset = (f"{'phantom chest CT' if phantom else metadata['name']}, "
               f"{grid_text(metadata['shape'], metadata['spacing'])}, split {metadata['split']}, "
               f"fingerprint {source.fingerprint[:12]}")
    device = jax.devices()[0]
    write_report(out / "report.html", ReportData(
        title=title, models=results, dataset=dataset, phantom=phantom, samples=samples,
        environment=describe_environment(
            devices=f"{jax.device_count()} × {device.device_kind} ({device.platform})")))
    return first
