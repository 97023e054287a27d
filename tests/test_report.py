"""The report: self-contained, escaped, and with the numbers of the evaluations it was given."""

import dataclasses
import functools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.evals import evaluate as ev
from brgsa_jax.evals import report as rep
from brgsa_jax.evals import report_scores as scores
from brgsa_jax.evals import report_text as text
from brgsa_jax.evals.calibration import calibrate, reliability
from brgsa_jax.evals.metrics import roc_curve
from brgsa_jax.evals.protocol import Prompts, Protocol
from brgsa_jax.evals.score_files import evaluate_files

FINDINGS = ("Alpha", "Beta", "Gamma & <Delta>")
IDS = tuple(f"v{i}" for i in range(40))
PNG = b"\x89PNG\r\n\x1a\nnot really"


def three(**fields):
    return Protocol("three", FINDINGS, resamples=20, **fields)


@functools.cache
def judge(seed=0, noise=1.0, bank=True, captions=True, empty=False, protocol=None):
    rng = np.random.default_rng(5)
    labels = rng.random((40, 3)) < 0.35
    protocol = three(**dict(protocol or ()))
    signs = [(p, 1.0) for p in range(3)] + [(p, -0.5) for p in range(3)]
    prompts = rng.normal(size=(3, 10))
    texts = np.stack([sign * prompts[p] for p, sign in signs[:len(protocol.texts)]])
    image = labels @ prompts + noise * np.random.default_rng(seed).normal(size=(40, 10))
    reports = labels @ prompts + 0.1
    if empty:
        labels[:, 1] = False
    bridged = {"image_bridged": image + 0.5, "prompts_bridged": texts + 0.5,
               "captions_bridged": reports + 0.5} if bank else {}
    return ev.evaluate(protocol, ids=IDS, patients=[f"p{i // 2}" for i in range(40)],
                       findings=FINDINGS, labels=labels, embeddings=ev.Embeddings(
                          image, texts, reports if captions else None, **bridged))


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
    assert checker.targets and all(t.startswith(("data:image/png;base64,", "#"))
                                   for t in checker.targets)
    links = {target[1:] for target in checker.targets if target[0] == "#"}
    assert links == set(re.findall(r'<section id="(\w+)"', html))
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def text_escape(name):
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shown(found, difference=False):
    """A figure of a table: the value, and its interval below."""
    value = text.plus(found) if difference else text.number(found)
    return f"{value} {text.span(found)}"


def test_headline_intervals_and_differences_are_those_of_the_evaluations():
    main, clip = judge(), judge(2, 2.0, bank=False)
    told = text_of(page())
    assert shown(main.macro_auroc) in told and shown(clip.macro_auroc) in told
    found = ev.compare(main, clip)
    assert f"BrgSA − CLIP {text.signed(found.auroc)}" in told
    bridged = found.distance["bridged", "direct"]
    assert f"BrgSA bridged − CLIP direct {shown(bridged, True)}" in told
    assert f"Mean AUPRC {shown(found.macro['auprc'].interval, True)}" in told
    for name, entry in main.metrics["findings"].items():
        assert shown(entry["auroc"]) in told and shown(entry["auprc"]) in told
        assert text.span(entry["delong"]) in told
        assert shown(found.findings[name].interval, True) in told
    for kind in ("direct", "bridged", "image_bridged"):
        gap = main.gaps[kind].gap
        assert shown(gap.distance) in told and shown(gap.separability) in told
    assert main.protocol.hash in told and "2025-01-31" in told


def test_retrieval_stands_beside_chance_and_its_numbers():
    main = judge()
    told = text_of(page(models=[rep.ModelResult("m", "Only", main)]))
    found = main.metrics["retrieval"]
    for direction in found.values():
        for k in ("1", "5", "10"):
            assert shown(direction["recall"][k]) in told
            assert shown(direction["label_jaccard"][k]) in told
        chance = [text.number(direction["recall"][k]["chance"]) for k in direction["recall"]]
        rank = text.number(direction["median_rank"]["chance"], 0)
        assert f"Chance {' '.join(chance)} {rank}" in told
    assert f"Report to volume {found['report_to_volume']['recall']['1']['queries']} queries" in told


def test_decisions_stand_beside_the_constant_answer_and_optimism_is_marked():
    for rule in ("heldout-patients", "ctclip-test"):
        main = judge(protocol=(("threshold", rule),))
        told = text_of(page(models=[rep.ModelResult("m", "Only", main)]))
        found = main.metrics["decisions"]
        for interval in found["intervals"]["macro"].values():
            assert shown(interval) in told
        constant = " ".join(text.number(value) for value in found["all_negative"].values())
        assert re.search(r"Always “no” ([\d.]+ ){7}", told)
        assert sorted(constant.split()) == sorted(
            re.search(r"Always “no” ((?:[\d.]+ ){7})", told)[1].split())
        assert ("optimistic" in told) == (rule == "ctclip-test")
    assert "This protocol makes no decisions" in text_of(page())


def test_groups_and_prompts_are_those_of_the_protocol():
    main = judge.__wrapped__(protocol={
        "groups": {"head": FINDINGS[:2]}, "contrast": "softmax", "temperature": 0.1,
        "prompts": Prompts(("There is {}",), ("No {}",)), "exclude": ("gone",), "version": "7",
        "reconstructions": "first"})
    told = text_of(page(models=[rep.ModelResult("m", "Only", main)]))
    assert f"head {shown(main.metrics['groups']['head']['auroc'])}" in told
    assert "head : Alpha , Beta ." in told
    for sentence in main.protocol.texts:
        assert text_escape(sentence) in told
    assert "version 7" in told and "the first volume of each scan" in told
    assert "Left out by the protocol: gone" in told and "softmax at temperature 0.1" in told


def test_probe_and_localisation_are_shown_where_they_were_measured():
    from brgsa_jax.evals.localisation import Case, localise
    from brgsa_jax.evals.probe import linear_probe

    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 3)), rng.random((40, 1)) < 0.5
    probe = linear_probe(x, labels, list(IDS), np.arange(40) < 20, fractions=(0.5, 1.0),
                         resamples=20).as_dict()
    region = np.zeros((6, 6, 6), bool)
    region[2:4, 2:4, 2:4] = True
    found = localise(lambda: iter([Case(f"p{i}", np.full(region.shape, 40), {"Beta": region})
                                   for i in range(4)]),
                     lambda image: np.stack([rng.random(region.shape), region + 0.0]),
                     ("Alpha", "Beta"), resamples=20)
    main = judge()
    main = dataclasses.replace(main, metrics=main.metrics | {"localisation": found})
    told = text_of(page(models=[rep.ModelResult("m", "Only", main, probe=probe)]))
    for row in probe["fractions"]:
        assert f"{100 * row['fraction']:g}% {shown(row['macro']['auroc'])}" in told
    for rule in ("pointing", "dice", "hit_rate"):
        entry = found["findings"]["Beta"][rule]
        assert f"Beta 4 regions {shown(entry)}" in told
        assert shown(entry["against"]["other_prompts"]["gain"], True) in told
    assert "Linear probe" not in text_of(page()) and "Localisation" not in text_of(page())


def test_mean_curves_hold_the_mean_areas():
    main = judge(noise=6.0)
    grid, roc, precision = np.linspace(0, 1, 20001), [], []
    for p in range(3):
        labels, judged = main.labels[:, p], main.scores["mean"][:, p]
        roc.append(scores.sensitivity_at(roc_curve(labels, judged), grid).mean())
        precision.append(scores.precision_at(labels, judged, grid).mean())
    assert np.mean(roc) == pytest.approx(main.metrics["macro"]["auroc"]["value"], abs=1e-4)
    assert np.mean(precision) == pytest.approx(main.metrics["macro"]["auprc"]["value"], abs=1e-4)


def test_reliability_diagrams_show_the_bins_of_held_out_patients():
    main = judge()
    html = page(models=[rep.ModelResult("m", "Only", main)], samples=[])
    for p, name in enumerate(FINDINGS):
        fitted = calibrate(main.labels[:, p:p + 1], main.scores["mean"][:, p:p + 1], main.patients)
        bins = len(reliability(main.labels[:, p], fitted[:, 0]).count)
        drawn = html.split(f"<title>Reliability diagram, {text_escape(name)}</title>")[1]
        assert drawn.split("</svg>")[0].count("<circle") == bins
    assert shown_calibration(main) in text_of(html)


def shown_calibration(main):
    found = main.metrics["calibration"]["platt"]
    return (f"Platt scaling {text.number(found['ece'])} {text.number(found['brier'])} "
            f"{shown(found['brier_below']['raw'], True)} "
            f"{shown(found['brier_below']['prevalence'], True)}")


def test_scores_of_a_file_have_a_page_of_what_they_tell(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "l.csv").write_text("\n".join(["id,A", *(f"v{i},{i % 2}" for i in range(30))]))
    (tmp_path / "s.csv").write_text("\n".join(
        ["id,A", *(f"v{i},{i % 2 + rng.normal():.3f}" for i in range(30))]))
    found, = evaluate_files([tmp_path / "s.csv"], tmp_path / "l.csv",
                            changes={"threshold": "none"})
    html = page(models=[rep.ModelResult("given", "Given", found)], samples=[], phantom=False)
    assert re.findall(r'<section id="(\w+)"', html) == ["findings", "curves", "method"]
    assert "Zero-shot" not in html and "Prompts" not in html


def test_overlays_are_shown_beside_their_case():
    main = judge()
    case = dataclasses.replace(rep.sample_case(main, "v7", PNG),
                               overlays={FINDINGS[0]: PNG + b"1", FINDINGS[2]: PNG + b"2"})
    html = page(samples=[case])
    assert html.count(text.png(PNG + b"1")) == html.count(text.png(PNG + b"2")) == 1
    assert "Heat-map: Gamma &amp; &lt;Delta&gt;" in text_of(html)
    assert "not where a finding is" in html
    assert "not where a finding is" not in page()


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
    told = text_of(html)
    assert "Modality gap" not in told and "Training" not in told and "Sample" not in told
    assert "Paired difference" not in told and "open dots" not in told
    assert "Retrieval" not in told and "ROC by finding" in told


def test_undefined_findings_are_told_and_shown_as_dashes():
    told = text_of(page(models=[rep.ModelResult("m", "Only", judge(empty=True))], samples=[]))
    assert "left out of every mean: Beta ." in told
    assert re.search(r"Beta 0 positive – ", told)
    assert not re.search(r"\bnan\b", told, re.IGNORECASE)


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
    main = judge()
    turned = dataclasses.replace(judge(9, 5.0), ids=main.ids[::-1])
    assert rep.choose_samples(main, 5) == rep.choose_samples(turned, 5)
    assert len(set(rep.choose_samples(main, 5))) == 5


@pytest.mark.parametrize("value, shown", [(0.12345, "0.123"), (-0.0001, "0.000"),
                                          (-0.25, "−0.250"), (float("nan"), "–"), (None, "–")])
def test_numbers_are_aligned_and_never_minus_zero(value, shown):
    assert text.number(value) == shown


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
