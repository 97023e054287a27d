"""`brgsa summarize` and the sources of `brgsa data build` as commands."""

import json

import pytest

from brgsa_jax.cli import main


def test_reports_become_lists_of_findings(tmp_path, capsys):
    table, out = tmp_path / "reports.csv", tmp_path / "out.jsonl"
    table.write_text('id,report\na,"Bilateral pleural effusion. No pneumothorax."\n'
                     'b,"Unremarkable chest CT."\nc,\n')
    assert main(["summarize", str(table), "--text-column", "report", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert rows[0]["findings"] == ["Pleural effusion"]
    assert rows[1]["sentences"] == ["There is no abnormality"]
    assert rows[2]["status"] == "failed: empty report"
    assert "3 reports: 1 with findings, 1 normal, 1 failed" in capsys.readouterr().out
    # Nothing but the output stays behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "reports.csv"]


@pytest.mark.parametrize(("arguments", "match"), [
    (["--backend", "openai"], "needs --model"), (["--backend", "transformers"], "needs --model"),
    (["--backend", "openai", "--model", "m", "--endpoint", "https://example.com/v1"],
     "--send-reports-to"), (["--text-column", "none"], "none")])
def test_what_is_missing_is_one_sentence(arguments, match, tmp_path, capsys):
    table = tmp_path / "reports.csv"
    table.write_text("id,report\na,Normal.\n")
    command = ["summarize", str(table), "--out", str(tmp_path / "out.jsonl"), *arguments]
    if "--text-column" not in arguments:
        command += ["--text-column", "report"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("source", "match"), [("ct-rate", "needs --root"),
                                               ("rad-chestct", "needs --root"),
                                               ("folder", "needs --images and --table")])
def test_a_source_says_what_it_needs(source, match, tmp_path, capsys):
    assert main(["data", "build", "--source", source, "--out", str(tmp_path / "d")]) == 1
    assert match in capsys.readouterr().err
