"""From summaries to reviewed labels in a folder: what is written, kept, refused, and read on."""

import csv
import hashlib
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from brgsa_jax import cli
from brgsa_jax.config import UserError
from brgsa_jax.data.summaries import read_summaries
from brgsa_jax.data.tables import read_table
from brgsa_jax.evals.scores import read_labels, write_scores
from brgsa_jax.summarize.drafts import Request
from brgsa_jax.summarize.labels import make_labels
from brgsa_jax.summarize.validate import InvalidAnswer, summary
from brgsa_jax.summarize.vocabulary import CT_RATE_LT_15, closure

FINDINGS = "Empyema,Pneumothorax,Lung cyst"
DATE = "2026-03-14"
TEXT = "=cmd|a made-up report with a word nobody writes, zzyzx"


def draft(number):
    """Every tenth has an Empyema, every fourth a Lung cyst, every third a nodule."""
    return [name for name, every in (("Empyema", 10), ("Lung cyst", 4), ("Lung nodule", 3))
            if number % every == 0]


class Folder:
    """Made-up summaries of 40 scans, every fifth with a twin, one of them failed."""

    def __init__(self, path):
        self.path, self.out = path, path / "out"
        self.summaries, self.reports = path / "s.jsonl", path / "reports.csv"
        rows, table = [], [["id", "scan", "patient", "text"]]
        for number in range(40):
            for twin in range(2 if number % 5 == 0 else 1):
                id = f"scan_{number}_{twin}"
                answer = InvalidAnswer("empty report") if number == 7 else tuple(draft(number))
                rows.append(json.dumps(summary(id, answer, "lexicon/1")._asdict()))
                table.append([id, f"scan_{number}", f"=p{number // 2}", TEXT])
        self.summaries.write_text("\n".join(rows))
        with self.reports.open("w", newline="") as stream:
            csv.writer(stream).writerows(table)

    def make(self, *reviews, **request):
        return make_labels(self.summaries, self.out, reviews=reviews, **request)

    def first(self, **request):
        return self.make(**{"findings": FINDINGS, "negatives": 5, **request})

    def twins(self, **request):
        return self.first(reports=self.reports, scan_column="scan", patient_column="patient",
                          **request)

    def refused(self, *words, reviews=(), **request):
        before = self.bytes()
        with pytest.raises(UserError) as error:
            self.make(*reviews, **request)
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message
        assert self.bytes() == before

    def bytes(self):
        return {path.name: path.read_bytes() for path in sorted(self.out.glob("*"))}

    def rows(self, name):
        with (self.out / name).open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))

    def json(self):
        return json.loads((self.out / "labels.json").read_text())

    def fill(self, source="review.csv", to=None, by="A", only=None, **answers):
        """Fills a sheet in with its drafts, but for `answers` {"ID FINDING": value}."""
        rows = self.rows(source)
        for row in rows:
            cell = f"{row['id']} {row['finding']}"
            if only is None or cell in only:
                row |= {"corrected": answers.pop(cell, row["draft"]), "by": by, "when": DATE}
        assert not answers, answers
        path = self.out / (to or source)
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_drafts_give_labels_findings_and_a_sheet_without_a_word_of_the_reports(folder):
    result = folder.twins()
    assert (result.ids, result.reports, result.failed) == (47, 39, 1)
    labels = read_labels(folder.out / "labels.csv", patients="patient")
    assert labels.names == ("Empyema", "Pneumothorax", "Lung cyst") and len(labels.ids) == 47
    assert labels.ids[:3] == ("scan_0_0", "scan_0_1", "scan_1_0") and "scan_7_0" not in labels.ids
    assert labels.patients[:3] == ("=p0", "=p0", "=p0")
    for id, row in zip(labels.ids, labels.values, strict=True):
        assert list(row) == [name in draft(int(id.split("_")[1])) for name in labels.names]
    findings = {row["id"]: row for row in read_table(
        folder.out / "findings.csv", ["id", "findings", "patient"])}
    assert len(findings) == 47 and findings["scan_12_0"] == {
        "id": "scan_12_0", "findings": "Lung nodule;Lung cyst", "patient": "=p6"}
    assert all(tuple(row["findings"].split(";")) == closure(draft(int(id.split("_")[1])))
               for id, row in findings.items() if row["findings"])
    joined, failed = read_summaries(folder.out / "findings.csv")
    assert tuple(joined) == labels.ids and not failed
    assert folder.rows("left_out.csv") == [
        {"id": "scan_7_0", "reason": "its summary failed: empty report"}]
    assert folder.rows("label_states.csv") == []
    assert "zzyzx" not in str(folder.bytes())


def test_the_sheet_asks_for_all_positives_and_a_sample_of_negatives(folder):
    result = folder.twins()
    rows = folder.rows("review.csv")
    asked = {name: [row for row in rows if row["finding"] == name] for name in
             ("Empyema", "Pneumothorax", "Lung cyst")}
    assert {name: (sum(row["draft"] == "1" for row in found),
                   sum(row["draft"] == "0" for row in found)) for name, found in asked.items()
            } == {"Empyema": (4, 5), "Pneumothorax": (0, 5), "Lung cyst": (10, 5)}
    assert {tally.drafted for tally in result.findings.values()} == {4, 0, 10}
    assert (result.questions, result.to_read) == (len(rows), len({row["id"] for row in rows}))
    # Twins are asked for once; the rows of a report stand together.
    assert all(row["id"].endswith("_0") for row in rows)
    ids = [row["id"] for row in rows]
    assert sum(a != b for a, b in zip(ids, ids[1:], strict=False)) == len(set(ids)) - 1
    # One report is read for as many findings as it can be, so the samples overlap.
    sampled = [{row["id"] for row in found if row["draft"] == "0"} for found in asked.values()]
    assert len(set.union(*sampled)) < 10
    before = folder.bytes()["review.csv"]
    assert folder.make().sheet and folder.bytes()["review.csv"] == before
    folder.make(seed=1)
    assert folder.bytes()["review.csv"] != before


def test_the_sample_is_by_chance_and_stays_when_reports_are_added(folder):
    folder.first(negatives=20)
    before = {row["id"] for row in folder.rows("review.csv") if row["draft"] == "0"}
    lines = folder.summaries.read_text().splitlines()
    folder.summaries.write_text("\n".join(lines[:-4]))
    folder.first(negatives=20)
    after = {row["id"] for row in folder.rows("review.csv") if row["draft"] == "0"}
    assert len(before & after) > 0.75 * len(before)
    numbers = [int(id.split("_")[1]) for id in before]
    assert min(numbers) < 10 and max(numbers) > 30


def test_report_text_is_in_the_sheets_only_when_asked_for(folder):
    result = folder.first(reports=folder.reports, text_column=("text", "patient"))
    assert result.shows_reports
    assert {row["report"] for row in folder.rows("review.csv")} > {f"'{TEXT} =p0"}
    with_text = {name for name, content in folder.bytes().items() if b"zzyzx" in content}
    assert with_text == {"review.csv"}
    folder.fill(**{"scan_0_0 Empyema": "0"})
    folder.fill(to="b.csv", by="B", **{"scan_0_0 Empyema": "1"})
    folder.make(folder.out / "review.csv", folder.out / "b.csv")
    with_text = {name for name, content in folder.bytes().items() if b"zzyzx" in content}
    assert with_text == {"review.csv", "b.csv", "conflicts.csv"}


def test_answers_correct_labels_of_all_twins_and_are_counted(folder):
    folder.twins()
    rows = folder.rows("review.csv")
    missed = next(row["id"] for row in rows if row["finding"] == "Empyema" and row["draft"] == "0")
    sheet = folder.fill(**{"scan_0_0 Empyema": "0", f"{missed} Empyema": "TRUE"})
    result = folder.make(sheet)
    labels = read_labels(folder.out / "labels.csv", patients="patient")
    column = dict(zip(labels.ids, labels.values[:, 0], strict=True))
    assert not column["scan_0_0"] and not column["scan_0_1"] and column[missed]
    assert column["scan_10_0"] and column["scan_10_1"]
    empyema = result.findings["Empyema"]
    assert empyema[:7] == (4, 4, 0, 4 / 39, 9, 2, 0)
    assert empyema.right[:2] == (3, 4) and empyema.missed[:2] == (1, 5)
    assert result.findings["Pneumothorax"].right.of == 0
    assert result.findings["Pneumothorax"].missed[:2] == (0, 5)
    assert (result.sheet, result.conflicts) == (None, None)
    states = {(row["id"], row["finding"]): row for row in folder.rows("label_states.csv")}
    assert states["scan_0_1", "Empyema"] == {
        "id": "scan_0_1", "finding": "Empyema", "draft": "1", "label": "0", "state": "corrected",
        "by": "A", "when": DATE}
    assert states[missed, "Pleural effusion"]["state"] == "implied"
    assert states["scan_10_0", "Empyema"]["state"] == "confirmed"
    findings = {row["id"]: row["findings"] for row in folder.rows("findings.csv")}
    assert {"Pleural effusion", "Empyema"} <= set(findings[missed].split(";"))
    # A wrong empyema does not tell that there is no effusion.
    assert findings["scan_0_1"] == "Lung nodule;Pleural effusion;Lung cyst"


def test_only_sampled_negatives_estimate_the_misses(folder):
    folder.first()
    rows = folder.rows("review.csv")
    asked = {row["id"] for row in rows if row["finding"] == "Pneumothorax"}
    # Rows a reader adds by hand count as labels and as no sample.
    added = [f"scan_{n}_0" for n in range(1, 40) if n != 7 and f"scan_{n}_0" not in asked][:3]
    sheet = folder.out / "review.csv"
    with sheet.open("a", newline="") as stream:
        csv.writer(stream).writerows([id, "Pneumothorax", 0, 1, "A", DATE, ""] for id in added)
    tally = folder.make(sheet).findings["Pneumothorax"]
    assert (tally.positive, tally.reviewed, tally.missed.of) == (3, 3, 0)


def test_disagreements_are_empty_and_listed_until_they_are_settled(folder):
    folder.first()
    a = folder.fill(to="a.csv", by="Dr. A", **{"scan_0_0 Empyema": "0"})
    b = folder.fill(to="b.csv", by="=B", **{"scan_0_0 Lung cyst": "0"})
    result = folder.make(a, b)
    assert (result.open, result.conflicts) == (2, str(folder.out / "conflicts.csv"))
    assert [pair[:3] for pair in result.agreement] == [
        (("=B", "Dr. A"), result.agreement[0].cells, result.agreement[0].cells - 2)]
    assert result.findings["Empyema"].agreement[0].cells == 13
    row = folder.rows("labels.csv")[0]
    assert (row["id"], row["Empyema"], row["Pneumothorax"], row["Lung cyst"]) == (
        "scan_0_0", "", "0", "")
    with pytest.raises(UserError, match="line 2, column 'Empyema': '' is neither 0 nor 1"):
        read_labels(folder.out / "labels.csv")
    assert folder.rows("left_out.csv")[-1] == {
        "id": "scan_0_0", "reason": "not in findings.csv: readers disagree on Empyema, Lung cyst"}
    assert "scan_0_0" not in {row["id"] for row in folder.rows("findings.csv")}
    conflicts = {row["finding"]: row for row in folder.rows("conflicts.csv")}
    assert {name: row["opinions"] for name, row in conflicts.items()} == {
        "Empyema": "Dr. A: 0, =B: 1", "Lung cyst": "Dr. A: 1, =B: 0"}
    empyema = result.findings["Empyema"]
    assert (empyema.open, empyema.positive, empyema.prevalence) == (1, 7, 7 / 46)
    # Asked again, the sheet nobody has filled in is made anew.
    assert folder.make(a, b).conflicts == str(folder.out / "conflicts.csv")
    assert not (folder.out / "conflicts-2.csv").exists()
    # One is settled: the other is asked again, in a new sheet.
    first = folder.fill("conflicts.csv", only=["scan_0_0 Empyema"], by="C")
    result = folder.make(a, b, first)
    assert result.conflicts == str(folder.out / "conflicts-2.csv")
    assert [row["finding"] for row in folder.rows("conflicts-2.csv")] == ["Lung cyst"]
    second = folder.fill("conflicts-2.csv", by="C", **{"scan_0_0 Lung cyst": "0"})
    result = folder.make(a, b, first, second)
    assert (result.open, result.conflicts) == (0, None)
    values = read_labels(folder.out / "labels.csv").values
    assert list(values[0]) == [True, False, False]
    # What was settled is no agreement.
    assert result.agreement[0].agreed == result.agreement[0].cells - 2


def test_answers_that_contradict_a_parent_are_told_and_can_be_settled(folder):
    folder.first(findings="Empyema,Pleural effusion")
    sheet = folder.fill(**{"scan_10_0 Pleural effusion": "0"})
    assert folder.make(sheet).open == 2
    rows = folder.rows("conflicts.csv")
    assert {row["opinions"] for row in rows} == {
        "Empyema is there (A: 1) and implies Pleural effusion, which is not (A: 0)"}
    settled = folder.fill("conflicts.csv", by="C", **{"scan_10_0 Pleural effusion": "1"})
    assert folder.make(sheet, settled).open == 0


def test_work_is_never_written_over(folder):
    folder.first()
    review = folder.out / "review.csv"
    folder.first(findings="Empyema")
    assert {row["finding"] for row in folder.rows("review.csv")} == {"Empyema"}
    folder.first()
    part = [f"scan_{number}_0 Empyema" for number in (0, 10)]
    folder.fill(only=part)
    kept = review.read_bytes()
    folder.refused(f"{review} has been written into", f"--review {review}", "another --out")
    result = folder.make(review)
    assert result.sheet is None and review.read_bytes() == kept
    # More findings: more rows, in a sheet of their own, and no row twice.
    result = folder.make(review, findings=f"{FINDINGS},Osteophyte")
    assert result.sheet == str(folder.out / "review-2.csv") and review.read_bytes() == kept
    assert {row["finding"] for row in folder.rows("review-2.csv")} == {"Osteophyte"}
    assert folder.make(review).sheet is None
    second = folder.fill("review-2.csv", by="B")
    folder.refused("review-2.csv has been written into", reviews=[review])
    folder.make(review, second)
    assert review.read_bytes() == kept
    assert [sheet["answers"] for sheet in folder.json()["sheets"]] == [2, 5]
    # Labels that were reviewed do not silently become drafts again.
    second.unlink()
    folder.refused("come from review-2.csv too", reviews=[review])
    review.unlink()
    folder.refused("come from review.csv, review-2.csv too")


def test_only_a_note_is_work_too(folder):
    folder.first()
    text = (folder.out / "review.csv").read_text()
    (folder.out / "review.csv").write_text(text.replace(",,,,\n", ",,,,look again\n", 1))
    folder.refused("has been written into")
    (folder.out / "review.csv").write_bytes(b"PK\x03\x04")
    folder.refused("review.csv is a workbook")


def test_a_sheet_of_other_summaries_is_refused_by_name(folder):
    folder.first()
    sheet = folder.fill()
    text = folder.summaries.read_text()
    folder.summaries.write_text(text.replace('"Pleural effusion", "Empyema"', '"Lung nodule"'))
    folder.refused("review.csv has the draft 1 for Empyema", "now say 0", reviews=[sheet])
    folder.summaries.write_text("\n".join(text.splitlines()[:20]))
    folder.refused("review.csv names the id", "no summary", reviews=[sheet])


def test_a_folder_keeps_what_it_was_asked(folder):
    folder.twins(min_positives=1, seed=4)
    assert folder.json()["too_rare"] == {"Pneumothorax": 0}
    before = folder.bytes()
    folder.make()
    after = folder.bytes()
    assert {name for name in before if before[name] != after[name]} <= {"labels.json"}
    assert folder.json()["request"] == Request(
        findings=["Empyema", "Pneumothorax", "Lung cyst"], min_positives=1, negatives=5, seed=4,
        reports=str(folder.reports), text_column=[], patient_column="patient", scan_column="scan",
    )._asdict()


def test_where_labels_come_from_is_written_down(folder):
    folder.twins()
    sheet = folder.fill()
    folder.make(sheet)
    found = folder.json()
    assert found["summaries"] == {
        "file": "s.jsonl", "backends": ["lexicon/1"],
        "sha256": hashlib.sha256(folder.summaries.read_bytes()).hexdigest()}
    assert found["sheets"] == [{
        "file": "review.csv", "sha256": hashlib.sha256(sheet.read_bytes()).hexdigest(),
        "rows": 29, "answers": 29}]
    assert found["findings"]["Empyema"]["right"] == {
        "count": 4, "of": 4, "value": 1.0, "low": pytest.approx(0.025 ** 0.25), "high": 1.0}
    assert {"written", "brgsa_jax", "vocabulary_sha256"} <= set(found)
    assert (found["ids"], found["reports"], found["failed"]) == (47, 39, 1)


def test_the_default_is_the_long_tail_of_ct_rate(folder):
    assert tuple(folder.make().findings) == CT_RATE_LT_15


def test_labels_judge_scores_by_brgsa_metrics(folder, capsys):
    folder.twins(findings="Empyema,Lung cyst")
    sheet = folder.fill(**{"scan_0_0 Empyema": "0"})
    folder.make(sheet)
    labels = read_labels(folder.out / "labels.csv", patients="patient")
    scores = np.random.default_rng(0).normal(size=labels.values.shape)
    write_scores(folder.path / "scores.csv", labels.ids[::-1], labels.names, scores)
    assert cli.main(["metrics", "--scores", str(folder.path / "scores.csv"), "--labels",
                     str(folder.out / "labels.csv"), "--patients", "patient", "--out",
                     str(folder.path / "judged")]) == 0
    assert "macro AUROC" in capsys.readouterr().out
    found = json.loads((folder.path / "judged" / "metrics.json").read_text())["findings"]
    for column, name in enumerate(labels.names):
        expected = roc_auc_score(labels.values[::-1, column], scores[:, column])
        assert found[name]["auroc"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize(("request_", "words"), [
    ({"findings": "Empyma"}, ["'Empyma'", "'Empyema'"]),
    ({"findings": FINDINGS, "min_positives": 99}, ["99 reports", "--min-positives"]),
    ({"scan_column": "scan"}, ["--scan-column needs --reports"]),
    ({"text_column": ["text"], "patient_column": "p"},
     ["--text-column, --patient-column needs --reports"]),
    ({"reports": "r.csv"}, ["--reports needs --text-column or --patient-column"]),
    ({"reports": "r.csv", "scan_column": "scan"}, ["r.csv cannot be read"])])
def test_requests_that_cannot_be_met_are_told(folder, request_, words):
    folder.refused(*words, **request_)
    assert not folder.out.exists()


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"request": {"findings": ["Dragon pox"]}, "sheets": []}',
    '{"request": {"negatives": "5"}, "sheets": []}', '{"request": {"colour": 1}, "sheets": []}',
    '{"request": {"seed": 1.5}, "sheets": []}', '{"request": {}, "sheets": [1]}', "[" * 99_999,
    '{"request": {"findings": 3}, "sheets": []}', '{"request": {"negatives": -5}, "sheets": []}',
    '{"request": {"text_column": [1], "reports": "r"}, "sheets": []}'])
def test_a_folder_of_something_else_is_left_alone(folder, content):
    folder.out.mkdir()
    (folder.out / "labels.json").write_text(content)
    folder.refused("labels.json is not what brgsa data labels wrote", "another --out")
    (folder.out / "labels.json").unlink()
    (folder.out / "labels.csv").write_text("id,Empyema\na,1\n")
    folder.refused("holds a labels.csv of something else", "another --out")
