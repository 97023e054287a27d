"""Strict reading of answers, and what a summary says."""

import json

import pytest

from brgsa_jax.summarize.validate import NORMAL, InvalidAnswer, Summary, parse_findings, summary


@pytest.mark.parametrize(("text", "findings"), [
    ('["Pleural effusion"]', ("Pleural effusion",)),
    ('{"findings": ["Lung nodule", "Atelectasis"]}', ("Atelectasis", "Lung nodule")),
    ("[]", ()),
    (' \n{"findings": []}\n', ()),
    ('```json\n["Empyema"]\n```', ("Pleural effusion", "Empyema")),
    ('```\n["empyema."]\n```', ("Pleural effusion", "Empyema")),
    ('["There is Pneumonia", "there are lung nodules"]',
     ("Lung nodule", "Lung opacity", "Pneumonia")),
    ('["hiatus hernia", "Hiatal hernia"]', ("Hiatal hernia",)),
])
def test_valid_answers(text, findings):
    assert parse_findings(text) == findings


@pytest.mark.parametrize(("text", "reason"), [
    ("", "not JSON"), ("Pleural effusion", "not JSON"), ('["Pneumonia"', "not JSON"),
    ('["Pneumonia"] and more', "not JSON"), ('Here: ["Pneumonia"]', "not JSON"),
    ('```json\n["Pneumonia"]\n```\nDone.', "not JSON"),
    ('"Pneumonia"', "not a list"), ("null", "not a list"), ("3", "not a list"),
    ('{"findings": "Pneumonia"}', "not a list"), ('{"finding": []}', '"findings"'),
    ('{"findings": [], "note": 1}', '"findings"'), ("{}", '"findings"'),
    ('{"findings": ["Pneumonia"], "findings": []}', "repeats a key"),
    ('[["Pneumonia"]]', "name in quotes"), ("[null]", "name in quotes"),
    ('["No pleural effusion"]', "negated.*'No pleural effusion'"),
    ('["Absence of pneumothorax"]', "negated"), ('["There is no abnormality"]', "negated"),
    ('["Pneumonia", "Broken heart", "Dragon pox"]',
     "vocabulary: 'Broken heart', 'Dragon pox'"),
    ('[""]', "vocabulary: ''"), ("[" * 100_000, "deeply"),
    ("[" + "1" * 5000 + "]", "not JSON"),
])
def test_what_is_not_an_answer_is_refused_with_a_reason(text, reason):
    with pytest.raises(InvalidAnswer, match=reason) as caught:
        parse_findings(text)
    assert caught.value.reason == str(caught.value)


def test_a_reason_is_short_and_on_one_line():
    names = [f"made up\n\x1b[31m {number} " + "x" * 10_000 for number in range(50)]
    with pytest.raises(InvalidAnswer) as caught:
        parse_findings(json.dumps(names))
    assert len(caught.value.reason) < 600
    assert caught.value.reason.isprintable()
    assert "and 45 more" in caught.value.reason


def test_summaries_say_what_they_hold():
    assert summary("a", ("Empyema",), "x/1") == Summary(
        "a", ("Pleural effusion", "Empyema"), ("There is Pleural effusion", "There is Empyema"),
        "ok", "x/1")
    assert summary("b", (), "x/1") == Summary("b", (), (NORMAL,), "normal", "x/1")
    assert summary("c", InvalidAnswer("it is odd"), "x/1") == Summary(
        "c", (), (), "failed: it is odd", "x/1")
