"""From a model and a data set to an evaluation: embed the volumes once, then score."""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from brgsa_jax.config import UserError
from brgsa_jax.data.recipe import centre, check_recipe, grid_text
from brgsa_jax.data.tokenizer import caption
from brgsa_jax.evals.evaluate import Embeddings, Evaluation, evaluate, write_evaluation
from brgsa_jax.evals.protocol import Protocol
from brgsa_jax.evals.report import (
    ModelResult,
    ReportData,
    choose_samples,
    describe_environment,
    sample_case,
    write_report,
)
from brgsa_jax.evals.volume_picture import radiograph_picture, volume_picture
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
                   normal_caption: str = "There is no abnormality", sentences: int = 0,
                   batch_size: int = 16,
                   progress: Callable[[int, int], None] | None = None) -> Evaluation:
    """Evaluates a model zero-shot on a split.

    Args:
        model: a `model.Model`.
        source: the split; every record carries its canonical findings.
        protocol: findings, prompts, score.
        normal_caption: stands for the report of a volume without findings.
        sentences: of each caption the modality gap is measured with; 0 takes all findings.
        batch_size: volumes encoded at once.
        progress: called with (volumes done, all volumes).

    Raises:
        UserError: empty split, or volumes of another grid than the model's.
    """
    cases = read_cases(source, protocol)
    check_recipe(source, model.config.input)
    image = embed_volumes(model, source, batch_size=batch_size, progress=progress)
    return evaluate_embedded(model, image, cases, protocol, normal_caption=normal_caption,
                             sentences=sentences)


def evaluate_embedded(model: Any, image: np.ndarray, cases: Cases, protocol: Protocol, *,
                      normal_caption: str, sentences: int = 0) -> Evaluation:
    """Scores volumes that are embedded already, [N, D]; see `evaluate_model`."""
    prompts = model.encode_text(protocol.prompts)
    # The sentences are drawn by the volume's id: as in training, and the same for every model.
    captions = model.encode_text([
        caption(findings, limit=sentences, normal=normal_caption,
                rng=np.random.default_rng(zlib.crc32(key.encode())))
        for key, findings in zip(cases.ids, cases.findings, strict=True)])
    embeddings = Embeddings(image, prompts, captions, bridge(model, image),
                            bridge(model, prompts), bridge(model, captions))
    return evaluate(protocol, ids=cases.ids, patients=cases.patients, findings=cases.names,
                    labels=cases.labels, embeddings=embeddings)


def read_cases(source: Any, protocol: Protocol) -> Cases:
    """Reads ids, patients and labels of a split.

    A finding of the protocol that no volume has is negative for all; its AUROC is undefined.

    Raises:
        UserError: the split is empty, or has none of the protocol's findings.
    """
    if not len(source):
        raise UserError("the split to evaluate holds no volume; build the data set with one")
    rows = source.index
    present = {name for row in rows for name in row.findings}
    if not present & set(protocol.findings):
        raise UserError(f"no volume has a finding of the protocol {protocol.name!r}; build the "
                        "data set with a column of canonical findings, or choose another protocol")
    names = tuple(dict.fromkeys([*protocol.findings, *source.metadata["findings"]]))
    labels = np.array([[name in row.findings for name in names] for row in rows])
    return Cases([row.id for row in rows], [row.patient for row in rows],
                 [row.findings for row in rows], names, labels)


def embed_volumes(model: Any, source: Any, *, batch_size: int = 16,
                  progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Embeds all volumes of a split, or as much of radiographs as a model reads, to [N, D]."""
    parts = []
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        volumes = [centre(source[i]["volume"], model.shape) for i in range(start, stop)]
        # A last short batch is filled up, so that one shape is compiled.
        volumes += [volumes[-1]] * (batch_size - len(volumes))
        embedded = model.encode_volume(np.stack(volumes), batch_size=batch_size)
        parts.append(embedded[:stop - start])
        if progress is not None:
            progress(stop, len(source))
    return np.concatenate(parts)


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


def report_models(candidates: Sequence[Candidate], source: Any, protocol: Protocol,
                  out: str | Path, *, title: str, normal_caption: str, sentences: int = 0,
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
        sentences: of each caption the modality gap is measured with; 0 takes all findings.
        progress: called with (label, volumes done, all volumes).

    Returns:
        The evaluation of the first model.
    """
    out = Path(out)
    cases = read_cases(source, protocol)
    results = []
    for candidate in candidates:
        check_recipe(source, candidate.model.config.input)
        tell = None if progress is None else functools.partial(progress, candidate.label)
        image = embed_volumes(candidate.model, source, progress=tell)
        evaluation = evaluate_embedded(candidate.model, image, cases, protocol,
                                       normal_caption=normal_caption, sentences=sentences)
        write_evaluation(out if not results else out / candidate.name, evaluation)
        results.append(ModelResult(candidate.name, candidate.label, evaluation,
                                   candidate.history, candidate.untrained))
    metadata, first = source.metadata, results[0].evaluation
    samples = []
    for volume_id in choose_samples(first):
        volume = source[cases.ids.index(volume_id)]["volume"]
        picture = (radiograph_picture(volume) if volume.ndim == 2 else
                   volume_picture(volume, metadata["spacing"], width=720))
        samples.append(sample_case(first, volume_id, picture))
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
