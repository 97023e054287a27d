"""Evaluation protocols by name: which findings, which prompts, which score, which statistics.

Two results may be compared only if their protocols agree; the content hash says whether they do.
"""

import dataclasses
import hashlib
import json

from brgsa_jax.config import UserError
from brgsa_jax.evals.scores import SCORE_MODES
from brgsa_jax.registry import miss
from brgsa_jax.summarize.vocabulary import CT_RATE_18, CT_RATE_33, CT_RATE_LT_15

CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
"""The labels of CheXpert's competition, on which radiograph models are compared."""

# Raised whenever a definition in metrics.py, bootstrap.py or gap.py changes a number.
DEFINITIONS = 1

THRESHOLDS = ("none", "heldout-patients", "ctclip-test")
"""How decisions are cut from scores: not at all; at the ROC corner fitted on the other half of
the patients; at the ROC corner of the test labels themselves (CT-CLIP's habit, optimistic)."""

GIVEN = "given"
"""The score of a protocol that judges a score file of unknown making."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything of an evaluation that changes a number, apart from the model and the data.

    Attributes:
        name: for people; not part of the hash.
        findings: class names in column order.
        prompt: one `{}` where the finding goes.
        score: one of `scores.SCORE_MODES`, or "given" for scores read from a file.
        split: the split of the data set that is judged.
        threshold: one of `THRESHOLDS`.
        resamples: bootstrap resamples of patients.
        seed: of the resamples and of the held-out halves.
        level: coverage of the intervals.

    Raises:
        UserError: a field outside its choices.
    """

    name: str
    findings: tuple[str, ...]
    prompt: str = "There is {}"
    score: str = "mean"
    split: str = "test"
    threshold: str = "none"
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", tuple(self.findings))
        problems = []
        if not self.findings:
            problems.append("it names no finding")
        repeated = sorted({f for f in self.findings if self.findings.count(f) > 1})
        if repeated:
            problems.append(f"it names {', '.join(repeated)} more than once")
        if self.prompt.count("{}") != 1:
            problems.append(f"its prompt {self.prompt!r} needs exactly one {{}} for the finding")
        if self.score not in (*SCORE_MODES, GIVEN):
            problems.append(miss("score", self.score, (*SCORE_MODES, GIVEN)))
        if self.threshold not in THRESHOLDS:
            problems.append(miss("threshold rule", self.threshold, THRESHOLDS))
        if self.resamples < 1:
            problems.append(f"resamples is {self.resamples} and must be at least 1")
        if not 0.0 < self.level < 1.0:
            problems.append(f"level is {self.level} and must lie between 0 and 1")
        if problems:
            raise UserError(f"the protocol {self.name!r} cannot be used: {'; '.join(problems)}")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The sentence to encode for each finding, in the order of `findings`."""
        return tuple(self.prompt.replace("{}", finding) for finding in self.findings)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits over every field but the name, and the definitions."""
        content = dataclasses.asdict(self)
        del content["name"]
        content["definitions"] = DEFINITIONS
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_PROTOCOLS = {
    protocol.name: protocol for protocol in (
        Protocol("ct-rate-18", CT_RATE_18),
        Protocol("ct-rate-lt-15", CT_RATE_LT_15),
        Protocol("ct-rate-33", CT_RATE_33),
        Protocol("chexpert-5", CHEXPERT_5),
    )}


def protocols() -> tuple[str, ...]:
    """Returns the names `get_protocol` knows."""
    return tuple(_PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Returns the protocol of that name.

    Raises:
        UserError: no such protocol; the message lists the choices.
    """
    if name not in _PROTOCOLS:
        raise UserError(miss("protocol", name, _PROTOCOLS))
    return _PROTOCOLS[name]
