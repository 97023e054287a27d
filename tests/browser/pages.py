"""Reports of real evaluations on random numbers, as the browser opens them."""

import dataclasses
import functools

import numpy as np

from brgsa_jax.evals import evaluate as ev
from brgsa_jax.evals import report as rep
from brgsa_jax.evals.heatmap import overlay
from brgsa_jax.evals.localisation import Case, localise
from brgsa_jax.evals.probe import linear_probe
from brgsa_jax.evals.protocol import Prompts, Protocol
from brgsa_jax.evals.score_files import evaluate_files
from brgsa_jax.evals.volume_picture import volume_picture
from brgsa_jax.summarize.vocabulary import CT_RATE_18

HOSTILE = ("<script>alert(1)</script>", "\"><img src=x onerror='alert(2)'>", "{{ 7 * 7 }}",
           "=HYPERLINK(\"http://example.com\")", "انصباب جنبي",
           "&lt;b&gt; &amp; </style>",
           "L" + "ong" * 80, "two words " * 25 + "end")
# Turns what follows it round, up to the end of its line; no name of a finding may hold it.
TURNED = "\u202eturned round"
SPACING = (6.0, 6.0, 12.0)


def labels_of(count, findings, seed=3):
    rng = np.random.default_rng(seed)
    rates = np.geomspace(0.5, 0.04, findings)
    labels = rng.random((count, findings)) < rates
    labels[:8, :] |= np.eye(8, findings, dtype=bool) | np.eye(8, findings, 4, dtype=bool)
    return labels


def judged(protocol, labels, noise, seed, bank=True):
    """An evaluation of embeddings that hold the labels under that much noise."""
    rng = np.random.default_rng(11)
    width = 48
    finding = rng.normal(size=(labels.shape[1], width))
    texts = np.stack([(-0.3 if text.startswith("No") else 1.0) * finding[p]
                      for text in protocol.texts
                      for p in [next(p for p in range(len(protocol.findings))
                                     if text in (*protocol.positive[p], *protocol.negative[p]))]])
    captions = labels @ finding + 0.4
    image = (labels @ finding + noise * np.random.default_rng(seed).normal(
        size=(len(labels), width)) - 0.4)
    bridged = dict(image_bridged=image + 0.3, prompts_bridged=texts + 0.3,
                   captions_bridged=captions + 0.3) if bank else {}
    names = protocol.findings
    count = len(labels)
    return ev.evaluate(protocol, ids=ids_of(count), patients=[f"p{i // 2}" for i in range(count)],
                       findings=names, labels=labels,
                       embeddings=ev.Embeddings(image, texts, captions, **bridged))


def ids_of(count, first=()):
    return [*first, *(f"valid_{i // 2 + 1}_a_{i % 2 + 1}" for i in range(len(first), count))]


@functools.cache
def pictures():
    """A volume with two lungs and a spot, and the spot's heat-map over it."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (64, 64, 32)), indexing="ij")
    volume = np.where(x**2 + (1.3 * y) ** 2 < 0.9, 40, -1000).astype(np.int16)
    volume[((np.abs(x) - 0.45) / 0.33) ** 2 + (y / 0.5) ** 2 + (z / 0.9) ** 2 < 1] = -850
    spot = ((x - 0.45) ** 2 + (y - 0.1) ** 2 + z**2) * 60
    volume[spot < 1] = 30
    return (volume_picture(volume, SPACING, width=720),
            overlay(volume, np.exp(-spot).astype(np.float32), SPACING, width=720))


def cases(evaluation, count=2):
    picture, heat = pictures()
    found = []
    for volume_id in rep.choose_samples(evaluation, count):
        case = rep.sample_case(evaluation, volume_id, picture)
        shown = [finding.name for finding in case.top[:2]]
        found.append(dataclasses.replace(case, overlays=dict.fromkeys(shown, heat)))
    return found


def history(seed):
    rng = np.random.default_rng(seed)
    return [{"step": s, "loss": 3 * np.exp(-s / 200) + 0.05 * rng.random(), "contrast": 1.0,
             "samples_per_sec": 9.0} for s in range(0, 600, 5)]


def probed(labels, noise):
    """A linear probe on embeddings that hold the labels under that much noise."""
    rng = np.random.default_rng(6)
    x = labels @ rng.normal(size=(labels.shape[1], 16)) + noise * rng.normal(size=(len(labels), 16))
    half = np.arange(len(labels)) < len(labels) // 2
    return linear_probe(x, labels, [f"p{i // 2}" for i in range(len(labels))], half,
                        names=[str(p) for p in range(labels.shape[1])], fractions=(0.1, 1.0),
                        resamples=50).as_dict()


def localised(findings):
    """Heat-maps that point at two findings and, of a third, at its place in another patient."""
    shape = (12, 12, 6)

    def cases():
        for number in range(10):
            rng = np.random.default_rng(number)
            regions = {}
            for name in findings[:3]:
                corner = rng.integers(0, (9, 9, 4))
                regions[name] = np.zeros(shape, bool)
                regions[name][tuple(slice(c, c + 3) for c in corner)] = True
            yield Case(f"p{number}", np.full(shape, 40, np.int16) + number, regions)

    places = {case.image[0, 0, 0]: case.regions for case in cases()}

    def draw(image):
        here, other = (places[40 + (int(image[0, 0, 0]) - 40 + shift) % 10] for shift in (0, 1))
        rng = np.random.default_rng(int(image[0, 0, 0]))
        maps = rng.random((len(findings), *shape)).astype(np.float32)
        for p, regions in enumerate((here, here, other)):
            maps[p] += regions[findings[p]]
        return maps

    return {"method": "rollout", **localise(cases, draw, findings, resamples=50)}


def hospital():
    """What a hospital sees: the eighteen findings, three models, everything there is."""
    protocol = Protocol(
        "ct-rate-18-demo", CT_RATE_18, resamples=100, threshold="heldout-patients",
        prompts=Prompts(("There is {}", "{} is seen"), ("No {}",)), contrast="softmax",
        temperature=0.07, groups={"head": CT_RATE_18[:6], "tail": CT_RATE_18[12:]})
    labels = labels_of(160, len(CT_RATE_18))
    main = judged(protocol, labels, 5.0, 1)
    main = dataclasses.replace(main, metrics=main.metrics | {"localisation": localised(CT_RATE_18)})
    models = [rep.ModelResult("brgsa", "BrgSA", main, history(1),
                              probe=probed(labels[:, :6], 2.0)),
              rep.ModelResult("clip", "CLIP", judged(protocol, labels, 9.0, 2, bank=False),
                              history(2), probe=probed(labels[:, :6], 5.0)),
              rep.ModelResult("untrained", "BrgSA, untrained", judged(protocol, labels, 200.0, 3),
                              untrained=True)]
    return rep.ReportData(
        "BrgSA: ct-rate-18", models, "random numbers, 64×64×32 at 6×6×12 mm", phantom=True,
        samples=cases(main), date="2025-01-31",
        environment=rep.describe_environment(devices="1 × cpu"))


def hostile():
    """The same with names that try to be markup, to run, and to break the layout."""
    protocol = Protocol("hostile", HOSTILE, resamples=50, threshold="ctclip-test",
                        groups={HOSTILE[1]: HOSTILE[:4]}, source=HOSTILE[0])
    labels = labels_of(80, len(HOSTILE))
    labels[:, 3] = False
    models = [rep.ModelResult("a", HOSTILE[6], judged(protocol, labels, 4.0, 1),
                              [row | {HOSTILE[0]: 1.0} for row in history(1)]),
              rep.ModelResult("b", TURNED + HOSTILE[4] + HOSTILE[0],
                              judged(protocol, labels, 9.0, 2), history(2))]
    found = models[0].evaluation
    picture, heat = pictures()
    samples = [rep.SampleCase(name, picture, (rep.RankedFinding(name, 1.0, True),),
                              (name, HOSTILE[1]), {name: heat}) for name in (*HOSTILE, TURNED)]
    assert found.metrics["undefined"] == [HOSTILE[3]]
    return rep.ReportData(HOSTILE[0] + HOSTILE[6], models, HOSTILE[1] + HOSTILE[6], samples=samples,
                          environment={name: name for name in (*HOSTILE, TURNED)},
                          notes=(*HOSTILE, TURNED))


def score_file(folder):
    """A report on nothing but a table of scores and one of labels."""
    rng = np.random.default_rng(4)
    rows = [f"v{i},p{i // 2},{int(i % 3 == 0)}" for i in range(60)]
    (folder / "labels.csv").write_text("\n".join(["id,patient,Effusion", *rows]))
    scores = [f"v{i},{float(i % 3 == 0) + rng.normal():.4f}" for i in range(60)]
    (folder / "scores.csv").write_text("\n".join(["id,Effusion", *scores]))
    found, = evaluate_files([folder / "scores.csv"], folder / "labels.csv", patients="patient",
                            changes={"threshold": "none"})
    return rep.ReportData("Scores of a file", [rep.ModelResult("given", "Given", found)],
                          "scores.csv")
