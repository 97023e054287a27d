"""What a summary is, and the strict reading of a language model's answer."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from brgsa_jax.summarize import vocabulary

NORMAL = "There is no abnormality"

_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.S | re.I)
_PREFIX = re.compile(r"there (?:is|are) (?:an? )?", re.I)
_NEGATION = re.compile(r"\b(?:no|not|without|absent|absence|negative|normal|never|free)\b", re.I)
_SHOWN = 5
_SHOWN_LETTERS = 60


class InvalidAnswer(Exception):  # noqa: N818
    """A backend's answer that is no list of canonical findings.

    Attributes:
        reason: what is wrong, in words that a second request to the model can repeat.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Summary(NamedTuple):
    """The findings of one report.

    Attributes:
        id: the report's row in the table.
        findings: canonical names, positive only, in the vocabulary's order, parents included.
        sentences: a caption sentence for each finding; `NORMAL` alone when there is none.
        status: "ok", "normal" (no finding) or "failed: REASON".
        backend: what made it, with its version.
    """

    id: str
    findings: tuple[str, ...]
    sentences: tuple[str, ...]
    status: str
    backend: str


def summary(id: str, answer: tuple[str, ...] | InvalidAnswer, backend: str) -> Summary:
    """Makes the summary of a report from a backend's answer."""
    if isinstance(answer, InvalidAnswer):
        return Summary(id, (), (), f"failed: {answer.reason}", backend)
    findings = vocabulary.closure(answer)
    sentences = tuple(map(vocabulary.sentence, findings)) or (NORMAL,)
    return Summary(id, findings, sentences, "ok" if findings else "normal", backend)


def parse_findings(text: str) -> tuple[str, ...]:
    """Reads an answer: a JSON list of names, or an object whose key "findings" holds one.

    One Markdown code fence around the JSON is taken off, "There is X" counts as X, and synonyms
    and other spellings become the canonical name. Nothing else is mended and nothing is guessed.

    Args:
        text: the answer of a language model.

    Returns:
        Canonical names, each once, in the vocabulary's order, parents included; empty for a
        normal report.

    Raises:
        InvalidAnswer: the text is no such JSON, or a name is negated or unknown.
    """
    fenced = _FENCE.fullmatch(text.strip())
    try:
        answer = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise InvalidAnswer("the answer is nested too deeply") from error
    except ValueError as error:
        raise InvalidAnswer(f"the answer is not JSON ({error})") from error
    if isinstance(answer, dict):
        if set(answer) != {"findings"}:
            raise InvalidAnswer('the answer is an object without "findings" as its only key')
        answer = answer["findings"]
    if not isinstance(answer, list):
        raise InvalidAnswer("the answer is not a list of names")
    if not all(isinstance(entry, str) for entry in answer):
        raise InvalidAnswer("the list holds something that is not a name in quotes")
    names, negated, unknown = [], [], []
    for entry in answer:
        name = vocabulary.canonical(_PREFIX.sub("", entry.strip(), count=1).rstrip("."))
        if name:
            names.append(name)
        else:
            (negated if _NEGATION.search(entry) else unknown).append(entry)
    faults = [f"{what}: {_show(entries)}" for what, entries in (
        ("negated, where only what is present may be listed", negated),
        ("not in the vocabulary", unknown)) if entries]
    if faults:
        raise InvalidAnswer("; ".join(faults))
    return vocabulary.closure(names)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object repeats a key")
    return found


def _show(entries: list[str]) -> str:
    """At most a few entries, shortened and on one line: a model may answer with anything."""
    shown = [ascii(entry if len(entry) <= _SHOWN_LETTERS else entry[:_SHOWN_LETTERS] + "...")
             for entry in entries[:_SHOWN]]
    more = len(entries) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
