"""The report: self-contained, escaped, and with the numbers of the evaluations it was given."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals import evaluate as ev
from brgsa_jax.evals import report as rep
from brgsa_jax.evals.protocol import Protocol

FINDINGS = ("Alpha", "Beta", "Gamma & <Delta>")
IDS = tuple(f"v{i}" for i in range(40))
PNG = b"\x89PNG\r\n\x1a\nnot really"


def judge(seed=0, noise=1.0, bank=True, captions=True, empty=False):
    rng = np.random.default_rng(5)
    labels = rng.random((40, 3)) < 0.35
    prompts = rng.normal(size=(3, 10))
    image = labels @ prompts + noise * np.random.default_rng(seed).normal(size=(40, 10))
    text = labels @ prompts + 0.1
    if empty:
        labels[:, 1] = False
    bridged = {"image_bridged": image + 0.5, "prompts_bridged": prompts + 0.5,
               "captions_bridged": text + 0.5} if bank else {}
    return ev.evaluate(Protocol("three", FINDINGS, resamples=50), ids=IDS,
                       patients=[f"p{i // 2}" for i in range(40)], findings=FINDINGS,
                       labels=labels, embeddings=ev.Embeddings(
                          image, prompts, text if captions else None, **bridged))


def page(**changes):
    main = judge()
    history = [{"step": s, "loss": 3.0 - s / 10, "contrast": 1.0, "samples_per_sec": 9.0,
                "learning_rate": 1e-4} for s in range(10)]
    models = [rep.ModelResult("brgsa", "BrgSA", main, history),
              rep.ModelResult("untrained", "Untrained", judge(1, 60.0), untrained=True),
              rep.ModelResult("clip", "CLIP", judge(2, 2.0, bank=False), history)]
    samples = [rep.sample_case(main, key, PNG) for key in rep.choose_samples(main, 2)]
    data = {"title": "T", "dataset": "D", "models": models, "samples": samples,
            "environment": {"Devices": "one"}, "date": "2025-01-31", "phantom": True}
    return rep.render(rep.ReportData(**(data | changes)))


class Checker(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are balanced."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.targets, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.targets += [value for name, value in attrs
                         if name in ("src", "href", "action", "data") or name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_page_is_self_contained_and_well_formed():
    html = page()
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.tags.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert checker.targets and all(t.startswith("data:image/png;base64,") for t in checker.targets)
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_headline_intervals_and_differences_are_those_of_the_evaluations():
    main, clip = judge(), judge(2, 2.0, bank=False)
    text = text_of(page())
    assert f"{main.macro_auroc.value:.3f}" in text
    assert rep.headline(main).removeprefix("macro AUROC ") in text
    assert rep.headline(clip).removeprefix("macro AUROC ") in text
    found = ev.compare(main, clip)
    assert f"BrgSA − CLIP {rep._signed(found.auroc)}" in text
    bridged = found.distance["bridged", "direct"]
    assert "BrgSA bridged − CLIP direct" in text and rep._signed(bridged) in text
    for entry in main.metrics["findings"].values():
        assert f"{entry['auroc']['value']:.3f}" in text
        assert f"{entry['auprc']['value']:.3f}" in text
    for kind in ("direct", "bridged", "image_bridged"):
        assert f"{main.gaps[kind].gap.distance.value:.3f}" in text
    assert main.protocol.hash in text and "2025-01-31" in text


def test_headline_line_for_the_terminal():
    assert re.fullmatch(r"macro AUROC 0\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)", rep.headline(judge()))


def test_phantom_patients_are_named_as_such_only_when_they_are():
    assert "Phantom patients, not real ones" in text_of(page())
    assert "hantom patients" not in text_of(page(phantom=False))


def test_text_from_outside_cannot_become_markup():
    attack = '<script>alert(1)</script>"\'&'
    main = judge()
    html = page(title=attack, dataset=attack, notes=[attack], environment={attack: attack},
                models=[rep.ModelResult("a", attack, main, [{"step": 0, attack: 1.0},
                                                            {"step": 1, attack: 2.0}]),
                        rep.ModelResult("b", attack + "2", judge(3),
                                        [{"step": 0, attack: 1.0}])],
                samples=[rep.SampleCase(attack, PNG, (rep.RankedFinding(attack, 1.0, True),),
                                        (attack, attack + "x"))])
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 15
    assert "Gamma &amp; &lt;Delta&gt;" in html and "<Delta>" not in html
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and "script" not in checker.tags


def test_one_model_without_captions_history_or_samples():
    html = page(models=[rep.ModelResult("m", "Only", judge(bank=False, captions=False))],
                samples=[], phantom=False, environment={})
    text = text_of(html)
    assert "Modality gap" not in text and "Training" not in text and "Sample" not in text
    assert "Paired difference" not in text and "Open dots" not in text
    assert "ROC curves" in text


def test_undefined_findings_are_told_and_shown_as_dashes():
    text = text_of(page(models=[rep.ModelResult("m", "Only", judge(empty=True))], samples=[]))
    assert "left out of every mean: Beta." in text
    assert re.search(r"Beta 0 – no interval", text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_training_curves_leave_bookkeeping_out():
    html = page()
    titles = re.findall(r"<title>([^<]*) over training</title>", html)
    assert titles == ["loss", "contrast"]


def test_samples_are_ranked_within_each_finding_and_checked_against_the_truth():
    main = judge()
    case = rep.sample_case(main, "v7", PNG, top=2)
    scores = main.scores["mean"]
    standard = ((scores - scores.mean(0)) / scores.std(0))[7]
    order = np.argsort(-standard)[:2]
    assert [f.name for f in case.top] == [FINDINGS[p] for p in order]
    assert [f.deviations for f in case.top] == pytest.approx(standard[order])
    assert [f.present for f in case.top] == main.labels[7][order].tolist()
    assert set(case.truth) == {FINDINGS[p] for p in range(3) if main.labels[7, p]}
    assert set(case.missed) == set(case.truth) - {f.name for f in case.top}
    with pytest.raises(UserError, match="'nobody' was not evaluated"):
        rep.sample_case(main, "nobody", PNG)


def test_chosen_samples_do_not_depend_on_order_or_scores():
    import dataclasses

    main = judge()
    turned = dataclasses.replace(judge(9, 5.0), ids=main.ids[::-1])
    assert rep.choose_samples(main, 5) == rep.choose_samples(turned, 5)
    assert len(set(rep.choose_samples(main, 5))) == 5


@pytest.mark.parametrize("value, shown", [(0.12345, "0.123"), (-0.0001, "0.000"),
                                          (-0.25, "−0.250"), (float("nan"), "–"), (None, "–")])
def test_numbers_are_aligned_and_never_minus_zero(value, shown):
    assert rep._number(value) == shown


def test_bad_sets_of_models_are_refused():
    with pytest.raises(UserError, match="at least one model"):
        page(models=[])
    with pytest.raises(UserError, match="different names"):
        page(models=[rep.ModelResult("a", "A", judge()), rep.ModelResult("a", "B", judge())])


def test_report_is_written_to_the_path(tmp_path):
    path = rep.write_report(tmp_path / "eval" / "report.html",
                            rep.ReportData("T", [rep.ModelResult("m", "M", judge())], "D"))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_environment_names_no_host_and_no_folder():
    import os
    import platform

    found = rep.describe_environment(device_kind="TPU v5e")
    assert found["device kind"] == "TPU v5e" and found["Python"] == platform.python_version()
    everything = " ".join(found.values())
    assert os.getcwd() not in everything and platform.node() not in everything.split()
