"""The review sheet: through a spreadsheet and back, and every way to fill it in wrongly."""

import csv
import datetime

import pytest

from brgsa_jax.config import UserError
from brgsa_jax.summarize.sheet import Case, Question, is_filled, plain, read_sheet, write_sheet

HEADER = "id,finding,draft,corrected,by,when,note"
# What spreadsheets run or change.
IDS = ("scan_1.nii.gz", "00123", "1e5", "2024-1-2", "MAR1", "True", "=cmd()", "-5", "'x", "'=x",
       "=x", "+1", "@a", "Müller 3", "a,b;c\"d", "p17", "0", ".5")


def case(*ids, findings=("Empyema", "Pleural effusion"), text=""):
    return Case(ids, frozenset(findings), text)


CASES = {"a": case("a", "twin"), "b": case("b", findings=())}
CASES["twin"] = CASES["a"]
FINDINGS = ("Empyema", "Pneumothorax")


def sheet(tmp_path, *rows, header=HEADER, encoding="utf-8", name="review.csv"):
    path = tmp_path / name
    path.write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return path


def read(path):
    return read_sheet(path, CASES, FINDINGS)


def fill(path, **cells):
    """Fills every row in, as a reader does; returns what was in the sheet."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, **cells} for row in rows)
    return rows


def test_a_sheet_comes_back_with_every_id_whatever_a_spreadsheet_would_make_of_it(tmp_path):
    cases = {id: case(id) for id in IDS}
    path = tmp_path / "review.csv"
    write_sheet(path, [Question(one, "Empyema") for one in cases.values()])
    assert path.read_bytes().startswith(b"\xef\xbb\xbfid,finding,draft,corrected,by,when,note\n")
    assert not is_filled(path)
    written = fill(path, corrected="0", by="A", when="2026-03-14")
    assert is_filled(path)
    changed = {"=", "+", "-", "@", ".", *"0123456789"}
    assert not [row["id"] for row in written if row["id"][0] in changed]
    assert not {"MAR1", "True"} & {row["id"] for row in written}
    assert {row["id"] for row in written} > {"scan_1.nii.gz", "p17", "Müller 3"}
    found = read_sheet(path, cases, FINDINGS)
    assert [opinion.case for opinion in found.opinions] == list(IDS)


def test_an_id_whose_apostrophe_a_spreadsheet_took_away_is_still_found(tmp_path):
    cases = {"00123": case("00123")}
    path = sheet(tmp_path, "00123,Empyema,1,1,A,2026-03-14,")
    assert read_sheet(path, cases, FINDINGS).opinions[0].case == "00123"


def test_the_report_is_there_only_if_a_case_has_one_and_is_no_formula(tmp_path):
    path = tmp_path / "review.csv"
    write_sheet(path, [Question(case("a"), "Empyema")])
    assert "report" not in path.read_text(encoding="utf-8-sig")
    texts = ("=HYPERLINK(1)\n second line", "\t@SUM(1)", "x" * 40_000, "\ud800 half\x1b[31m", "")
    write_sheet(path, [Question(case("a", text=text), "Empyema") for text in texts])
    with path.open(encoding="utf-8-sig", newline="") as stream:
        found = [row["report"] for row in csv.DictReader(stream)]
    assert found[:2] == ["'=HYPERLINK(1) second line", "'@SUM(1)"]
    assert len(found[2]) == 32_766 and found[2].endswith("x … [cut, 40000 letters]")
    assert found[3:] == ["half [31m", ""]
    # A text that fits is whole, and a quoted one still fits.
    write_sheet(path, [Question(case("a", text=text * 32_766), "Empyema") for text in "x="])
    with path.open(encoding="utf-8-sig", newline="") as stream:
        assert [row["report"] for row in csv.DictReader(stream)] == [
            "x" * 32_766, "'" + "=" * 32_766]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_marks_case_and_blank_rows_of_spreadsheets_do_not_matter(tmp_path, delimiter,
                                                                           encoding):
    rows = [HEADER.title(), "a,Empyema,1.0,FALSE, Dr.  A ,2026-03-14 00:00:00,,,",
            ",,,,,,", "", "b,Empyema,0,,,", "twin,Pneumothorax,0,1,B,2026-3-15"]
    path = sheet(tmp_path, *(row.replace(",", delimiter) for row in rows[1:]),
                 header=rows[0].replace(",", delimiter), encoding=encoding)
    found = read(path)
    assert found.asked == {("a", "Empyema"), ("b", "Empyema"), ("a", "Pneumothorax")}
    assert [opinion[:6] for opinion in found.opinions] == [
        ("a", "Empyema", False, "Dr. A", "2026-03-14", False),
        ("a", "Pneumothorax", True, "B", "2026-03-15", False)]
    assert found.opinions[1].place == f"row 6 of {path}"


def test_names_and_dates_without_an_answer_are_no_answer(tmp_path):
    path = sheet(tmp_path, "a,Empyema,1,,A,someday,")
    assert read(path).opinions == () and is_filled(path)


@pytest.mark.parametrize(("texts", "dates"), [
    (["14.3.2026", "2026/03/14", "3.4.2026"], ["2026-03-14", "2026-03-14", "2026-04-03"]),
    (["3/4/2026", "3/14/2026"], ["2026-03-04", "2026-03-14"]),
    (["3/4/2026", "14/3/2026 8:15"], ["2026-04-03", "2026-03-14"]),
    (["3-3-2026"], ["2026-03-03"]),
    (["4-Mar-26", "14-MAR-2026", "1 September 2025"], ["2026-03-04", "2026-03-14", "2025-09-01"])])
def test_dates_are_read_as_the_rows_of_the_sheet_allow(tmp_path, texts, dates):
    path = sheet(tmp_path, *(f"a,Empyema,1,1,{n},{text}," for n, text in enumerate(texts)))
    assert [opinion.when for opinion in read(path).opinions] == dates


FUTURE = datetime.date.today() + datetime.timedelta(days=2)
GOOD = "a,Empyema,1,1,A,2026-03-14,"


@pytest.mark.parametrize(("rows", "words"), [
    (["c,Empyema,1,1,A,2026-03-14,"], ["row 2 of", "'c'", "no summary"]),
    ([GOOD, "a,Emphysema,1,1,A,2026-03-14,"], ["row 3 of", "'Emphysema'", "not labelled here"]),
    ([GOOD, "", "b,Empyema,1,,,,"], ["row 4 of", "draft 1", "summaries now say 0"]),
    (["a,Empyema,,1,A,2026-03-14,"], ["row 2 of", "'draft' is empty"]),
    ([GOOD, "a,Empyema,1,maybe,A,2026-03-14,"], ["row 3 of", "'corrected' is 'maybe'", "0 or 1"]),
    (["a,Empyema,1,2,A,2026-03-14,"], ["row 2 of", "'2'"]),
    (["a,Empyema,1,1,,2026-03-14,"], ["row 2 of", "nobody in the column 'by'"]),
    (["a,Empyema,1,1,\x1b,2026-03-14,"], ["row 2 of", "nobody in the column 'by'"]),
    (["a,Empyema,1,1,A,,"], ["row 2 of", "''", "2026-03-14"]),
    (["a,Empyema,1,1,A,2026-02-30,"], ["row 2 of", "2026-02-30"]),
    (["a,Empyema,1,1,A,46095,"], ["row 2 of", "46095"]),
    (["a,Empyema,1,1,A,3/14/26,"], ["row 2 of", "3/14/26"]),
    (["a,Empyema,1,1,A,31-Jun-2025,"], ["row 2 of", "31-Jun-2025"]),
    (["a,Empyema,1,1,A,4-Mai-2025,"], ["row 2 of", "4-Mai-2025"]),
    (["a,Empyema,1,1,A,0000-01-01,"], ["row 2 of", "0000-01-01"]),
    ([f"a,Empyema,1,1,A,{FUTURE},"], ["row 2 of", f"{FUTURE}"]),
    ([GOOD, "b,Empyema,0,1,A,3/4/2026,"], ["row 3 of", "days from months", "14-Mar-2026"]),
    (["a,Empyema,1,1,A,14/3/2026,", "b,Empyema,0,1,A,3/14/2026,"], ["rows 2 and 3 of", "orders"]),
    (["a,Empyema,1,1,A,2026-03-14,,, stray"], ["row 2 of", "more cells than the header"]),
    (['a,Empyema,1,1,A,2026-03-14,"unclosed'], ["no CSV in UTF-8", "save it as CSV UTF-8"]),
])
def test_a_wrong_row_is_told_in_one_sentence_with_its_number(tmp_path, rows, words):
    with pytest.raises(UserError) as error:
        read(sheet(tmp_path, *rows))
    message = str(error.value)
    assert "\n" not in message and "review.csv" in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04 a workbook", b"id,finding\n", b"\xff\xfei\x00d\x00", b"\n\n",
    (HEADER + "\na,Empyema,1,1,M\xfcller,2026-03-14,\n").encode("latin-1"),
    HEADER.replace("note", "by").encode(), HEADER.replace("draft", "Draft?").encode()])
def test_what_is_no_sheet_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "review.csv"
    path.write_bytes(content)
    for reader in (read, is_filled):
        with pytest.raises(UserError, match="review.csv"):
            reader(path)


def test_a_missing_sheet_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv cannot be read"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)


def test_plain_text_has_no_control_characters():
    assert plain(" a\n\tb\x00\u2028c\ud800 ") == "a b c"
