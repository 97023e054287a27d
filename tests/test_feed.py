import numpy as np
import pytest
from test_model import small

from brgsa_jax.config import UserError
from brgsa_jax.data import feed
from brgsa_jax.data import tokenizer as tok

FINDINGS = ["Emphysema", "Lung nodule", "Cardiomegaly", "Atelectasis"]


class Memory:
    """A source in memory: 21 volumes, each filled with its own number."""

    def __len__(self):
        return 21

    def __getitem__(self, index):
        volume = np.full((36, 34, 20), index, np.int16)
        volume[:, 0], volume[0] = 1000, 2000
        return {"id": str(index), "volume": volume,
                "findings": tuple(FINDINGS[:index % len(FINDINGS)])}


@pytest.fixture(scope="module")
def tokenizer():
    return tok.train_tokenizer([*tok.sentences_of(FINDINGS), "There is no abnormality"], 16)


def take(tokenizer, count, *, config=None, **options):
    data = (config or small(**{"data.batch_size": 8})).data
    batches = feed.host_batches(Memory(), data, tokenizer, seed=options.pop("seed", 3), **options)
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
    config = small(**{"data.batch_size": 7})
    batches = take(tokenizer, 6, config=config)
    ids = [int(v[-1, -1, -1]) for batch in batches for v in batch.volume]
    assert sorted(ids[:21]) == sorted(ids[21:]) == list(range(21))
    assert ids[:21] != ids[21:]


def test_shapes_types_crops_and_captions_vary(tokenizer):
    batch = take(tokenizer, 1)[0]
    assert batch.volume.shape == (8, 32, 32, 16) and batch.volume.dtype == np.int16
    assert batch.ids.shape == batch.mask.shape == (8, 16) and batch.groups.shape == (8,)
    corners = {(int((v[:, -1] == 2000).any()), int((v[-1] == 1000).any()))
               for b in take(tokenizer, 6) for v in b.volume}
    assert len(corners) > 1


def test_evaluation_batches_are_central_and_in_order(tokenizer):
    config = small(**{"data.batch_size": 8})
    batches = list(feed.eval_batches(Memory(), config.data, tokenizer))
    assert [int(v[-1, -1, -1]) for b in batches for v in b.volume] == list(range(16))
    assert (batches[0].volume[0][:, 0] != 1000).all()
    halves = [list(feed.eval_batches(Memory(), config.data, tokenizer, process_index=i,
                                     process_count=2)) for i in range(2)]
    assert np.array_equal(np.concatenate([h[1].volume for h in halves]), batches[1].volume)


def test_impossible_feeds_are_refused(tokenizer):
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        take(tokenizer, 1, process_count=3)
    config = small(**{"data.crop": (64, 64, 32)})
    with pytest.raises(UserError, match="smaller than data.crop"):
        feed.random_crop(Memory()[0]["volume"], config.data.crop, None)
