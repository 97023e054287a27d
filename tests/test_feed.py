import types

import numpy as np
import pytest

from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok

FINDINGS = ["Emphysema", "Lung nodule", "Cardiomegaly", "Atelectasis"]


def section(**changes):
    """Section `data` of a configuration."""
    values = {"crop": (32, 32, 16), "batch_size": 8, "sentences": 1, "captions": "summary",
              "drop": 0.0, "normal_caption": "There is no abnormality", "threads": 2}
    return types.SimpleNamespace(**{**values, **changes})


class Memory:
    """A source in memory: 21 volumes, each filled with its own number."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        volume = np.full((36, 34, 20), index, np.int16)
        volume[:, 0], volume[0] = 1000, 2000
        return {"id": str(index), "volume": volume,
                "report": f"Volume of patient {index // 2} read.",
                "findings": tuple(FINDINGS[:index % len(FINDINGS)]),
                "labels": np.array([index % 2, index % 3 - 1], np.int8)}


class Radiographs(Memory):
    """The same patients on film."""

    def __getitem__(self, index):
        image = np.full((40, 36), index, np.uint8)
        image[0], image[:, 0] = 100, 200
        return {**super().__getitem__(index), "volume": image}


@pytest.fixture(scope="module")
def tokenizer():
    return tok.train_tokenizer([*tok.sentences_of(FINDINGS), "There is no abnormality"], 16)


def take(tokenizer, count, *, config=None, source=None, **options):
    batches = feed.host_batches(source or Memory(), config or section(), tokenizer,
                                seed=options.pop("seed", 3), **options)
    return [next(batches) for _ in range(count)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(tokenizer, processes):
    whole = take(tokenizer, 5)
    parts = [take(tokenizer, 5, process_index=i, process_count=processes)
             for i in range(processes)]
    for step, batch in enumerate(whole):
        joined = [np.concatenate(c) for c in zip(*(p[step] for p in parts), strict=True)]
        assert same(joined, batch)


def test_a_resume_starts_at_any_step_and_a_seed_is_another_order(tokenizer):
    whole = take(tokenizer, 6)
    assert all(same(a, b) for a, b in zip(take(tokenizer, 3, start=3), whole[3:], strict=True))
    assert not same(take(tokenizer, 1, seed=4)[0], whole[0])
    assert same(take(tokenizer, 1, start=10**6)[0], take(tokenizer, 1, start=10**6)[0])


def test_an_epoch_holds_every_volume_once_and_the_next_another_order(tokenizer):
    config = section(batch_size=7)
    batches = take(tokenizer, 6, config=config)
    ids = [int(v[-1, -1, -1]) for batch in batches for v in batch.volume]
    assert sorted(ids[:21]) == sorted(ids[21:]) == list(range(21))
    assert ids[:21] != ids[21:]


def test_shapes_types_crops_and_captions_vary(tokenizer):
    batch = take(tokenizer, 1)[0]
    assert batch.volume.shape == (8, 32, 32, 16) and batch.volume.dtype == np.int16
    assert batch.ids.shape == batch.mask.shape == batch.words.shape == (8, 16)
    assert batch.groups.shape == (8, 3)
    assert all(column.dtype == np.int32 for column in batch[1:5])
    assert batch.labels.shape == (8, 2) and batch.labels.dtype == np.int8
    np.testing.assert_array_equal(batch.words, tokenizer.words(batch.ids))
    np.testing.assert_array_equal(batch.words >= 0, batch.mask == 1)
    corners = {(int((v[:, -1] == 2000).any()), int((v[-1] == 1000).any()))
               for b in take(tokenizer, 6) for v in b.volume}
    assert len(corners) > 1


def test_evaluation_batches_are_central_and_in_order(tokenizer):
    batches = list(feed.eval_batches(Memory(), section(), tokenizer))
    assert [int(v[-1, -1, -1]) for b in batches for v in b.volume] == list(range(16))
    assert (batches[0].volume[0][:, 0] != 1000).all()
    halves = [list(feed.eval_batches(Memory(), section(), tokenizer, process_index=i,
                                     process_count=2)) for i in range(2)]
    assert np.array_equal(np.concatenate([h[1].volume for h in halves]), batches[1].volume)


def test_impossible_feeds_are_refused(tokenizer):
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        take(tokenizer, 1, process_count=3)
    with pytest.raises(UserError, match="smaller than data.crop"):
        take(tokenizer, 1, config=section(crop=(64, 64, 32)))
    with pytest.raises(UserError, match=r"data.crop=\(32, 32\) has 2 numbers.*36×34×20"):
        take(tokenizer, 1, config=section(crop=(32, 32)))
    with pytest.raises(UserError, match=r"has 3 numbers.*are 40×36"):
        take(tokenizer, 1, config=section(), source=Radiographs())
    with pytest.raises(UserError, match="did you mean 'report'"):
        take(tokenizer, 1, config=section(captions="reports"))


def test_radiographs_are_cropped_along_their_own_two_axes(tokenizer):
    config = section(crop=(32, 24))
    batches = take(tokenizer, 6, config=config, source=Radiographs())
    assert batches[0].volume.shape == (8, 32, 24) and batches[0].volume.dtype == np.uint8
    edges = {(bool((v[0, 1:] == 100).all()), bool((v[1:, 0] == 200).all()))
             for batch in batches for v in batch.volume}
    assert len(edges) > 1
    central = next(feed.eval_batches(Radiographs(), config, tokenizer))
    assert [np.unique(v).tolist() for v in central.volume] == [[i] for i in range(8)]


def test_groups_tell_same_captions_reports_and_findings():
    a = {"id": "a", "report": "Large heart.\n Clear  lungs. ", "findings": ("Cardiomegaly", "X")}
    twin = {"id": "b", "report": "Large heart. Clear lungs.", "findings": ("X", "Cardiomegaly")}
    one, two = feed.groups_of(a, ("s", "t")), feed.groups_of(twin, ("t", "s"))
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.int32 and len(set(one.tolist())) == 3
    other = feed.groups_of({**twin, "report": "Small heart.", "findings": ("X",)}, ("s",))
    assert (other != one).all()
    empty = [feed.groups_of({"id": i, "report": " \n", "findings": ()}, ("normal",))
             for i in ("a", "b")]
    np.testing.assert_array_equal(empty[0] == empty[1], [True, False, True])
    quoted = feed.groups_of({"id": "c", "report": "a", "findings": ()}, ("normal",))
    assert quoted[1] != empty[0][1], "a report that reads like an id"


def test_batches_carry_the_groups_of_their_records(tokenizer):
    source = Memory()
    for config in (section(sentences=0), section(captions="report")):
        for batch in take(tokenizer, 3, config=config):
            records = [source[int(v[-1, -1, -1])] for v in batch.volume]
            for row, record in zip(batch.groups, records, strict=True):
                sentences = tok.caption_sentences(record, config)
                np.testing.assert_array_equal(row, feed.groups_of(record, sentences))


def test_captions_of_reports_are_what_the_towers_read():
    config = section(captions="report")
    tokenizer = tok.train_tokenizer(["volume of patient read"] + [str(i) for i in range(10)], 16)
    batch = next(feed.eval_batches(Memory(), config, tokenizer))
    expected, _ = tokenizer([f"volume of patient {i // 2} read" for i in range(8)])
    np.testing.assert_array_equal(batch.ids, expected)
    assert len(set(batch.groups[:, 0].tolist())) == 4
    np.testing.assert_array_equal(batch.groups[::2, :2], batch.groups[1::2, :2])


def test_batches_are_placed_one_ahead_in_order():
    events = []

    def source():
        for number in range(4):
            events.append(f"read {number}")
            yield number

    def place(number):
        events.append(f"place {number}")
        return number * 10

    batches = feed.global_batches(source(), place)
    assert next(batches) == 0 and events == ["read 0", "place 0", "read 1", "place 1"]
    assert list(batches) == [10, 20, 30] and events[-1] == "place 3"
    assert list(feed.global_batches(iter(()), place)) == []
