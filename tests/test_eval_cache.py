"""Embeddings are made once: by content of model and data, for any number of protocols."""

import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from test_model import make_model

from brgsa_jax import cli
from brgsa_jax.config import UserError
from brgsa_jax.data.builders import build_phantom
from brgsa_jax.data.sources import open_source
from brgsa_jax.data.tokenizer import train_tokenizer
from brgsa_jax.evals.cache import Cache, model_digest
from brgsa_jax.evals.metrics import jsonable
from brgsa_jax.evals.protocol import Prompts, Protocol, get_protocol
from brgsa_jax.evals.run import describe_data, evaluate_model, read_cases
from brgsa_jax.evals.scores import read_scores
from brgsa_jax.model import Model
from brgsa_jax.predict import load_model
from brgsa_jax.summarize.vocabulary import CT_RATE_18

SIZE = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phantom patients under CT-RATE's names, two volumes a scan."""
    out = tmp_path_factory.mktemp("data") / "set"
    build_phantom(out, test=SIZE, shape=(32, 32, 16), workers=1, progress=False)
    index = out / "index_test.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["id"] = f"valid_{number // 2}_a_{2 - number % 2}.nii.gz"
        row["patient"] = f"valid_{number // 2}"
        # Reconstructions of one scan have one report.
        row["findings"] = rows[number - number % 2]["findings"]
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def model():
    return make_model(**{"model.input.spacing": (12.0, 12.0, 24.0), "model.vision.depth": 1,
                         "model.text.depth": 1})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model's folder as `brgsa convert` writes it."""
    return model.save(tmp_path_factory.mktemp("model") / "saved")


@pytest.fixture
def encoded(monkeypatch):
    """Counts of what any model encodes."""
    counts = {"volumes": 0, "texts": 0}
    volume, text = Model.encode_volume, Model.encode_text

    def encode_volume(self, items, **options):
        counts["volumes"] += len(items)
        return volume(self, items, **options)

    def encode_text(self, texts):
        counts["texts"] += len(texts)
        return text(self, texts)

    monkeypatch.setattr(Model, "encode_volume", encode_volume)
    monkeypatch.setattr(Model, "encode_text", encode_text)
    return counts


def never():
    raise AssertionError("encoded again")


def opened(folder):
    """A cache and the warnings it gives."""
    told = []
    return Cache(folder, told.append), told


def brgsa(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_a_digest_is_of_all_that_a_model_is(model, folder):
    digest = model_digest(model)
    assert model_digest(load_model(folder)) == digest

    def other(**changes):
        fields = {name: getattr(model, name) for name in (
            "config", "params", "bank", "tokenizer", "stats")}
        return model_digest(Model(**{**fields, **changes}))

    assert other() == digest
    # One bit of one weight, of the bank, and one word of the tokenizer.
    params, bank = jax.tree.map(np.array, (model.params, model.bank))
    for array in (jax.tree.leaves(params)[-1], bank):
        array.flat[-1] = np.nextafter(array.flat[-1], np.inf)
    config = model.config.copy_and_resolve_references()
    config.bank.scale = 2.0
    tokenizer = train_tokenizer(["There is something else"], 16)
    changed = [other(params=params), other(bank=bank), other(bank=None), other(config=config),
               other(tokenizer=tokenizer), other(tokenizer=None)]
    assert len({digest, *changed}) == 7


def test_volumes_and_texts_are_encoded_once(model, data, tmp_path, encoded):
    source = open_source(data, "test")
    cache, told = opened(tmp_path)
    protocol = Protocol("few", CT_RATE_18, resamples=20)
    first = evaluate_model(model, source, protocol, batch_size=8, cache=cache)
    # Volumes are filled up to whole batches; equal captions count once.
    assert encoded["volumes"] == 16 and 18 < encoded["texts"] < 18 + SIZE
    seen = dict(encoded)
    for again in (evaluate_model(model, source, protocol, cache=cache),
                  evaluate_model(model, open_source(data, "test"), protocol,
                                 cache=opened(tmp_path)[0])):
        assert encoded == seen and jsonable(again.metrics) == jsonable(first.metrics)
        for mode, scores in first.scores.items():
            assert again.scores[mode].tobytes() == scores.tobytes()
    # Another protocol encodes the sentences that are new to it, and no volume.
    pair = Protocol("pair", CT_RATE_18, Prompts(negative=("There is no {}",)), resamples=20,
                    contrast="softmax", temperature=0.1)
    evaluate_model(model, source, pair, cache=cache)
    assert encoded == {**seen, "texts": seen["texts"] + 18}
    assert not told
    bare = evaluate_model(model, source, protocol)
    np.testing.assert_allclose(bare.scores["mean"], first.scores["mean"], atol=1e-6)


def test_the_files_hold_no_text_and_no_id(model, data, tmp_path):
    evaluate_model(model, open_source(data, "test"), Protocol("few", CT_RATE_18, resamples=20),
                   cache=opened(tmp_path)[0])
    files = sorted(tmp_path.iterdir())
    assert [file.name.split("-")[0] for file in files] == ["texts", "volumes"]
    for file in files:
        content = file.read_bytes()
        for word in (b"There", b"nodule", b"effusion", b"valid_"):
            assert word not in content and word.decode().encode("utf-32-le") not in content


def test_other_content_is_another_file(model, data, tmp_path):
    cache, _ = opened(tmp_path / "cache")
    cache.folder.mkdir()
    source = open_source(data, "test")
    cache.volumes(model, source, lambda: np.ones((SIZE, 48), "f4"))
    same = cache.volumes(model, source, never)
    assert same.tobytes() == np.ones((SIZE, 48), "f4").tobytes()
    build_phantom(tmp_path / "other", seed=9, test=SIZE, shape=(32, 32, 16), workers=1,
                  progress=False)
    other = open_source(tmp_path / "other", "test")
    assert not cache.volumes(model, other, lambda: np.zeros((SIZE, 48), "f4")).any()
    # The same fingerprint with another index is other data too.
    copied = shutil.copytree(data, tmp_path / "copied")
    index = copied / "index_test.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[::-1]]) + "\n")
    # What else is made of the volumes stands beside.
    assert cache.volumes(model, source, lambda: np.full((SIZE, 3), 0.5), "odds").shape == (SIZE, 3)
    turned = cache.volumes(model, open_source(copied, "test"), lambda: np.full((SIZE, 48), 2, "f4"))
    assert turned[0, 0] == 2 and len(list(cache.folder.iterdir())) == 4


def truncated(file):
    file.write_bytes(file.read_bytes()[:-200])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def pickled(file):
    with file.open("wb") as stream:
        np.savez(stream, key=np.array({"a": 1}, object), embeddings=np.zeros((SIZE, 48), "f4"))


def rewritten(**changes):
    def write(file):
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        with file.open("wb") as stream:
            np.savez(stream, **{**arrays, **changes})
    return write


@pytest.mark.parametrize("breaks", [
    truncated, flipped, pickled, lambda file: file.write_bytes(b""),
    lambda file: file.write_text("no archive"), lambda file: np.save(file.open("wb"), np.ones(3)),
    rewritten(key=np.array("of something else")), rewritten(embeddings=np.zeros((3, 48), "f4")),
    rewritten(embeddings=np.zeros((SIZE, 48))), rewritten(embeddings=np.full((SIZE, 48), np.nan,
                                                                             "f4"))])
def test_a_broken_or_foreign_file_is_made_anew_with_a_warning(model, data, tmp_path, breaks):
    source = open_source(data, "test")
    right = np.random.default_rng(0).normal(size=(SIZE, 48)).astype("f4")
    cache, told = opened(tmp_path)
    cache.volumes(model, source, lambda: right)
    texts = cache.texts(model, ["There is A", "There is B"])
    for file in tmp_path.iterdir():
        breaks(file)
    assert cache.volumes(model, source, lambda: right).tobytes() == right.tobytes()
    assert cache.texts(model, ["There is A", "There is B"]).tobytes() == texts.tobytes()
    assert len(told) == 2 and all("made anew" in line and "\n" not in line for line in told)
    # The file was mended.
    assert opened(tmp_path)[0].volumes(model, source, never).tobytes() == right.tobytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning_only(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    cache, told = opened(tmp_path / "file")
    found = cache.volumes(model, open_source(data, "test"), lambda: np.ones((SIZE, 48)))
    assert found.dtype == np.float32 and "cannot be kept" in told[0]


def test_a_diverged_model_is_not_kept(model, data, tmp_path):
    cache, _ = opened(tmp_path)
    cache.volumes(model, open_source(data, "test"), lambda: np.full((SIZE, 48), np.inf))
    assert not list(tmp_path.iterdir())


def test_the_policy_of_reconstructions_is_applied_where_scores_are(model, data):
    source = open_source(data, "test")
    judged = {policy: evaluate_model(model, source, Protocol(
        policy, CT_RATE_18, reconstructions=policy, resamples=10, exclude=("valid_0_a_1.nii.gz",)))
        for policy in ("all", "first", "mean")}
    counts = {policy: (len(found.ids), found.metrics["data"]["volumes"],
                       found.metrics["data"]["scans"]) for policy, found in judged.items()}
    scans = SIZE // 2
    assert counts == {"all": (SIZE - 1, SIZE - 1, scans), "first": (scans, scans, scans),
                      "mean": (scans, SIZE - 1, scans)}
    row = {key: number for number, key in enumerate(judged["all"].ids)}
    first, mean = (judged[policy].scores["mean"] for policy in ("first", "mean"))
    everything = judged["all"].scores["mean"]
    assert judged["first"].ids[:2] == ("valid_0_a_2.nii.gz", "valid_1_a_1.nii.gz")
    assert judged["mean"].ids[:2] == ("valid_0_a", "valid_1_a")
    np.testing.assert_allclose(first[1], everything[row["valid_1_a_1.nii.gz"]], atol=1e-6)
    pair = [row[f"valid_1_a_{number}.nii.gz"] for number in (1, 2)]
    np.testing.assert_allclose(mean[1], everything[pair].mean(axis=0), atol=1e-6)
    assert judged["first"].metrics["data"]["excluded"] == ["valid_0_a_1.nii.gz"]
    with pytest.raises(UserError, match="excludes every volume"):
        evaluate_model(model, source, Protocol("none", CT_RATE_18, exclude=tuple(
            found.id for found in source.index)))


def test_combined_findings_take_the_labels_of_their_parts(data):
    source = open_source(data, "test")
    protocol = get_protocol("hlip-14")
    cases = read_cases(source, protocol)
    found = cases.labels[:, cases.names.index("Calcification")]
    parts = {"Arterial wall calcification", "Coronary artery wall calcification"}
    assert found.tolist() == [bool(parts & set(row.findings)) for row in source.index]
    assert found.any() and not found.all()
    told = describe_data(source, cases, protocol)
    assert told["fingerprint"] == source.fingerprint and told["mapping"] is None
    assert told["prompts"]["Atelectasis"]["negative"] == ("The volume shows: Not atelectatic.",)


def test_labels_of_another_mapping_are_refused(data, tmp_path):
    copied = shutil.copytree(data, tmp_path / "rad")
    dataset = json.loads((copied / "dataset.json").read_text())
    dataset["request"]["mapping"] = ["hlip", "2025.1", "0" * 16]
    (copied / "dataset.json").write_text(json.dumps(dataset))
    source = open_source(copied, "test")
    cases = read_cases(source, get_protocol("hlip-14"))
    assert describe_data(source, cases, get_protocol("hlip-14"))["mapping"][0] == "hlip"
    with pytest.raises(UserError, match="mapping hlip-2025.1, the protocol 'rad-chestct-16' is for "
                                        "brgsa-2025.1"):
        read_cases(source, get_protocol("rad-chestct-16"))


def test_eval_takes_any_number_of_protocols_and_encodes_once(model, folder, data, tmp_path, encoded,
                                                             monkeypatch):
    monkeypatch.setattr("brgsa_jax.predict.load_model", lambda _: model)
    mine = {"name": "mine", "version": "1", "classes": ["Lung nodule", "Pleural effusion"],
            "resamples": 20, "reconstructions": "mean", "prompts": {
                "positive": ["There is {}", "{} is seen"], "overrides": {
                    "Lung nodule": {"positive": ["=cmd() <script>"]}}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    command = ["eval", "--workdir", folder, "--data", data]
    code, out, err = brgsa(*command, "--out", tmp_path / "out", "--protocol", "chexpert-5",
                           "--protocol", tmp_path / "mine.yaml")
    assert code == 0 and "the mean is over the other findings" in err, err
    assert "Consolidation, Edema, Pleural Effusion" in err
    assert encoded["volumes"] == 16
    lines = out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == [
        str(tmp_path / "out" / name / "report.html") for name in ("chexpert-5", "mine")]
    found = json.loads((tmp_path / "out/mine/metrics.json").read_text())
    assert found["protocol"] == {"name": "mine",
                                 "hash": get_protocol(tmp_path / "mine.yaml").hash}
    told = found["data"]
    assert told["classes"] == mine["classes"] and told["reconstructions"] == "mean"
    assert told["prompts"]["Lung nodule"] == {"positive": ["=cmd() <script>"], "negative": []}
    assert (told["volumes"], told["scans"], told["patients"]) == (SIZE, SIZE // 2, SIZE // 2)
    scores = read_scores(tmp_path / "out/mine/scores.csv")
    assert scores.ids[0] == "valid_0_a" and len(scores.ids) == SIZE // 2
    page = (tmp_path / "out/mine/report.html").read_text()
    assert "=cmd() <script>" not in page and get_protocol(tmp_path / "mine.yaml").hash in page

    # One protocol alone, from what is kept.
    seen = dict(encoded)
    code, out, err = brgsa(*command, "--out", tmp_path / "alone", "--protocol",
                           tmp_path / "mine.yaml")
    assert code == 0 and encoded == seen
    assert out.rstrip().endswith(str(tmp_path / "alone" / "report.html"))
    for name in ("scores.csv", "labels.csv", "metrics.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out/mine" / name
                                                            ).read_bytes()


def test_a_model_that_cannot_be_written_beside_keeps_its_embeddings_in_out(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "eval").write_text("in the way")
    for workdir, place in (("model", "out/cache"), ("other", "other/eval/cache")):
        out, cache = cli.evals.folders(SimpleNamespace(out=tmp_path / "out"), tmp_path / workdir)
        assert out == tmp_path / "out" and cache.folder == tmp_path / place
        assert cache.folder.is_dir()


def test_eval_tells_of_protocols_before_anything_is_encoded(folder, data, tmp_path, encoded):
    command = ["eval", "--workdir", folder, "--data", data, "--out", tmp_path]
    for wrong, told in ((["ct-rate-18", "ct-rate-8"], "did you mean"),
                        (["ct-rate-18", "ct-rate-18"], "more than once"),
                        (["ct-rate-18", "inspect-pe"], "no volume has a finding of the protocol"),
                        ([str(tmp_path / "p.yaml")], "there is no protocol file")):
        options = [part for name in wrong for part in ("--protocol", name)]
        code, _, err = brgsa(*command, *options)
        assert code == 1 and told in err and err.count("\n") == 1, err
    assert encoded == {"volumes": 0, "texts": 0}


def test_the_protocols_are_listed_with_their_hashes():
    code, out, _ = brgsa("eval", "--list-protocols")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[0] == ["name", "version", "hash", "classes", "threshold"]
    found = get_protocol("ct-rate-18")
    assert ["ct-rate-18", found.version, found.hash, "18", "none"] in rows
