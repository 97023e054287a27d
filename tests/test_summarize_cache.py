"""The cache of summaries, and tables of reports in and out."""

import json
import os
import signal
import subprocess
import sys

import pytest

from brgsa_jax.config import UserError
from brgsa_jax.summarize.cache import Cache, cache_key
from brgsa_jax.summarize.run import summarize_table
from brgsa_jax.summarize.validate import NORMAL, InvalidAnswer


class Words:
    """A backend that knows two words and remembers what it was asked."""

    def __init__(self, name="words/1", dies_after=None, silent=False):
        self.name, self.dies_after, self.silent, self.asked = name, dies_after, silent, []

    def summarize(self, reports):
        # Backwards: answers come in any order.
        for position, report in reversed(list(enumerate(reports))):
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise UserError("the server is gone; start it again")
            self.asked.append(report)
            if self.silent:
                continue
            if "gibberish" in report:
                yield position, InvalidAnswer("the answer is not JSON")
            else:
                yield position, ("Empyema",) * ("pus" in report) + ("Lung cyst",) * (
                    "cyst" in report)


def table_of(folder, rows, name="reports.csv"):
    path = folder / name
    delimiter = "\t" if name.endswith("tsv") else ","
    path.write_text("\n".join(delimiter.join(row) for row in [("id", "text"), *rows]) + "\n")
    return path


def run(table, backend, tmp_path, **more):
    out = tmp_path / "out.jsonl"
    counts = summarize_table(table, text_column=more.pop("text_column", "text"), out=out,
                             backend=backend, **more)
    return counts, [json.loads(line) for line in out.read_text().splitlines()]


ROWS = [("b", "a cyst"), ("a", "pus"), ("e", ""), ("n", "all fine"), ("x", "gibberish"),
        ("c", "a cyst"), ("f", "Not given.")]


@pytest.mark.parametrize("name", ["reports.csv", "reports.tsv", "reports.jsonl"])
def test_every_row_comes_out_in_order(name, tmp_path):
    if name.endswith("jsonl"):
        table = tmp_path / name
        table.write_text("\n\n".join(json.dumps({"id": i, "text": t or None}) for i, t in ROWS))
    else:
        table = table_of(tmp_path, ROWS, name)
    backend, seen = Words(), []
    counts, rows = run(table, backend, tmp_path, progress=lambda *done: seen.append(done))
    assert [row["id"] for row in rows] == [i for i, _ in ROWS]
    assert [row["status"] for row in rows] == [
        "ok", "ok", "failed: empty report", "normal", "failed: the answer is not JSON", "ok",
        "failed: empty report"]
    assert rows[1] == {"id": "a", "findings": ["Pleural effusion", "Empyema"], "status": "ok",
                       "sentences": ["There is Pleural effusion", "There is Empyema"],
                       "backend": "words/1"}
    assert rows[3]["sentences"] == [NORMAL]
    assert counts == (7, 3, 1, 3, 4, 0)
    assert sorted(backend.asked) == ["a cyst", "all fine", "gibberish", "pus"]
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_rerun_asks_only_for_what_failed(tmp_path):
    table = table_of(tmp_path, ROWS)
    with Cache(tmp_path / "cache") as cache:
        _, first = run(table, Words(), tmp_path, cache=cache)
    with Cache(tmp_path / "cache") as cache:
        again = Words()
        counts, second = run(table, again, tmp_path, cache=cache)
        assert second == first
        assert again.asked == ["gibberish"]
        assert (counts.asked, counts.cached) == (1, 3)
        other = Words("words/2")
        run(table, other, tmp_path, cache=cache)
        assert len(other.asked) == 4
    kept = (tmp_path / "cache").read_text()
    assert "cyst" not in kept.replace("Lung cyst", "") and "pus" not in kept


def test_a_backend_that_dies_loses_nothing(tmp_path):
    table = table_of(tmp_path, ROWS)
    with Cache(tmp_path / "cache") as cache:
        with pytest.raises(UserError, match="start it again"):
            run(table, Words(dies_after=3), tmp_path, cache=cache)
        assert not (tmp_path / "out.jsonl").exists()
        rest = Words()
        run(table, rest, tmp_path, cache=cache)
    assert sorted(rest.asked) == ["a cyst", "gibberish"]


def test_a_backend_that_says_nothing_is_told(tmp_path):
    counts, rows = run(table_of(tmp_path, ROWS), Words(silent=True), tmp_path)
    assert {row["status"] for row in rows} == {
        "failed: the backend gave no answer", "failed: empty report"}
    assert (counts.ok, counts.normal, counts.failed) == (0, 0, 7)


def test_an_answer_twice_is_a_programming_error(tmp_path):
    class Doubled(Words):
        def summarize(self, reports):
            yield 0, ()
            yield 0, ()

    with pytest.raises(RuntimeError, match="twice"):
        run(table_of(tmp_path, ROWS), Doubled(), tmp_path)


def test_columns(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes("\ufeffVolume, Findings ,Impression\nv1,a cyst,\"pus,\nmuch\"\n"
                      "v2,Not given.,pus\nv2,Not given.,pus\n".encode())
    backend = Words()
    _, rows = run(table, backend, tmp_path, text_column=["Findings", "Impression"],
                  id_column="Volume")
    assert [row["id"] for row in rows] == ["v1", "v2", "v2"]
    assert sorted(backend.asked) == ["a cyst\npus,\nmuch", "pus"]
    _, rows = run(table, Words(), tmp_path, text_column="Impression")
    assert [row["id"] for row in rows] == ["1", "2", "3"]


@pytest.mark.parametrize(("name", "content", "options", "message"), [
    ("t.csv", b"id,text\n1,a\n", {"text_column": "Text"}, "no column 'Text'; its columns are id"),
    ("t.csv", b"id,text\n1,a\n", {"id_column": "key"}, "no column 'key'"),
    ("t.csv", b"id,text\n", {}, "no rows"),
    ("t.csv", b"", {}, "no column 'text'; its columns are none"),
    ("t.csv", b"id,text\n1,a\xff\n", {}, "not UTF-8"),
    ("t.csv", b"id,text\n1,a\n2,b\n1,c\n", {}, "rows 1 and 3 have the same id '1'"),
    ("t.csv", b"id,text\n,a\n", {}, "row 1 has no id"),
    ("t.xlsx", b"PK", {}, "is not a table"),
    ("t.jsonl", b'{"id": 1, "text": "a"}\n{"id"\n', {}, "line 2 of .* is no JSON"),
    ("t.jsonl", b"[1]\n", {}, "line 1 of .* is no JSON object"),
    ("t.jsonl", b"[" * 100_000, {}, "line 1 of .* is no JSON"),
    ("t.jsonl", b'{"id": 1}\n', {}, "no column 'text'"),
])
def test_tables_that_cannot_be_used_are_refused(name, content, options, message, tmp_path):
    table = tmp_path / name
    table.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(table, Words(), tmp_path, **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_tables_and_bad_outputs_are_refused_before_reading(tmp_path):
    table = table_of(tmp_path, ROWS)
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path / "none.csv", Words(), tmp_path)
    backend = Words()
    for out, message in ((tmp_path, "a folder"), (table, "the table itself"),
                         (table / "below" / "o.jsonl", "nothing can be written")):
        with pytest.raises(UserError, match=message):
            summarize_table(table, text_column="text", out=out, backend=backend)
    assert not backend.asked


def test_lone_surrogates_survive(tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"id": "\\ud800", "text": "a cyst \\ud800"}\n')
    with Cache(tmp_path / "cache") as cache:
        _, rows = run(table, Words(), tmp_path, cache=cache)
    assert rows[0]["findings"] == ["Lung cyst"]


def test_keys_depend_on_backend_and_report():
    keys = {cache_key(*pair) for pair in (("a", "b"), ("a", "c"), ("ab", ""), ("", "ab"))}
    assert len(keys) == 4
    assert cache_key("a", "b") == cache_key("a", "b")


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "deep" / "cache.jsonl"
    with Cache(path) as cache:
        cache.put("k1", ("Empyema",))
        cache.put("k2", ())
        cache.put("k2", ())
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Cache(path) as cache:
            cache.put("k3", ("Lung cyst",))
        with Cache(path) as cache:
            assert cache.get("k3") == ("Lung cyst",)
            assert cache.get("k1") in (None, ("Pleural effusion", "Empyema"))
    path.write_bytes(b'[1]\n{"key": 3, "findings": []}\n{"key": "a", "findings": ["Dragon"]}\n'
                     b'\xff\xfe\n\n{"key": "b", "findings": null}\n' + whole)
    with Cache(path) as cache:
        assert len(cache) == 2
        assert cache.get("k2") == () and cache.get("a") is None


def test_a_kill_loses_at_most_the_entry_being_written(tmp_path):
    path = tmp_path / "cache.jsonl"
    code = ("import sys; from brgsa_jax.summarize.cache import Cache\n"
            "cache = Cache(sys.argv[1])\n"
            "for number in range(10**6):\n"
            "    cache.put(f'k{number}', ('Lung cyst',)); print(number, flush=True)")
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    for _ in range(200):
        last = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    last = int((child.stdout.read().split() or [last])[-1])
    child.wait()
    with Cache(path) as cache:
        assert len(cache) >= last + 1
        assert all(cache.get(f"k{number}") for number in range(last + 1))


def test_a_cache_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        Cache(tmp_path)
