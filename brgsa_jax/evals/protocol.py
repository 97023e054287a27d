"""Evaluation protocols: which findings, which prompts, which score, which statistics.

A protocol is a YAML file, one of those in `protocols/` or the user's own. Two results may be
compared only if their protocols agree; the content hash says whether they do.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from brgsa_jax.config import UserError
from brgsa_jax.evals import yaml_fields as read
from brgsa_jax.evals.protocol_checks import GIVEN, SIDES, columns_of, problems_of
from brgsa_jax.evals.scores import SCORE_MODES
from brgsa_jax.evals.thresholds import parse_rule
from brgsa_jax.registry import miss

PROTOCOLS = Path(__file__).parent / "protocols"

# Raised whenever a definition in metrics.py, bootstrap.py, scores.py or gap.py changes a number.
DEFINITIONS = 2


def _tuples(lists: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(items) for name, items in lists.items()}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """How the findings are put into words.

    Attributes:
        positive: templates with one `{}` each, where the finding's name goes; several are an
            ensemble, whose scores are averaged.
        negative: templates that deny the finding, for a contrast.
        overrides: finding -> {"positive" or "negative": whole sentences instead of templates}.
    """

    positive: tuple[str, ...] = ("There is {}",)
    negative: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in SIDES:
            object.__setattr__(self, side, tuple(getattr(self, side)))
        object.__setattr__(self, "overrides", {
            name: _tuples(own) for name, own in self.overrides.items()})

    def of(self, name: str, side: str) -> tuple[str, ...]:
        """The sentences of a finding; `side` is "positive" or "negative"."""
        own = self.overrides.get(name, {}).get(side)
        return own or tuple(text.replace("{}", name) for text in getattr(self, side))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything of an evaluation that changes a number, apart from the model and the data.

    Attributes:
        name: for people and folders; like version and source not part of the hash.
        findings: class names in column order.
        prompts: how they are put into words.
        combine: finding -> names of its parts, which are prompted instead of it; its score is the
            largest of theirs, and it is present where one of them is.
        score: one of `scores.SCORE_MODES`, "given" for scores read from a file, "classifier" for
            those of a trained classifier.
        contrast: one of `protocol_checks.CONTRASTS`.
        temperature: of the softmax of cosines; None without contrast.
        threshold: one of `thresholds.RULES`.
        calibration: one of `protocol_checks.CALIBRATIONS`, under a fixed threshold.
        averaging: one of `protocol_checks.AVERAGING`.
        groups: name -> findings that are averaged by themselves as well.
        labels: "NAME-VERSION" of the mapping that the data set's labels were made by, or None.
        exclude: ids of volumes that are left out.
        reconstructions: one of `protocol_checks.RECONSTRUCTIONS`.
        split: the split of the data set that is judged.
        resamples: bootstrap resamples of patients.
        seed: of the resamples and of the held-out halves.
        level: coverage of the intervals.
        version, source: of the protocol's definition, for people.

    Raises:
        UserError: all that is wrong with the fields, in one sentence.
    """

    name: str
    findings: tuple[str, ...]
    prompts: Prompts = Prompts()
    combine: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    score: str = "mean"
    contrast: str = "none"
    temperature: float | None = None
    threshold: str = "none"
    calibration: str = "none"
    averaging: str = "macro"
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    labels: str | None = None
    exclude: tuple[str, ...] = ()
    reconstructions: str = "all"
    split: str = "test"
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95
    version: str = "1"
    source: str = ""

    def __post_init__(self) -> None:
        for key in ("findings", "exclude"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.temperature is not None:
            object.__setattr__(self, "temperature", float(self.temperature))
        for key in ("combine", "groups"):
            object.__setattr__(self, key, _tuples(getattr(self, key)))
        problems = [] if self.findings else ["it names no finding"]
        problems += problems_of(self)
        if problems:
            raise UserError(f"the protocol {self.name!r} cannot be used: {'; '.join(problems)}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that are prompted: the findings, combined ones as their parts."""
        return columns_of(self.findings, self.combine)

    @property
    def positive(self) -> tuple[tuple[str, ...], ...]:
        """The positive sentences of each finding, in the order of `findings`."""
        return self._sentences("positive")

    @property
    def negative(self) -> tuple[tuple[str, ...], ...]:
        """The negative sentences of each finding; empty ones without a contrast."""
        return self._sentences("negative")

    def _sentences(self, side: str) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(text for part in self.combine.get(name, (name,))
                           for text in self.sentences(part, side)) for name in self.findings)

    def sentences(self, column: str, side: str) -> tuple[str, ...]:
        """The sentences of one of `columns` that its score is made of."""
        if side == "negative" and self.contrast == "none":
            return ()
        return self.prompts.of(column, side)

    @property
    def texts(self) -> tuple[str, ...]:
        """All distinct sentences to encode, the positive ones first."""
        return tuple(dict.fromkeys(text for side in SIDES for column in self.columns
                                   for text in self.sentences(column, side)))

    @property
    def wording(self) -> str:
        """The prompts in a few words, with X for the finding."""
        def side(name: str) -> str:
            return " and ".join(f"“{text.replace('{}', 'X')}”"
                                for text in getattr(self.prompts, name)) or "sentences of their own"

        words = side("positive")
        if self.contrast == "softmax":
            words += f" against {side('negative')}, softmax at temperature {self.temperature:g}"
        else:
            words += ", positive only"
        own = len(self.prompts.overrides)
        return f"{words}; {own} worded by hand" if own else words

    @property
    def rule(self) -> str:
        """The threshold rule in a few words."""
        return self.threshold + (f" after {self.calibration}" * (self.calibration != "none"))

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits over all that changes a number, and the definitions.

        Prompts count as the sentences that are encoded, whatever templates they came from.
        """
        content = {key: value for key, value in dataclasses.asdict(self).items()
                   if key not in ("name", "version", "source")}
        content["prompts"] = {column: [self.sentences(column, side) for side in SIDES]
                              for column in self.columns}
        # Rules of two names may be one.
        content["threshold"] = str(parse_rule(self.threshold))
        content["exclude"] = sorted(self.exclude)
        content["definitions"] = DEFINITIONS
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def protocols() -> tuple[str, ...]:
    """Returns the names `get_protocol` knows, sorted."""
    return tuple(sorted(file.stem for file in PROTOCOLS.glob("*.yaml")))


def get_protocol(name_or_file: str | Path) -> Protocol:
    """Returns a protocol of the package by its name, or the user's own by its file.

    Raises:
        UserError: no such protocol, and the message lists the choices; or all that is wrong with
            the file.
    """
    name, known = str(name_or_file), protocols()
    if name in known:
        return read_protocol(PROTOCOLS / f"{name}.yaml")
    if not (name.endswith((".yaml", ".yml")) or os.path.isfile(name)):
        raise UserError(miss("protocol", name, known) + "; or the path of a YAML file")
    protocol = read_protocol(name)
    if protocol.name in known and protocol.hash != get_protocol(protocol.name).hash:
        raise UserError(f"the protocol {name} has the name of the well-known {protocol.name!r} and "
                        "other content; give it a name of its own")
    return protocol


def read_protocol(path: str | Path) -> Protocol:
    """Reads a protocol's YAML file.

    Raises:
        UserError: it cannot be read, or all that is wrong with its fields, in one sentence.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no protocol file {path}; give the path of a YAML file, or "
                        f"choose one of {', '.join(protocols())}")
    try:
        tree = read.read_tree(path)
    except ValueError as error:
        raise UserError(f"the protocol file {path} is no readable YAML ({error}); mend it, or "
                        f"choose one of {', '.join(protocols())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"the protocol file {path} holds no fields; write name, version, classes "
                        "and what differs from the defaults, as 'key: value'")
    problems = [f"the key {read.shown(key)} is unknown (choices: {', '.join(_FIELDS)})"
                for key in tree if key not in _FIELDS]
    problems += [f"{key} is missing" for key in ("name", "version", "classes") if key not in tree]
    fields: dict[str, Any] = {}
    for key in tree.keys() & _FIELDS.keys():
        try:
            fields[_ATTRIBUTES.get(key, key)] = _FIELDS[key](tree[key])
        except ValueError as error:
            problems.append(f"{key} {error}")
    if fields.get("score") == GIVEN:
        problems.append(miss("score", GIVEN, SCORE_MODES))
    # What could not be read has been told; the rest is checked with a default in its place.
    problems += problems_of(SimpleNamespace(**{**_defaults(), **fields}))
    if problems:
        raise UserError(f"the protocol file {path} cannot be used: {'; '.join(problems)}")
    return Protocol(**fields)


def _defaults() -> dict[str, Any]:
    return {"name": "name", "findings": (), **{
        field.name: field.default if field.default is not dataclasses.MISSING
        else field.default_factory() for field in dataclasses.fields(Protocol)[2:]}}


def _prompts(value: Any) -> Prompts:
    if not isinstance(value, dict) or not set(value) <= {*SIDES, "overrides"}:
        raise ValueError("may have only positive, negative and overrides")
    overrides = value.get("overrides", {})
    if not isinstance(overrides, dict) or not all(
            isinstance(own, dict) and set(own) <= set(SIDES) for own in overrides.values()):
        raise ValueError("has overrides other than classes with positive and negative lists")
    return Prompts(**{side: read.texts(value[side]) for side in SIDES if side in value},
                   overrides={read.text(name): read.lists(own) for name, own in overrides.items()})


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "name": read.text, "version": read.text, "source": read.text, "classes": read.some_texts,
    "combine": read.lists, "prompts": _prompts, "score": read.text, "contrast": read.text,
    "temperature": read.or_none(read.number), "threshold": read.text, "calibration": read.text,
    "averaging": read.text, "groups": read.lists, "labels": read.or_none(read.text),
    "exclude": read.texts, "reconstructions": read.text, "split": read.text,
    "resamples": read.whole, "seed": read.whole, "level": read.number}
_ATTRIBUTES = {"classes": "findings"}
