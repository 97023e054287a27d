"""What the readers' answers decide about draft labels, and what they say about the drafts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.summarize.sheet import Opinion, Sheet
from brgsa_jax.summarize.vocabulary import VOCABULARY, closure


class Cell(NamedTuple):
    """What the readers made of one finding of one report.

    Attributes:
        label: whether it is there; None while they disagree.
        state: "confirmed" or "corrected" (the draft), "implied" (by another finding) or "open".
        by: the readers whose answers these are.
        when: their dates.
        why: the answers in words.
    """

    label: bool | None
    state: str
    by: str
    when: str
    why: str


class Rate(NamedTuple):
    """A share: `count` of `of`, with its interval; None where there is nothing to count."""

    count: int
    of: int
    value: float | None
    low: float | None
    high: float | None


class Agreement(NamedTuple):
    """How far two readers agree on the rows that both answered.

    Attributes:
        by: the two readers.
        cells: rows answered by both.
        agreed: of these with the same answer.
        kappa: Cohen's; None where both always give the same one answer.
    """

    by: tuple[str, str]
    cells: int
    agreed: int
    kappa: float | None


def collect(sheets: Sequence[Sheet]) -> dict[str, dict[str, list[Opinion]]]:
    """Returns {first id of a report: {finding: answers}}, each reader's once.

    Raises:
        UserError: one reader gave two answers to one question.
    """
    found: dict[tuple[str, str, str, bool], Opinion] = {}
    for opinion in itertools.chain.from_iterable(sheet.opinions for sheet in sheets):
        key = opinion.case, opinion.finding, opinion.by.casefold(), opinion.settles
        first = found.setdefault(key, opinion)
        if first.value != opinion.value:
            raise UserError(f"{first.place} and {opinion.place} are two answers of {opinion.by!r} "
                            f"about {opinion.finding} of {opinion.case!r}; correct one of them")
    collected: dict[str, dict[str, list[Opinion]]] = {}
    for opinion in found.values():
        collected.setdefault(opinion.case, {}).setdefault(opinion.finding, []).append(opinion)
    return collected


def settle(drafts: frozenset[str], opinions: Mapping[str, Sequence[Opinion]]) -> dict[str, Cell]:
    """What the answers about one report decide.

    Readers who agree decide. Where they disagree, an answer of a sheet of disagreements decides,
    else the cell is open. A finding that is there implies its parents, one that is not there rules
    out the narrower ones: that decides cells nobody answered, and opens two answers that contradict
    each other.

    Args:
        drafts: positive findings of the summary.
        opinions: answers by finding.

    Returns:
        A cell for each finding that was answered or is changed by what was.
    """
    answered = {finding: _decide(finding in drafts, given) for finding, given in opinions.items()}
    cells = dict(answered)
    for child, parent in itertools.permutations(answered, 2):
        if parent in _wider(child) and answered[child].label and answered[parent].label is False:
            why = (f"{child} is there ({answered[child].why}) and implies {parent}, which is not "
                   f"({answered[parent].why})")
            for finding in (child, parent):
                cells[finding] = answered[finding]._replace(label=None, state="open", why=why)
    for finding in answered:
        cell = cells[finding]
        others = {True: _wider(finding), False: _narrower(finding), None: ()}[cell.label]
        for other in others:
            if other not in cells and (other in drafts) != cell.label:
                cells[other] = cell._replace(state="implied", why=finding)
    return cells


def _decide(draft: bool, given: Sequence[Opinion]) -> Cell:
    counted = [opinion for opinion in given if opinion.settles] or given
    values = {opinion.value for opinion in counted}
    label = values.pop() if len(values) == 1 else None
    state = "open" if label is None else "confirmed" if label == draft else "corrected"
    return Cell(label, state, "; ".join(opinion.by for opinion in counted),
                "; ".join(opinion.when for opinion in counted),
                ", ".join(f"{opinion.by}: {int(opinion.value)}" for opinion in counted))


@functools.cache
def _wider(finding: str) -> tuple[str, ...]:
    return tuple(name for name in closure([finding]) if name != finding)


@functools.cache
def _narrower(finding: str) -> tuple[str, ...]:
    return tuple(name for name in VOCABULARY if finding in _wider(name))


def agreements(opinions: Iterable[Sequence[Opinion]]) -> list[Agreement]:
    """How far each two readers agree; answers that settle a disagreement do not count.

    Args:
        opinions: the answers to each question.
    """
    pairs: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    names: dict[str, str] = {}
    for given in opinions:
        first = {opinion.by.casefold(): opinion for opinion in given if not opinion.settles}
        for key, opinion in first.items():
            names.setdefault(key, opinion.by)
        for one, other in itertools.combinations(sorted(first), 2):
            pairs.setdefault((one, other), []).append((first[one].value, first[other].value))
    return [Agreement((names[one], names[other]), len(both), sum(a == b for a, b in both),
                      _kappa(both)) for (one, other), both in sorted(pairs.items())]


def _kappa(both: Sequence[tuple[bool, bool]]) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    columns: Any = list(zip(*both, strict=True))
    # With one answer throughout, chance agrees as well as they do.
    return None if len(set(itertools.chain(*columns))) == 1 else float(cohen_kappa_score(*columns))


def rate(outcomes: Sequence[bool]) -> Rate:
    """The share of True with its 95 % interval of Clopper and Pearson."""
    from scipy.stats import binomtest

    count, of = sum(outcomes), len(outcomes)
    if not of:
        return Rate(0, 0, None, None, None)
    low, high = map(float, binomtest(count, of).proportion_ci(0.95, method="exact"))
    return Rate(count, of, count / of, low, high)
