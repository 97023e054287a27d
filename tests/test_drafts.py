"""Draft labels: findings by name, what summaries may look like, and the table of the reports."""

import json

import pytest

from brgsa_jax.config import UserError
from brgsa_jax.summarize.drafts import Request, choose_findings, read_cases, read_drafts
from brgsa_jax.summarize.vocabulary import CT_RATE_18, CT_RATE_LT_15, VOCABULARY


def summary(id, *findings, status=None, **more):
    return {"id": id, "findings": list(findings), "sentences": [],
            "status": status or ("ok" if findings else "normal"), "backend": "lexicon/1", **more}


def written(tmp_path, *rows, name="s.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n"
                            for row in rows))
    return path


def told(call, *words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_findings_are_chosen_by_name_synonym_group_and_file(tmp_path):
    file = tmp_path / "rare.txt"
    file.write_text("\ufeff# rare ones\nEmpyema\n\n  pneumothoraces \n")
    assert choose_findings("@ct-rate-18") == CT_RATE_18
    assert choose_findings("@all") == VOCABULARY
    assert choose_findings("GGO, Lung cyst,ggo") == ("Ground glass opacity", "Lung cyst")
    assert choose_findings(f"{file},@ct-rate-lt") == (
        "Empyema", "Pneumothorax", *(name for name in CT_RATE_LT_15
                                     if name not in ("Empyema", "Pneumothorax")))


@pytest.mark.parametrize(("text", "words"), [
    ("", ["names no finding", "@ct-rate-lt"]), (" , ", ["names no finding"]),
    ("Empyma", ["unknown finding 'Empyma'", "did you mean 'Empyema'", "file"]),
    ("@ct-rate-19", ["@ct-rate-18"]), ("no.txt", ["'no.txt'", "file"])])
def test_findings_nobody_knows_are_told(text, words):
    told(lambda: choose_findings(text), *words)


def test_a_bad_line_of_a_file_of_findings_is_told_with_its_number(tmp_path):
    file = tmp_path / "rare.txt"
    file.write_text("Empyema\nEmphysem\n")
    told(lambda: choose_findings(str(file)), "line 2 of", "rare.txt", "'Emphysema'")
    file.write_bytes(b"\xff\xfe")
    told(lambda: choose_findings(str(file)), "rare.txt is no text in UTF-8")
    file.write_text("# nothing\n")
    told(lambda: choose_findings(str(file)), "names no finding")


def test_summaries_keep_their_order_and_failures_apart(tmp_path):
    found = read_drafts(written(
        tmp_path, summary("b", "Bronchopneumonia"), summary("a"), summary("b", "Bronchopneumonia"),
        summary("c", status="failed: empty report", backend="other"), summary(7)))
    # What a hand-made file leaves out is completed.
    assert list(found.found.items()) == [
        ("b", {"Bronchopneumonia", "Pneumonia", "Lung opacity"}), ("a", set()), ("7", set())]
    assert found.failed == {"c": "its summary failed: empty report"}
    assert found.backends == ["lexicon/1", "other"]


@pytest.mark.parametrize(("rows", "words"), [
    ([summary("a"), summary("b", "Dragon pox")], ["Dragon pox", "'b'", "again"]),
    ([summary("a"), summary("a", "Empyema")], ["row 2 of", "'a'"]),
    ([summary("a", status="failed: x"), summary("a")], ["'a'", "failed"]),
    ([summary("")], ["row 1 of", "no id"]), ([summary("a\nb")], ["id 'a\\nb'"]),
    ([summary("a\ud800")], ["'a\\ud800'"]),
    ([summary("a"), summary("a\x00b", status="failed: x")], ["'a\\x00b'"]),
    ([summary("a", 3)], ["'findings'"]), ([{"id": "a"}], ["no column 'findings'"]),
    (["{"], ["line 1 of", "no JSON"]), ([], ["has no column 'id'"]),
    ([summary("a", status="failed: x")], ["all 1 summaries", "failed"])])
def test_summaries_that_are_none_are_told(tmp_path, rows, words):
    told(lambda: read_drafts(written(tmp_path, *rows)), "s.jsonl", *words)


def test_any_table_of_findings_will_do(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("id,findings\na,Empyema;Lung cyst\nb,\n")
    assert read_drafts(path) == (
        {"a": {"Empyema", "Pleural effusion", "Lung cyst"}, "b": set()}, {}, [])
    told(lambda: read_drafts(tmp_path / "none.jsonl"), "none.jsonl cannot be read")


SUMMARIES = [summary("a_1", "Empyema"), summary("b_1"), summary("a_2", "Empyema"),
             summary("c_1", status="failed: x")]
TABLE = ("id,scan,patient,text,more\na_1,a,p,one,1\na_2,a,p,one,1\nb_1,b,q,two,2\n"
         "d_1,,,four,4\n")


def cases(tmp_path, table=TABLE, **asked):
    if asked.get("reports", "") is not None:
        asked["reports"] = str(tmp_path / "reports.csv")
        (tmp_path / "reports.csv").write_text(table)
    else:
        asked["reports"] = ""
    return read_cases(read_drafts(written(tmp_path, *SUMMARIES)), Request()._replace(**asked))


def test_without_a_table_every_volume_is_its_own_report(tmp_path):
    found, patients = cases(tmp_path, reports=None)
    assert [(id, case.ids, case.text) for id, case in found.items()] == [
        ("a_1", ("a_1",), ""), ("b_1", ("b_1",), ""), ("a_2", ("a_2",), "")]
    assert patients == {}


def test_the_table_joins_patients_scans_and_texts_by_id(tmp_path):
    found, patients = cases(tmp_path, patient_column="patient", scan_column="scan")
    assert found["a_1"] is found["a_2"] and found["a_1"].ids == ("a_1", "a_2")
    assert list(found) == ["a_1", "b_1", "a_2"] and not found["a_1"].text
    assert patients == {"a_1": "p", "a_2": "p", "b_1": "q"}
    found, patients = cases(tmp_path, text_column=("text", "more"))
    assert [case.text for case in found.values()] == ["one 1", "two 2", "one 1"]
    assert patients == {}


@pytest.mark.parametrize(("table", "asked", "words"), [
    (TABLE, {"scan_column": "skan"}, ["reports.csv has no column 'skan'"]),
    (TABLE.replace("two", "one"), {"id_column": "text", "scan_column": "scan"},
     ["row 3 of", "another one", "'one'"]),
    (TABLE.replace("b_1", "x_1"), {"scan_column": "scan"}, ["1 ids", "'b_1'", "--id-column"]),
    (TABLE.replace("id,", "name,"), {"scan_column": "scan"}, ["3 ids", "--id-column"]),
    (TABLE.replace("b,q", "b,"), {"patient_column": "patient"}, ["row 3 of", "no patient"]),
    (TABLE.replace("b_1,b", "b_1,a"), {"scan_column": "scan"},
     ["'a_1' and 'b_1'", "scan 'a'", "different findings", "--scan-column"])])
def test_tables_that_do_not_fit_are_told(tmp_path, table, asked, words):
    told(lambda: cases(tmp_path, table, **asked), *words)
