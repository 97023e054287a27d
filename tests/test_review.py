"""What readers' answers decide: precedence, implication, contradiction; and the statistics."""

import itertools
import math

import pytest
from scipy.stats import beta

from brgsa_jax.config import UserError
from brgsa_jax.summarize.review import agreements, collect, rate, settle
from brgsa_jax.summarize.sheet import Opinion, Sheet
from brgsa_jax.summarize.vocabulary import PARENTS, closure


def opinion(finding, value, by="A", settles=False, case="a", when="2026-03-14"):
    return Opinion(case, finding, bool(value), by, when, settles, f"row of {by}")


def settled(drafts, *opinions):
    given = {}
    for one in opinions:
        given.setdefault(one.finding, []).append(one)
    return {name: (cell.label, cell.state)
            for name, cell in settle(frozenset(closure(drafts)), given).items()}


def test_readers_confirm_and_correct_drafts():
    assert settled(["Lung cyst"], opinion("Lung cyst", 1), opinion("Osteophyte", 0),
                   opinion("Pneumothorax", 1), opinion("Rib fracture", 1),
                   opinion("Rib fracture", 1, "B")) == {
        "Lung cyst": (True, "confirmed"), "Osteophyte": (False, "confirmed"),
        "Pneumothorax": (True, "corrected"), "Rib fracture": (True, "corrected")}
    assert settled(["Lung cyst"], opinion("Lung cyst", 0)) == {"Lung cyst": (False, "corrected")}


def test_a_finding_implies_its_parents_and_its_absence_rules_out_the_narrower_ones():
    assert settled([], opinion("Bronchopneumonia", 1)) == {
        "Bronchopneumonia": (True, "corrected"), "Pneumonia": (True, "implied"),
        "Lung opacity": (True, "implied")}
    assert settled(["Viral pneumonia", "Ground glass opacity"], opinion("Lung opacity", 0)) == {
        "Lung opacity": (False, "corrected"), "Pneumonia": (False, "implied"),
        "Viral pneumonia": (False, "implied"), "Ground glass opacity": (False, "implied")}
    # Nothing to change: nothing told. A narrower finding's absence says nothing of the parent.
    assert settled(["Empyema"], opinion("Empyema", 1)) == {"Empyema": (True, "confirmed")}
    assert settled(["Empyema"], opinion("Empyema", 0)) == {"Empyema": (False, "corrected")}


def test_readers_who_disagree_leave_a_cell_open_until_it_is_settled():
    answers = [opinion("Empyema", 1), opinion("Empyema", 0, "B")]
    assert settled([], *answers) == {"Empyema": (None, "open")}
    assert settle(frozenset(), {"Empyema": answers})["Empyema"].why == "A: 1, B: 0"
    assert settled([], *answers, opinion("Empyema", 1, "C", settles=True)) == {
        "Empyema": (True, "corrected"), "Pleural effusion": (True, "implied")}
    cell = settle(frozenset(), {"Empyema": [*answers, opinion("Empyema", 1, "C", True)]})["Empyema"]
    assert (cell.by, cell.when) == ("C", "2026-03-14")
    assert settled([], *answers, opinion("Empyema", 1, "C", True),
                   opinion("Empyema", 0, "D", True))["Empyema"] == (None, "open")


def test_answers_that_contradict_each_other_are_both_open():
    answers = [opinion("Viral pneumonia", 1), opinion("Lung opacity", 0, "B")]
    assert settled(["Viral pneumonia"], *answers) == {
        "Viral pneumonia": (None, "open"), "Lung opacity": (None, "open")}
    assert settled([], *answers) == {
        "Viral pneumonia": (None, "open"), "Lung opacity": (None, "open")}
    why = settle(frozenset(), {one.finding: [one] for one in answers})["Lung opacity"].why
    assert why == "Viral pneumonia is there (A: 1) and implies Lung opacity, which is not (B: 0)"
    # The other way round there is no contradiction.
    assert settled(["Viral pneumonia"], opinion("Viral pneumonia", 0),
                   opinion("Lung opacity", 1))["Lung opacity"] == (True, "confirmed")


def test_whatever_is_answered_the_decided_labels_are_closed_under_parents():
    names = ("Viral pneumonia", "Pneumonia", "Lung opacity", "Ground glass opacity")
    closed = 0
    for drafts in itertools.product((0, 1), repeat=4):
        present = frozenset(closure(itertools.compress(names, drafts)))
        for answers in itertools.product((None, 0, 1), repeat=4):
            given = {name: [opinion(name, value)]
                     for name, value in zip(names, answers, strict=True) if value is not None}
            cells = settle(present, given)
            labels = {name: cells[name].label if name in cells else name in present
                      for name in names}
            if None in labels.values():
                continue
            found = {name for name in names if labels[name]}
            assert set(closure(found)) == found, (present, given)
            closed += 1
            assert all(cells[name].label == bool(one[0].value) for name, one in given.items())
    assert closed > 500 and PARENTS["Viral pneumonia"] == "Pneumonia"


def sheet(*opinions):
    return Sheet("s.csv", "", frozenset(), opinions)


def test_one_reader_counts_once_and_may_not_say_two_things():
    both = collect([sheet(opinion("Empyema", 1, "Dr. A"), opinion("Empyema", 1, "dr. a")),
                    sheet(opinion("Empyema", 0, "B"), opinion("Empyema", 0, "Dr. A", True))])
    assert [(one.by, one.settles) for one in both["a"]["Empyema"]] == [
        ("Dr. A", False), ("B", False), ("Dr. A", True)]
    with pytest.raises(UserError, match="^row of A and row of a are two answers of 'a' about "
                                        "Empyema of 'a'; correct one of them$"):
        collect([sheet(opinion("Empyema", 1, "A")), sheet(opinion("Empyema", 0, "a"))])


def test_agreement_is_cohens_kappa_of_what_both_answered():
    def both(*values):
        return [[opinion("Empyema", a, "A"), opinion("Empyema", b, "B")] for a, b in values]

    # The example of Cohen's formula by hand: po 0.7, pe 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa 0.4.
    table = both(*[(1, 1)] * 20, *[(1, 0)] * 5, *[(0, 1)] * 10, *[(0, 0)] * 15)
    alone = [[opinion("Empyema", 1, "A")], [opinion("Empyema", 0, "C", settles=True)]]
    (pair,) = agreements(table + alone)
    assert pair[:3] == (("A", "B"), 50, 35) and pair.kappa == pytest.approx(0.4)
    (pair,) = agreements(both((1, 1), (1, 1)))
    assert pair.kappa is None and pair.agreed == 2
    assert agreements(both((1, 0), (1, 0)))[0].kappa == 0
    three = [[opinion("Empyema", 1, by) for by in ("C", "a", "B")]]
    assert [pair.by for pair in agreements(three)] == [("a", "B"), ("a", "C"), ("B", "C")]


@pytest.mark.parametrize(("count", "of"), [(0, 20), (3, 10), (20, 20)])
def test_intervals_are_those_of_clopper_and_pearson(count, of):
    found = rate([True] * count + [False] * (of - count))
    assert found[:3] == (count, of, count / of)
    low = beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    assert math.isclose(found.low, low, abs_tol=1e-9)
    assert math.isclose(found.high, high, abs_tol=1e-9)


def test_nothing_counted_has_no_rate():
    assert rate([]) == (0, 0, None, None, None)
