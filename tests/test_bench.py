import time

import numpy as np
import pytest

from brgsa_jax import get_config
from brgsa_jax.config import UserError
from brgsa_jax.data import bench as benches
from brgsa_jax.data import builders, feed
from brgsa_jax.data import tokenizer as tok


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "data"
    builders.build_phantom(folder, train=6, valid=2, shape=(64, 64, 32), workers=1, progress=False)
    return folder


def test_rates_count_what_was_delivered(data):
    result = benches.bench(data, batch_size=4, batches=16, threads=2)
    assert result.shape == (64, 64, 32) and result.crop == (56, 56, 28)
    assert result.feed.samples == 64
    assert result.feed.gigabytes == pytest.approx(64 * 56 * 56 * 28 * 2 / 1e9)
    assert result.nifti.samples == 4
    assert result.nifti.gigabytes == pytest.approx(4 * 56 * 56 * 28 * 2 / 1e9)
    assert result.feed.per_core > 0 and result.nifti.per_core > 0
    assert 0 <= result.waited < 0.5


def test_processor_time_of_all_threads_counts(data):
    """A feed that burns time in its threads looks as slow as it is."""
    config = get_config("clip").data
    config.update(path=str(data), crop=(56, 56, 28), batch_size=4, threads=2)

    class Burning:
        def __init__(self):
            self.source = benches.open_source(data)

        def __len__(self):
            return len(self.source)

        def __getitem__(self, position):
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            return self.source[position]

    tokenizer = tok.train_tokenizer(["There is no abnormality"], 8)
    rate = benches._measure(feed.host_batches(Burning(), config, tokenizer, seed=0), 4, warm_up=2)
    assert rate.cpu_seconds > 0.7 * 4 * 4 * 0.02


class Slow:
    """A source whose volumes take 20 ms each to come."""

    def __len__(self):
        return 16

    def __getitem__(self, position):
        time.sleep(0.02)
        return {"id": str(position), "volume": np.zeros((8, 8, 8), np.int16), "report": "",
                "findings": ("Emphysema",)}


@pytest.mark.parametrize(("step", "waits"), [(0.1, False), (0.01, True)])
def test_a_step_longer_than_the_feed_never_waits(step, waits):
    config = get_config("clip").data
    config.update(crop=(8, 8, 8), batch_size=8, threads=4)
    tokenizer = tok.train_tokenizer(["There is no abnormality"], 8)
    batches = feed.host_batches(Slow(), config, tokenizer, seed=0)
    share = benches._waiting(batches, step, 8)
    # Four threads take 40 ms a batch.
    assert share > 0.4 if waits else share < 0.1


def test_impossible_measures_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="no data set"):
        benches.bench(tmp_path)
    with pytest.raises(UserError, match="smaller than data.crop"):
        benches.bench(data, crop=(65, 64, 32), batch_size=2)
    with pytest.raises(UserError, match="a batch of 7 is more than the 6 images"):
        benches.bench(data, batch_size=7)
    with pytest.raises(UserError, match="at least 1"):
        benches.bench(data, batch_size=2, batches=0)
