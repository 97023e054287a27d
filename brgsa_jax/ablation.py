"""Ablations: train what differs, judge it on the same patients, show every difference's interval.

A difference is shown with its interval and nothing more: the table ranks no row.
"""

import csv
import functools
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from brgsa_jax import config as configs
from brgsa_jax.config import UserError
from brgsa_jax.data.sources import Source, open_source
from brgsa_jax.data.tables import quoted
from brgsa_jax.evals.bootstrap import Interval, interval, macro_samples, paired_macro
from brgsa_jax.evals.cache import Cache
from brgsa_jax.evals.evaluate import Evaluation, write_evaluation
from brgsa_jax.evals.metrics import macro
from brgsa_jax.evals.protocol import Protocol, get_protocol
from brgsa_jax.evals.run import evaluate_model
from brgsa_jax.evals.scores import write_atomic
from brgsa_jax.predict import load_model
from brgsa_jax.train import trainer

FIGURES = {"auroc": "macro AUROC", "auprc": "macro AUPRC", "difference": "AUROC difference",
           "gap": "modality gap", "gap_bridged": "gap after the bank", "recall_at_5": "R@5"}
"""What a row may hold, with its heading. R@5 is of reports that look for their volume."""
_RANGE = {"difference": (-1.0, 1.0), "gap": (0.0, 2.0), "gap_bridged": (0.0, 2.0)}


class AblationRow(NamedTuple):
    """One run of a sweep, over its seeds.

    Attributes:
        label: name of the run.
        figures: name of `FIGURES` -> mean over seeds with its interval; what the run does not have
            is missing, as the gap after the bank of a model without one.
        seeds: those that finished.
        failures: a sentence for every seed that did not.
    """

    label: str
    figures: Mapping[str, Interval]
    seeds: tuple[int, ...]
    failures: tuple[str, ...]


class AblationTable(NamedTuple):
    """The rows of a sweep; a notebook shows it as a table.

    Attributes:
        rows: in the order asked for; differences are to the first.
        notes: sentences to read the numbers by: data, protocol, what the intervals cover.
    """

    rows: tuple[AblationRow, ...]
    notes: tuple[str, ...]

    def to_markdown(self) -> str:
        """The table in Markdown, notes below."""
        header, *lines = self._cells()
        table = [header, [":--", *["--:"] * (len(header) - 2), ":--"], *lines]
        escaped = ["| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in table]
        return "\n".join([*escaped, "", *(f"{_markdown(note)}  " for note in self.notes)]) + "\n"

    def to_csv(self, path: str | Path) -> None:
        """Writes one line a run at full precision: label, seeds, value, low and high of each."""
        shown = self._shown()
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["label", "seeds", *(f"{name}{part}" for name in shown
                                             for part in ("", "_low", "_high")), "failures"])
        for row in self.rows:
            numbers = [repr(float(number)) if name in row.figures else ""
                       for name in shown
                       for number in row.figures.get(name, Interval(0, 0, 0))[:3]]
            writer.writerow([quoted(row.label), " ".join(map(str, row.seeds)), *numbers,
                             quoted("; ".join(row.failures))])
        write_atomic(path, buffer.getvalue())

    def _repr_html_(self) -> str:
        header, *lines = ([html.escape(cell) for cell in line] for line in self._cells())
        # A narrow cell breaks before an interval, not inside it.
        lines = [[first, *(cell.replace(" to ", "&nbsp;to&nbsp;") for cell in figures), last]
                 for first, *figures, last in lines]

        def line(tag: str, cells: Sequence[str]) -> str:
            sides = ["left", *["right"] * (len(cells) - 2), "left"]
            return "<tr>" + "".join(f'<{tag} style="text-align:{side}">{cell}</{tag}>'
                                    for cell, side in zip(cells, sides, strict=True)) + "</tr>"

        notes = "<br>".join(map(html.escape, self.notes))
        return (f"<table><thead>{line('th', header)}</thead><tbody>"
                f"{''.join(line('td', cells) for cells in lines)}</tbody></table><p>{notes}</p>")

    def _shown(self) -> list[str]:
        return [name for name in FIGURES if any(name in row.figures for row in self.rows)]

    def _cells(self) -> list[list[str]]:
        shown = self._shown()
        first = self.rows[0].label
        titles = {**FIGURES, "difference": f"AUROC − that of {first}"}
        lines = [[row.label, *(_text(name, row.figures) for name in shown),
                  " ".join([*map(str, row.seeds), *row.failures])] for row in self.rows]
        return [["run", *(titles[name] for name in shown), "seeds"], *lines]


def ablate(runs: Sequence[str] | Mapping[str, Any], *, workdir: str | Path,
           data: str | Path | None = None, protocol: str | Protocol = "ct-rate-18",
           seeds: Sequence[int] = (0,), overrides: Mapping[str, Any] | None = None,
           console: Console | None = None) -> AblationTable:
    """Trains and judges several configurations on one data set, each with every seed.

    A run is trained in WORKDIR/LABEL/seed_S and judged into its sub-folder eval; what is finished
    there is not trained again, what was interrupted goes on. A run that fails is told in its row
    and the others go on.

    **Intervals.** Patients are drawn with replacement, the same draws for all runs and seeds, so
    that differences are paired by patient and by seed. One seed: the percentile interval of these
    draws, which knows nothing of how another training would end. S seeds: the figure is the mean
    over seeds; its distance to either end of the patients' percentile interval and the half-width
    t(S − 1) · s / √S of the spread s between seeds are added as the root of their squares. (R@5
    has the mean of the seeds' intervals in place of that of the mean, which is no narrower.)

    Args:
        runs: names of ablations ("bank_128", "phantom/bank_128") or recipes; or label -> name,
            ConfigDict, or (name, what differs from it).
        workdir: gets a folder for each run.
        data: folder written by `brgsa data build`; None takes the configurations' `data.path`.
        protocol: a name of `brgsa_jax.evals.protocol`, or one of your own; says which split
            is judged.
        seeds: of the trainings.
        overrides: dotted keys changed in all runs; what a (name, differs) pair changes goes first.
        console: where trainings tell of themselves; by default the terminal.

    Returns:
        One row a run; differences are to the first.

    Raises:
        UserError: before anything is trained: unknown names or keys, two runs that are the same,
            different data sets, no seed.
    """
    protocol = protocol if isinstance(protocol, Protocol) else get_protocol(protocol)
    planned = _plan(runs, data, overrides or {})
    if not seeds or len(set(seeds)) < len(seeds) or not all(
            isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"seeds={tuple(seeds)} must be different whole numbers, at least one")
    source = open_source(next(iter(planned.values())).data.path, protocol.split)
    console, folders = console or Console(), _folders(planned)
    found: dict[str, dict[int, Evaluation]] = {label: {} for label in planned}
    failures: dict[str, list[str]] = {label: [] for label in planned}
    for label, config in planned.items():
        for seed in seeds:
            folder = Path(workdir) / folders[label] / f"seed_{seed}"
            try:
                found[label][seed] = _run(configs.override(config, {"seed": seed}), folder,
                                          source, protocol, console)
            # Whatever ends one run, as a lack of memory, says nothing of the others.
            except Exception as error:
                failures[label].append(_told(seed, error))
                console.print(f"{label}: {failures[label][-1]}", markup=False)
    first = next(iter(found.values()))
    rows = tuple(AblationRow(label, _figures(by_seed, {} if by_seed is first else first,
                                             protocol.level),
                             tuple(by_seed), tuple(failures[label]))
                 for label, by_seed in found.items())
    judged = next((one for by_seed in found.values() for one in by_seed.values()), None)
    return AblationTable(rows, _notes(source, protocol, len(seeds), judged))


def _plan(runs: Sequence[str] | Mapping[str, Any], data: str | Path | None,
          overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of every run by label, checked as far as it can be before training."""
    if isinstance(runs, str):
        runs = [runs]
    if not isinstance(runs, Mapping):
        repeated = [name for name in runs if list(runs).count(name) > 1]
        if repeated:
            raise UserError(f"the run {repeated[0]!r} is asked for more than once; name it once")
        runs = {name: name for name in runs}
    if not runs:
        raise UserError("there is no run to compare; name at least one, as 'phantom/bank_128'")
    shared = {**overrides, **({} if data is None else {"data.path": str(data)})}
    planned: dict[str, Any] = {}
    for label, run in runs.items():
        try:
            planned[label] = configs.validate(_config(run, shared))
        except UserError as error:
            raise UserError(f"run {label!r}: {error}") from error
    same: dict[str, str] = {}
    for label, config in planned.items():
        key = configs.to_json(configs.override(config, {"name": ""}))
        if same.setdefault(key, label) != label:
            raise UserError(f"the runs {same[key]!r} and {label!r} are the same configuration; "
                            "leave one out, or look whether overrides undo what they differ in")
    paths = {config.data.path for config in planned.values()}
    if len(paths) > 1 or not all(paths):
        raise UserError("the runs name "
                        f"{'different data sets' if len(paths) > 1 else 'no data set'}; give data="
                        "a folder written by brgsa data build")
    return planned


def _config(run: Any, shared: Mapping[str, Any]) -> Any:
    if isinstance(run, configs.ConfigDict):
        return configs.override(run, shared)
    name, own = (run, {}) if isinstance(run, str) else run if _is_pair(run) else (None, None)
    if name is None:
        raise UserError(f"a {type(run).__name__} is no configuration; give a name, a ConfigDict, "
                        "or (name, {key: value})")
    from brgsa_jax.configs.ablations import ABLATIONS

    known = name.rpartition("/")[2] in ABLATIONS or "/" in name and not Path(name).is_file()
    config = configs.get_config(f"ablations:{name}" if known else name)
    return configs.override(config, {**shared, **own})


def _is_pair(run: Any) -> bool:
    return (isinstance(run, Sequence) and len(run) == 2 and isinstance(run[0], str)
            and isinstance(run[1], Mapping))


def _folders(labels: Sequence[str]) -> dict[str, str]:
    """A folder name for every label: what is no letter, digit, "-", "_" or "." becomes "_"."""
    names = {label: re.sub(r"[^\w.-]+", "_", label, flags=re.ASCII).strip(".")
             for label in labels}
    for label, name in names.items():
        others = [other for other in names if names[other].lower() == name.lower()]
        if not name or len(name) > 100 or len(others) > 1:
            raise UserError(f"the label {label!r} makes no folder of its own; choose another of up "
                            "to 100 letters and digits")
    return names


def _run(config: Any, folder: Path, source: Source, protocol: Protocol,
         console: Console) -> Evaluation:
    """Trains what is not trained yet, and judges it."""
    trainer.train(config, folder, console=console)
    kept = folder / "eval" / "cache"
    kept.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate_model(load_model(folder), source, protocol,
                                normal_caption=config.data.normal_caption,
                                cache=Cache(kept, functools.partial(console.print, markup=False)))
    write_evaluation(folder / "eval", evaluation)
    return evaluation


def _told(seed: int, error: Exception) -> str:
    """One line on what ended a run."""
    text = " ".join(str(error).split())[:400]
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"seed {seed} failed: {kind}{text}"


def _figures(found: Mapping[int, Evaluation], first: Mapping[int, Evaluation],
             level: float) -> dict[str, Interval]:
    """The figures of a run over its seeds; `first` is what it is compared with."""
    samples: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in FIGURES}
    for seed, evaluation in found.items():
        values, drawn = (part[evaluation.mode] for part in (evaluation.values, evaluation.samples))
        samples["auroc"].append((macro(values.auroc), macro_samples(drawn.auroc)))
        samples["auprc"].append((macro(values.auprc), macro_samples(drawn.auprc)))
        for name, kind in (("gap", "direct"), ("gap_bridged", "bridged")):
            if kind in evaluation.gaps:
                measured = evaluation.gaps[kind]
                samples[name].append((measured.gap.distance.value, measured.distance))
        if seed in first:
            other = (part[first[seed].mode] for part in (first[seed].values, first[seed].samples))
            paired = paired_macro(*zip((values.auroc, drawn.auroc),
                                       (part.auroc for part in other), strict=True))
            samples["difference"].append((paired.value, paired.samples))
    figures = {}
    for name, pairs in samples.items():
        if pairs:
            values = [value for value, _ in pairs]
            patients = interval(float(np.mean(values)), np.mean([r for _, r in pairs], 0), level)
            figures[name] = _over_seeds(values, patients, level, _RANGE.get(name, (0.0, 1.0)))
    recalls = [recall for recall in map(_recall_at_5, found.values()) if recall]
    if recalls:
        ends = [[recall[key] for recall in recalls] for key in ("value", "low", "high")]
        figures["recall_at_5"] = _over_seeds(
            ends[0], Interval(*(float(np.mean(end)) for end in ends)), level, (0.0, 1.0))
    return figures


def _recall_at_5(evaluation: Evaluation) -> Mapping[str, float]:
    """Recall at 5 of reports that look for their volume; {} without reports."""
    directions = evaluation.metrics.get("retrieval", {})
    return directions.get("report_to_volume", {}).get("recall", {}).get("5", {})


def _over_seeds(values: Sequence[float], patients: Interval, level: float,
                bounds: tuple[float, float]) -> Interval:
    """Widens the interval over patients of the mean of S values as `ablate` describes."""
    count = len(values)
    if count < 2:
        return patients
    spread = student.ppf((1 + level) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    low, high = (float(np.hypot(patients.value - end, spread)) for end in patients[1:3])
    return patients._replace(low=max(patients.value - low, bounds[0]),
                             high=min(patients.value + high, bounds[1]))


def _notes(source: Source, protocol: Protocol, seeds: int,
           judged: Evaluation | None) -> tuple[str, ...]:
    """What the numbers are of; `judged` is any evaluation of the sweep."""
    covered = ("patients alone, not the spread between trainings, for which give several seeds"
               if seeds == 1 else "patients and the spread between seeds")
    notes = [f"Split {protocol.split}, data {source.fingerprint[:12]}, protocol {protocol.name} "
             f"({protocol.hash}).",
             f"Value ({protocol.level:.0%} interval); the intervals cover {covered}. Differences "
             "are paired; each interval holds for its row alone."]
    if judged is not None:
        counts, recall = judged.metrics["counts"], _recall_at_5(judged)
        notes[0] = f"{counts['volumes']} volumes of {counts['patients']} patients. {notes[0]}"
        chance = {"AUROC": 0.5, "AUPRC": judged.metrics["macro"]["auprc_chance"],
                  **({"R@5": recall["chance"]} if recall else {})}
        notes.append("By chance: " + ", ".join(f"{name} {_number(value)}"
                                               for name, value in chance.items()) + ".")
    if source.metadata["source"] == "phantom":
        notes.append("Phantoms are not patients: these numbers show how to compare, not which "
                     "model is better on real scans.")
    return tuple(notes)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _text(name: str, figures: Mapping[str, Interval]) -> str:
    if name not in figures or not np.isfinite(figures[name].value):
        return "–"
    value, low, high = map(_number, figures[name][:3])
    sign = "+" if name == "difference" and figures[name].value > 0 else ""
    return f"{sign}{value} ({low} to {high})"


def _markdown(text: str) -> str:
    line = " ".join(text.split())
    return html.escape(re.sub(r"([\\`*_\[\]|~])", r"\\\1", line), quote=False)
