"""Banks that start from data: k-means centres and files of centres, and runs that keep them."""

import io
import pickle
import struct
from types import SimpleNamespace

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.cluster import KMeans
from test_model import small
from test_step import make_batch

from brgsa_jax import mesh as meshes
from brgsa_jax.config import UserError
from brgsa_jax.model import init_bank
from brgsa_jax.train import bank_init
from brgsa_jax.train import step as steps

ROWS, DIM, BATCH = 16, 24, 8


def config_of(init, **changes):
    return small("brgsa", **{"model.bank.init": init, "model.bank.rows": ROWS,
                             "model.embed_dim": DIM, "data.batch_size": BATCH, **changes})


def new_state(average=True):
    """A state with a sharded bank of zeros, of which nothing else is looked at."""
    mesh = meshes.make_mesh(8, 1)
    zeros = lambda: jax.device_put(jnp.zeros((ROWS, DIM)), NamedSharding(mesh, P("data")))  # noqa: E731
    weights = {"params": {"w": jnp.ones(3)}, "bank": zeros(), "stats": None}
    return steps.TrainState(step=0, **{**weights, "bank": zeros()}, opt=None, lr_scale=None,
                            ema=weights if average else None)


class Embeddings:
    """A training whose towers give noisy copies of known centres, half of them to each side."""

    def __init__(self, noise=0.01, distinct=ROWS):
        self.rng, self.noise, self.distinct = np.random.default_rng(0), noise, distinct
        self.centres = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype("f4")
        self.seen = []

    def embed(self, state, batch):
        rows = (2 * BATCH * batch + np.arange(2 * BATCH)) % self.distinct
        noise = self.noise * self.rng.normal(size=(2 * BATCH, DIM))
        both = (self.centres[rows] + noise).astype("f4")
        self.seen.append(both)
        return jnp.asarray(both[:BATCH]), jnp.asarray(both[BATCH:])


def kmeans(training, samples=10_000, seed=0, state=None):
    return bank_init.fill_bank(state or new_state(), training, config_of("kmeans", seed=seed),
                               iter(range(10**6)), samples=samples)


def test_kmeans_finds_the_centres_of_both_modalities():
    training = Embeddings()
    before = new_state()
    after = kmeans(training, state=before)
    seen = np.concatenate(training.seen)
    # Eight embeddings a row, from whole batches of both modalities.
    assert len(seen) == bank_init.SAMPLES_PER_ROW * ROWS
    found = KMeans(ROWS, n_init=10, random_state=0).fit(seen)
    distance = np.linalg.norm(np.asarray(after.bank)[:, None] - found.cluster_centers_, axis=2)
    assert sorted(distance.argmin(axis=1)) == list(range(ROWS))
    assert distance.min(axis=1).max() < 0.05 < np.sort(distance, axis=1)[:, 1].min()
    assert after.bank.dtype == jnp.float32 and after.bank.sharding == before.bank.sharding
    np.testing.assert_array_equal(after.ema["bank"], after.bank)
    # A step donates both, and no buffer twice.
    pointers = [{s.data.unsafe_buffer_pointer() for s in x.addressable_shards}
                for x in (after.bank, after.ema["bank"])]
    assert not pointers[0] & pointers[1]
    assert after.params is before.params
    assert kmeans(Embeddings(), state=new_state(average=False)).ema is None


def in_the_box(centres, embeddings):
    """Means lie between the smallest and the largest; one of a single member on the border."""
    assert np.all(centres >= embeddings.min(axis=0) - 1e-6)
    assert np.all(centres <= embeddings.max(axis=0) + 1e-6)


def test_kmeans_summarises_what_has_no_clusters():
    training = Embeddings(noise=1.0)
    bank = np.asarray(kmeans(training).bank)
    seen = np.concatenate(training.seen)
    in_the_box(bank, seen)

    def spread(centres):
        return np.square(seen[:, None] - centres).sum(axis=2).min(axis=1).sum()

    best = KMeans(ROWS, n_init=10, random_state=0).fit(seen)
    other = spread(init_bank(jax.random.key(0), ROWS, DIM))
    assert spread(bank) < 1.1 * best.inertia_ < 0.7 * other


def test_kmeans_is_a_function_of_the_seed():
    one, again, other = (np.asarray(kmeans(Embeddings(noise=1.0), seed=s).bank) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_kmeans_takes_no_more_than_the_split_holds():
    training = Embeddings()
    kmeans(training, samples=12)
    assert len(np.concatenate(training.seen)) == 32
    with pytest.raises(UserError, match="model.bank.rows=16 embeddings, and 7 volumes with their "
                                        "captions give 14; lower model.bank.rows"):
        kmeans(Embeddings(), samples=7)
    with pytest.raises(UserError, match="found 9 different embeddings for model.bank.rows=16"):
        kmeans(Embeddings(noise=0.0, distinct=9))


def from_file(path, state=None):
    def embed(*_):
        raise AssertionError("a file of centres needs no embeddings")

    return bank_init.fill_bank(state or new_state(), SimpleNamespace(embed=embed),
                               config_of(str(path)), (), samples=1)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_a_file_of_centres_becomes_the_bank(tmp_path, dtype):
    centres = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(dtype)
    np.save(tmp_path / "c.npy", centres)
    state = new_state()
    after = from_file(tmp_path / "c.npy", state)
    for bank in (after.bank, after.ema["bank"]):
        assert bank.dtype == jnp.float32 and bank.sharding == state.bank.sharding
        np.testing.assert_array_equal(bank, centres.astype("f4"))


class Dangerous:
    def __reduce__(self):
        return print, ("ran",)


def header(text):
    """A .npy file, version 2, that ends with its header."""
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text.encode()


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}"


def archive():
    file = io.BytesIO()
    np.savez(file, centres=np.zeros((ROWS, DIM), "f4"))
    return file.getvalue()


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)


@pytest.mark.parametrize(("content", "words"), [
    *((content, "cannot be read") for content in (
        None, b"", b"no array at all", b"\x93NUMPY\x01\x00", b"PK\x03\x04", archive(),
        header("{'descr': ("), header(FLOATS % 10**9), header(FLOATS % 10**20),
        header(" " * 20_000), pickle.dumps(Dangerous()), np.array([Dangerous()]))),
    (np.zeros((ROWS, DIM + 1), "f4"), r"holds \[16, 25\] float32; centres \[16, 24\]"),
    (np.zeros((DIM, ROWS), "f4"), "model.bank.rows × model.embed_dim"),
    (np.zeros(ROWS * DIM, "f4"), r"holds \[384\]"),
    (np.zeros((ROWS, DIM), "i8"), "int64; centres .* of floats"),
    (np.zeros((ROWS, DIM), "c8"), "complex64"), (np.full((ROWS, DIM), np.nan), "not finite"),
    (np.full((ROWS, DIM), 1e60), "not finite")])
def test_what_is_no_file_of_centres_is_one_sentence(tmp_path, capsys, content, words):
    write(tmp_path / "c.npy", content)
    with pytest.raises(UserError, match=words) as caught:
        from_file(tmp_path / "c.npy")
    assert "model.bank.init=" in str(caught.value) and "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "xavier", "uniform"])
def test_other_inits_are_left_alone(init):
    state = new_state()
    assert bank_init.fill_bank(state, None, config_of(init), None, samples=1) is state
    none = state.replace(bank=None)
    assert bank_init.fill_bank(none, None, config_of("kmeans"), None, samples=1) is none


def test_training_leaves_frozen_centres_of_its_own_towers():
    """The towers' embeddings, not a stand-in's; one device compiles fastest."""
    config = config_of("kmeans", **{"model.bank.frozen": True, "optim.ema": 0.9,
                                    "optim.warmup": 0})
    training = steps.make_training(config, meshes.make_mesh(1, 1, jax.devices()[:1]), per_epoch=10)
    batches = [make_batch(config, index) for index in range(8)]
    # Of the initialisation only the bank is compiled.
    bank = jax.jit(lambda seed: training.init(seed).bank)(0)
    assert not np.any(bank)
    state = drawn.state(training)
    embedded = np.concatenate([x for b in batches for x in training.embed(state, b)])
    state = bank_init.fill_bank(state, training, config, iter(batches), samples=64)
    centres = np.asarray(state.bank)
    in_the_box(centres, embedded)
    nearest = np.square(embedded[:, None] - centres).sum(axis=2).argmin(axis=1)
    assert len(set(nearest)) == ROWS
    before = jax.device_get(state.params)
    for batch in batches[:2]:
        state, _ = training.train_step(state, batch)
    np.testing.assert_array_equal(state.bank, centres)
    np.testing.assert_array_equal(training.gather(state)["bank"], centres)
    assert np.any(before["vision_head"]["linear"]["kernel"]
                  != np.asarray(state.params["vision_head"]["linear"]["kernel"]))
