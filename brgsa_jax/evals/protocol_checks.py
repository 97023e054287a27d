"""What a field of a protocol may be, and everything that is wrong with one that cannot be."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from brgsa_jax.data.records import SPLITS
from brgsa_jax.evals.scores import SCORE_MODES
from brgsa_jax.evals.thresholds import RULES, parse_rule
from brgsa_jax.registry import miss

CALIBRATIONS = ("none", "temperature", "platt")
"""What a fixed threshold cuts: the scores, or probabilities that were fitted on other patients."""

CONTRASTS = ("none", "softmax")
"""The score of the positive prompts alone, or the softmax of the pair positive, negative."""

AVERAGING = ("macro",)
"""The unweighted mean over the findings."""

RECONSTRUCTIONS = ("all", "first", "mean")
"""Of the volumes of one scan, all count by themselves, or the first, or their mean score."""

GIVEN = "given"
"""The score of a protocol that judges a score file of unknown making."""

CLASSIFIER = "classifier"
"""The score of a model that was trained on labels: the probabilities of its classifier."""

SIDES = ("positive", "negative")
# A name becomes a folder, an id and a patient have columns of their own beside the findings.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = ("id", "patient")


def columns_of(findings: Sequence[str], combine: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the names that are prompted: the findings, combined ones as their parts."""
    return tuple(dict.fromkeys(part for name in findings for part in combine.get(name, (name,))))


def problems_of(p: Any) -> list[str]:
    """What keeps the fields of a protocol, each of its type, from being one."""
    problems = []

    def expect(good: bool, problem: str) -> None:
        if not good:
            problems.append(problem)

    expect(bool(_NAME.fullmatch(p.name)), f"the name {p.name!r} is not letters, digits, '.', '_' "
           "and '-' only, as the name of a folder")
    for what, names in (("classes", p.findings), ("exclude", p.exclude)):
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        expect(not repeated, f"{what} names {', '.join(map(repr, repeated))} more than once")
    for name in p.findings:
        expect(name == name.strip() != "" and name.isprintable() and name not in _TAKEN,
               f"{name!r} cannot be the name of a class")
    for what, choice, choices in (
            ("score", p.score, (*SCORE_MODES, GIVEN, CLASSIFIER)),
            ("contrast", p.contrast, CONTRASTS),
            ("calibration", p.calibration, CALIBRATIONS), ("averaging", p.averaging, AVERAGING),
            ("reconstructions", p.reconstructions, RECONSTRUCTIONS), ("split", p.split, SPLITS)):
        expect(choice in choices, miss(what, choice, choices))
    try:
        place = parse_rule(p.threshold).place
    except ValueError:
        problems.append(miss("threshold rule", p.threshold, RULES))
    else:
        expect(p.calibration == "none" or place == "fixed",
               f"calibration {p.calibration!r} needs a fixed threshold such as fixed=0.5")
    expect(1 <= p.resamples <= 10**6, f"resamples is {p.resamples} and must be 1 to 1000000")
    expect(p.seed >= 0, f"seed is {p.seed} and must be at least 0")
    expect(0.0 < p.level < 1.0, f"level is {p.level} and must lie between 0 and 1")
    warm = p.temperature is not None and 0.0 < p.temperature < math.inf
    expect(warm if p.contrast == "softmax" else p.temperature is None,
           "temperature is a positive number with contrast softmax, and is left out without")
    return problems + _class_problems(p)


def _class_problems(p: Any) -> list[str]:
    """What is wrong with names of classes elsewhere, and with how they are worded."""
    problems = []
    for what, names in (("combine", p.combine), ("groups", {
            name for members in p.groups.values() for name in members})):
        strange = sorted(set(names) - set(p.findings)) if p.findings else []
        if strange:
            problems.append(f"{what} names {', '.join(map(repr, strange))}, which is no class")
    empty = [name for lists in (p.combine, p.groups) for name, items in lists.items() if not items]
    if empty:
        problems.append(f"{', '.join(map(repr, empty))} has an empty list")
    columns = columns_of(p.findings, p.combine)
    strange = sorted(set(p.prompts.overrides) - set(columns)) if p.findings else []
    if strange:
        problems.append(f"prompts.overrides names {', '.join(map(repr, strange))}, which is not "
                        "prompted")
    problems += [f"the prompt {text!r} needs exactly one {{}} for the finding"
                 for side in SIDES for text in getattr(p.prompts, side) if text.count("{}") != 1]
    for side in SIDES if p.contrast == "softmax" else SIDES[:1]:
        silent = [name for name in columns if not all(
            text.strip() and text.isprintable() for text in p.prompts.of(name, side) or [""])]
        if silent:
            problems.append(f"there is no {side} prompt, or an unreadable one, for "
                            f"{', '.join(map(repr, silent[:3]))}{' …' * (len(silent) > 3)}; write "
                            f"it into prompts.{side}")
    return problems
