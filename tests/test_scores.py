"""Score modes against their definition, and score and label files that survive the journey."""

import numpy as np
import pytest
from scipy.special import softmax

from brgsa_jax.config import UserError
from brgsa_jax.evals import scores as sc
from brgsa_jax.evals.evaluate import Embeddings
from brgsa_jax.evals.protocol import Prompts, Protocol
from brgsa_jax.evals.scans import chosen_rows, count_scans, excluded_ids, pool

RNG = np.random.default_rng(0)
V, T, VH, TH = (RNG.normal(size=shape) for shape in ((5, 8), (3, 8), (5, 8), (3, 8)))


def cos(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("mode, pair", [
    ("direct", (V, T)), ("bridged", (VH, TH)), ("image_bridged", (VH, T)),
    ("text_bridged", (V, TH))])
def test_each_mode_is_its_cosine(mode, pair):
    expected = [[cos(v, t) for t in pair[1]] for v in pair[0]]
    np.testing.assert_allclose(sc.score_matrix(V, T, VH, TH, mode), expected, rtol=1e-12)


def test_mean_is_direct_and_image_bridged():
    expected = [[(cos(v, t) + cos(vh, t)) / 2 for t in T] for v, vh in zip(V, VH, strict=True)]
    np.testing.assert_allclose(sc.score_matrix(V, T, VH, TH), expected, rtol=1e-12)
    assert tuple(sc.all_scores(V, T, VH, TH)) == sc.SCORE_MODES


def test_without_a_bank_only_direct_is_there():
    assert tuple(sc.all_scores(V, T)) == ("direct",)
    with pytest.raises(UserError, match="direct"):
        sc.score_matrix(V, T, mode="mean")


def test_a_zero_embedding_scores_zero_and_a_diverged_one_is_refused():
    assert sc.cosine(np.zeros((1, 8)), T).tolist() == [[0.0, 0.0, 0.0]]
    broken = V.copy()
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match="1 of 5 .* row 3"):
        sc.cosine(broken, T)


def test_scores_come_back_to_the_last_bit(tmp_path):
    values = np.array([[1 / 3, -1e-300], [np.pi, 0.1 + 0.2]])
    sc.write_scores(tmp_path / "s.csv", ["a", "0012"], ["X, with comma", "Ünï"], values)
    table = sc.read_scores(tmp_path / "s.csv")
    assert table.ids == ("a", "0012")
    assert table.names == ("X, with comma", "Ünï")
    assert table.values.tobytes() == values.tobytes()


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "'=x", "''-x", "'plain", 'a"b,c'])
def test_formulas_are_quoted_in_the_file_and_not_in_the_table(tmp_path, text):
    path = tmp_path / "s.csv"
    sc.write_scores(path, [text], [text], np.array([[-0.5]]))
    cells = [line.split(",")[0].strip('"') for line in path.read_text().splitlines()]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    assert "-0.5" in path.read_text().splitlines()[1].split(",")[-1]
    table = sc.read_scores(path)
    assert (table.ids, table.names, table.values[0, 0]) == ((text,), (text,), -0.5)


@pytest.mark.parametrize("content, told", [
    ("", "is empty"),
    ("id\na\n", "only the column 'id'"),
    ("id;A\na;1\n", "separated by commas, not by semicolons"),
    ("id,A\n", "no rows"),
    ("id,A\na,1\na,2\n", "id 'a' more than once"),
    ("id,A,A\na,1,2\n", "column 'A' more than once"),
    ("id,A\na,1\nb,1,2\n", "line 3 has 3 cells where the header has 2"),
    ("id,A\na,high\n", "line 2, column 'A': 'high' is not a finite number"),
    ("id,A\na,nan\n", "not a finite number"),
    ("id,A\n,1\n", "line 2 has an empty id"),
])
def test_a_bad_score_file_is_refused_in_one_sentence(tmp_path, content, told):
    path = tmp_path / "s.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=told) as error:
        sc.read_scores(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        sc.read_scores(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 CSV"):
        sc.read_scores(tmp_path / "b.csv")


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"\xef\xbb\xbfid,A\r\nx, 1.5 \r\n\r\n")
    table = sc.read_scores(tmp_path / "s.csv")
    assert (table.ids, table.names, table.values[0, 0]) == (("x",), ("A",), 1.5)


def test_unwritable_scores_leave_the_old_file(tmp_path):
    path = tmp_path / "s.csv"
    sc.write_scores(path, ["a"], ["A"], np.array([[1.0]]))
    before = path.read_bytes()
    with pytest.raises(UserError, match="'a' are not finite"):
        sc.write_scores(path, ["a"], ["A"], np.array([[np.inf]]))
    with pytest.raises(UserError, match="id 'a' comes more than once"):
        sc.write_scores(path, ["a", "a"], ["A"], np.zeros((2, 1)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s.csv"]


def test_labels_are_taken_by_name_with_their_patients(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("id,age,B,A,who\nx,70,0,True,p1\ny,60,1.0,FALSE,p2\n")
    table = sc.read_labels(path, ["A", "B"], "who")
    assert table.values.tolist() == [[True, False], [False, True]]
    assert table.patients == ("p1", "p2")
    with pytest.raises(UserError, match="column 'age': '70' is neither 0 nor 1"):
        sc.read_labels(path, None, "who")
    with pytest.raises(UserError, match="no column 'C', 'patient'"):
        sc.read_labels(path, ["C"], "patient")


def test_a_label_is_no_patient(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("id,A,B\nx,1,0\ny,0,1\nz,0,1\n")
    with pytest.raises(UserError, match="holds only 0 and 1 in column 'B'"):
        sc.read_labels(path, ["A"], "B")


def test_ids_that_look_the_same_are_told_apart():
    scores = sc.ScoreTable(("caf\u00e9", "b"), ("A",), np.zeros((2, 1)))
    labels = sc.LabelTable(("cafe\u0301", "b"), ("A",), np.zeros((2, 1), bool), None)
    with pytest.raises(UserError, match="Unicode NFC and NFD"):
        sc.join(scores, labels)


def test_labels_written_are_read_again(tmp_path):
    labels = np.array([[True, False], [False, False]])
    sc.write_labels(tmp_path / "l.csv", ["x", "=y"], ["A", "B"], labels, ["-p", "q"])
    table = sc.read_labels(tmp_path / "l.csv", patients="patient")
    assert (table.ids, table.names, table.patients) == (("x", "=y"), ("A", "B"), ("-p", "q"))
    assert table.values.tolist() == labels.tolist()


def test_join_follows_ids_not_rows():
    scores = sc.ScoreTable(("a", "b", "c"), ("A",), np.zeros((3, 1)))
    labels = sc.LabelTable(("c", "a", "b"), ("A",), np.array([[1], [0], [0]], bool),
                           ("pc", "pa", "pb"))
    joined = sc.join(scores, labels)
    assert joined.values[:, 0].tolist() == [False, False, True]
    assert joined.patients == ("pa", "pb", "pc")


def test_join_refuses_missing_and_extra_ids_with_counts():
    scores = sc.ScoreTable(("a", "b", "n1", "n2", "n3", "n4"), ("A",), np.zeros((6, 1)))
    labels = sc.LabelTable(("a", "b", "z"), ("A",), np.zeros((3, 1), bool), None)
    with pytest.raises(UserError) as told:
        sc.join(scores, labels)
    assert "4 scored ids have no labels (n1, n2, n3, …)" in str(told.value)
    assert "1 labelled ids have no scores (z)" in str(told.value)


def test_every_mode_gets_a_whole_file(tmp_path):
    files = sc.write_all_scores(tmp_path, list("abcde"), ["A", "B", "C"],
                                sc.all_scores(V, T, VH, TH), "mean")
    assert [f.name for f in files] == ["scores.csv", "scores_direct.csv", "scores_bridged.csv",
                                       "scores_image_bridged.csv", "scores_text_bridged.csv"]
    np.testing.assert_array_equal(sc.read_scores(files[0]).values, sc.score_matrix(V, T, VH, TH))
    np.testing.assert_array_equal(sc.read_scores(files[1]).values,
                                  sc.score_matrix(V, T, mode="direct"))


def embedded(protocol, seed=1):
    """Five volumes and the protocol's sentences, with what a bank reads of both."""
    rng = np.random.default_rng(seed)
    image, bridged = rng.normal(size=(2, 5, 8))
    texts, texts_bridged = rng.normal(size=(2, len(protocol.texts), 8))
    found = Embeddings(image, texts, None, bridged, texts_bridged)
    text = dict(zip(protocol.texts, texts, strict=True))
    return found, lambda n, sentence: (cos(image[n], text[sentence])
                                       + cos(bridged[n], text[sentence])) / 2


def test_the_positive_prompt_alone_scores_its_cosine():
    protocol = Protocol("p", ("B", "A", "C"))
    found, score = embedded(protocol)
    scores = sc.protocol_scores(protocol, found)
    assert tuple(scores) == sc.SCORE_MODES
    np.testing.assert_allclose(scores["mean"], [[score(n, f"There is {name}") for name in "BAC"]
                                                for n in range(5)], rtol=1e-12)
    np.testing.assert_array_equal(scores["direct"], sc.cosine(found.image, found.prompts))


def test_an_ensemble_scores_the_mean_of_its_prompts():
    prompts = Prompts(("There is {}", "{} is seen", "shows {}"),
                      overrides={"B": {"positive": ("b", "There is A")}})
    protocol = Protocol("p", ("A", "B"), prompts)
    found, score = embedded(protocol)
    assert len(protocol.texts) == 4
    expected = [[np.mean([score(n, text) for text in texts]) for texts in protocol.positive]
                for n in range(5)]
    np.testing.assert_allclose(sc.protocol_scores(protocol, found)["mean"], expected, rtol=1e-12)


def test_a_contrast_is_the_softmax_of_the_pair():
    protocol = Protocol("p", ("A", "B"), Prompts(("{}", "has {}"), ("no {}",)), contrast="softmax",
                        temperature=0.07)
    found, score = embedded(protocol)
    expected = [[softmax([np.mean([score(n, text) for text in texts]) / 0.07
                          for texts in (positive, negative)])[0]
                 for positive, negative in zip(protocol.positive, protocol.negative, strict=True)]
                for n in range(5)]
    np.testing.assert_allclose(sc.protocol_scores(protocol, found)["mean"], expected, rtol=1e-12)
    # The temperature moves probabilities, never ranks.
    warm = Protocol("p", ("A", "B"), protocol.prompts, contrast="softmax", temperature=1.0)
    np.testing.assert_array_equal(sc.protocol_scores(warm, found)["mean"].argsort(axis=0),
                                  np.argsort(expected, axis=0))


@pytest.mark.parametrize("contrast", [{}, {"contrast": "softmax", "temperature": 0.1}])
def test_a_combined_finding_scores_as_the_largest_of_its_parts(contrast):
    prompts = Prompts(negative=("no {}",))
    protocol = Protocol("p", ("A", "Both"), prompts, combine={"Both": ("X", "Y")}, **contrast)
    found, _ = embedded(protocol)
    parts = sc.protocol_scores(Protocol("p", ("A", "X", "Y"), prompts, **contrast), found)["mean"]
    np.testing.assert_array_equal(sc.protocol_scores(protocol, found)["mean"],
                                  np.stack([parts[:, 0], parts[:, 1:].max(axis=1)], axis=1))


IDS = ("valid_1_a_2.nii.gz", "valid_1_a_1.nii.gz", "valid_1_b_1.nii.gz", "valid_10_a_1",
       "my_1_a_1.nii.gz", "valid_1_a_10.nii.gz", "my_1_a_2.nii.gz")


@pytest.mark.parametrize("change, rows", [
    ({}, [0, 1, 2, 3, 4, 5, 6]), ({"reconstructions": "first"}, [1, 2, 3, 4, 6]),
    ({"exclude": (IDS[1], "absent")}, [0, 2, 3, 4, 5, 6]),
    ({"reconstructions": "first", "exclude": (IDS[1], IDS[2])}, [0, 3, 4, 6])])
def test_exclusions_and_the_policy_choose_the_volumes(change, rows):
    assert chosen_rows(Protocol("p", ("A",), **change), IDS) == rows
    assert count_scans(IDS) == 5


def test_the_mean_of_a_scan_is_judged_once():
    protocol = Protocol("p", ("A", "B"), reconstructions="mean")
    labels = np.zeros((7, 2), bool)
    labels[[0, 1, 5], 1] = True
    values = RNG.normal(size=(7, 2))
    found = pool(protocol, IDS, list("xxyzuxv"), labels, {"direct": values})
    assert found.ids == ("valid_1_a", "valid_1_b", "valid_10_a", IDS[4], IDS[6])
    assert found.patients == tuple("xyzuv")
    assert found.labels.tolist() == [[False, True], *[[False, False]] * 4]
    np.testing.assert_allclose(found.scores["direct"], [
        values[[0, 1, 5]].mean(axis=0), *values[[2, 3, 4, 6]]], rtol=1e-12)
    whole = pool(Protocol("p", ("A", "B")), IDS, list("xxyzuxv"), labels, {"direct": values})
    assert whole.ids == IDS and whole.scores["direct"] is values


def test_volumes_of_a_scan_that_contradict_each_other_are_not_judged_as_one():
    protocol = Protocol("p", ("A",), reconstructions="mean")
    scores, ids = {"given": np.zeros((2, 1))}, ("valid_1_a_1", "valid_1_a_2")
    for patients, labels in ((("p", "q"), [[1], [1]]), (("p", "p"), [[1], [0]])):
        with pytest.raises(UserError, match="differ in patient or labels"):
            pool(protocol, ids, patients, np.array(labels, bool), scores)


def test_exclusions_are_found_with_or_without_their_ending_or_refused():
    protocol = Protocol("p", ("A",), exclude=("valid_1_a_1.nii.gz",))
    assert chosen_rows(protocol, ("valid_1_a_1", "v")) == [1]
    assert excluded_ids(protocol, ("valid_1_a_1", "v")) == ["valid_1_a_1"]
    with pytest.raises(UserError, match="has none of them, only such as 'v'"):
        excluded_ids(protocol, ("w", "v"))
