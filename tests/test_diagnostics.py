"""Batch statistics and bank health: golden accuracies, definitions, devices, hostile batches."""

from functools import cache

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from brgsa_jax.losses import bank_health, batch_statistics
from brgsa_jax.losses.diagnostics import BankHealth, BatchStatistics

B, REAL, D, K = 16, 13, 6, 24

# Columns link 0-1 and 1-2 but not 0-2: the relation is not transitive.
GROUPS = np.stack([
    [0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 9, 10, 11],
    [20, 21, 21, 22, 23, 24, 20, 25, 26, 27, 28, 29, 30, 31, 32, 31],
], axis=1)  # fmt: skip
VALID = np.arange(B) < REAL


def batch(seed=0):
    """Pairs that are alike, but not so alike that every accuracy is 1; norms unlike 1."""
    rng = np.random.default_rng(seed)
    image, noise = (rng.normal(size=(B, D)).astype(np.float32) for _ in range(2))
    return 3.0 * image, image + noise


def bank_of(rows=K, seed=1):
    """Every sample of ``bank_batch`` reads the last three rows with next to no weight."""
    bank = np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)
    bank[-3:, 0] = -9.0
    return bank


def bank_batch():
    image, text = batch()
    image[:, 0], text[:, 0] = 1.5, 1.0
    return image, text


# --------------------------------------------------------------------------------------------
# Definitions, in numpy and float64.


def dense_statistics(image, text, positives=None, tie=2e-6):
    image, text = (np.asarray(x, np.float64) for x in (image, text))
    norms = [np.linalg.norm(x, axis=1) for x in (image, text)]
    unit = [x / np.where(n > 0, n, 1.0)[:, None] for x, n in zip((image, text), norms, strict=True)]
    rows = len(image)
    ids = np.arange(rows) if positives is None else np.asarray(positives)
    ids = ids.reshape(rows, -1)
    same = np.array([[bool(np.any(a == b)) for b in ids] for a in ids])
    cosine = unit[0] @ unit[1].T
    hardest, hits = [], {1: [], 5: []}
    for scores in (cosine, cosine.T):
        for i in range(rows):
            negatives = scores[i][~same[i]]
            hardest += [negatives.max()] if negatives.size else []
            tied = np.sum(np.abs(negatives - scores[i, i]) < tie)
            greater = np.sum(negatives >= scores[i, i] + tie)
            for k, hit in hits.items():
                # Every place the own pair may take among those it ties with is as likely.
                hit.append(np.mean(np.arange(greater, greater + tied + 1) < k))
    return BatchStatistics(
        positive_cosine=np.mean(np.diag(cosine)),
        hardest_negative_cosine=np.mean(hardest) if hardest else 0.0,
        top1=np.mean(hits[1]),
        top5=np.mean(hits[5]),
        duplicates=np.mean(same.sum(1) - 1),
        image_norm=np.mean(norms[0]),
        text_norm=np.mean(norms[1]),
    )


def dense_health(image, text, bank, scale):
    bank = np.asarray(bank, np.float64)

    def entropy(p):
        return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)

    codes = []
    for x in (image, text):
        logits = scale * np.asarray(x, np.float64) @ bank.T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        codes.append(weights / weights.sum(1, keepdims=True))
    share = np.concatenate(codes).mean(0)
    norms = np.linalg.norm(bank, axis=1)
    return BankHealth(
        *(np.mean(entropy(c)) for c in codes),
        usage_entropy=entropy(share),
        dead_rows=np.sum(share < 0.01 / len(bank)),
        row_norm_mean=norms.mean(),
        row_norm_min=norms.min(),
        row_norm_max=norms.max(),
    )


def close(ours, expected, rtol=2e-6):
    for name, a, b in zip(expected._fields, ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, err_msg=name)


statistics = golden.jit(batch_statistics)


@golden.jit
def health(image, text, bank, scale, valid=None):
    return bank_health(image, text, bank, scale=scale, valid=valid)


def padded(x):
    x = x.copy()
    x[REAL:] = np.nan
    return x


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("ita", "total"), ids=lambda p: p.stem)
def test_accuracy_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        file = golden.Golden(path, dtype)
        ours = statistics(*file.inputs("img_raw", "report_raw").values())
        file.value("acc1", [100.0 * float(ours.top1)])
        file.value("acc5", [100.0 * float(ours.top5)])
        assert file.worst() <= 1.0, file.deviations


@pytest.mark.parametrize("groups", [None, GROUPS[:, 0], GROUPS], ids=["none", "one", "two"])
def test_batch_statistics_are_their_definition(groups):
    image, text = batch()
    expected = dense_statistics(image, text, groups)
    assert 0 < expected.top1 < expected.top5 < 1
    close(statistics(image, text, positives=groups), expected)
    short = dense_statistics(image[:REAL], text[:REAL], None if groups is None else groups[:REAL])
    assert not np.allclose(short, expected)
    close(statistics(padded(image), padded(text), positives=groups, valid=VALID), short)


def test_groups_link_what_no_single_column_links():
    same = (GROUPS[:, None] == GROUPS[None]).any(-1)
    assert same[0, 1] and same[1, 2] and not same[0, 2]
    two, one = (statistics(*batch(), positives=g) for g in (GROUPS, GROUPS[:, 0]))
    assert two.duplicates > one.duplicates > 0


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_bank_health_is_its_definition(scale):
    image, text = bank_batch()
    bank = bank_of()
    expected = dense_health(image, text, bank, scale)
    assert expected.dead_rows >= (3 if scale == 1.0 else 0)
    close(health(image, text, bank, scale), expected)
    short = dense_health(image[:REAL], text[:REAL], bank, scale)
    close(health(padded(image), padded(text), bank, scale, VALID), short)


def test_bank_health_tells_even_use_from_collapse():
    image, text = bank_batch()
    even = health(image, text, np.zeros((K, D), np.float32), 1.0)
    np.testing.assert_allclose(even[:3], np.log(K), rtol=1e-6)
    assert even.dead_rows == 0 and even.row_norm_max == 0
    collapsed = bank_of()
    collapsed[5, 0] = 400.0
    collapsed = health(image, text, collapsed, 1.0)
    np.testing.assert_allclose(collapsed[:3], 0.0, atol=1e-6)
    assert collapsed.dead_rows == K - 1
    # Sharp codes, evenly spread: each sample reads one row, the batch reads many.
    each = 50.0 * np.eye(8, dtype=np.float32)
    spread = health(each, each, np.eye(8, dtype=np.float32), 1.0)
    np.testing.assert_allclose(spread[:2], 0.0, atol=1e-6)
    np.testing.assert_allclose(spread.usage_entropy, np.log(8), rtol=1e-6)


def test_ties_are_broken_at_random_and_in_no_order():
    image, text = batch()
    # Every image ties with all other captions; the one caption ranks its images somehow.
    ours = statistics(image, np.repeat(text[:1], B, axis=0))
    np.testing.assert_allclose([ours.top1, ours.top5], [1 / B, 5 / B], rtol=1e-6)
    # Rows 3 and 11 are one: whoever comes first, each finds its own half of the time.
    twins = image.copy()
    twins[3] = twins[11]
    for order in (np.arange(B), np.arange(B)[::-1]):
        ours = statistics(twins[order], twins[order])
        np.testing.assert_allclose([ours.top1, ours.top5], [(B - 1) / B, 1.0], rtol=1e-6)


# --------------------------------------------------------------------------------------------
# Devices.

# Name -> mesh shape, axes, axes of the bank's rows, check_vma; None is pmap.
MODES = {
    "8, check_vma": ((8,), ("data",), "data", True),
    "8, whole bank": ((8,), ("data",), None, True),
    "2x4, check_vma": ((2, 4), ("data", "fsdp"), "fsdp", True),
    "2x4, rows over both": ((2, 4), ("data", "fsdp"), ("data", "fsdp"), False),
    "2x4, rows over the slow axis": ((2, 4), ("data", "fsdp"), "data", False),
    "pmap": None,
}


def everything(arguments, bank, axis_name=None, rows_axis=None):
    """All scalars, of all ways to ask."""
    image, text, photos, alike, groups, valid = arguments
    on = {"axis_name": axis_name}
    return {
        "plain": batch_statistics(image, text, **on),
        "one column": batch_statistics(image, text, positives=groups[:, 0], valid=valid, **on),
        "two columns": batch_statistics(image, text, positives=groups, valid=valid, **on),
        "identical captions": batch_statistics(photos, alike, **on),
        "bank": bank_health(image, text, bank, rows_axis=rows_axis, **on),
        "bank, ragged": bank_health(
            image, text, bank, scale=0.9, rows_axis=rows_axis, valid=valid, **on
        ),
    }


def device_arguments():
    image, text = bank_batch()
    # Wide, as sums of few terms are the same wherever the equal vectors lie.
    wide = np.random.default_rng(2).normal(size=(2, B, 384)).astype(np.float32)
    wide[1] = wide[1, :1]
    return (image, text, *wide, GROUPS, VALID), bank_of()


@cache
def one_device():
    return jax.tree.map(np.asarray, golden.jit(everything)(*device_arguments()))


def across(shape, names, rows, check_vma):
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    axes = names if len(names) > 1 else names[0]
    return golden.jit(
        jax.shard_map(
            lambda arguments, bank: everything(arguments, bank, axes, rows),
            mesh=mesh,
            in_specs=(P(axes), P(rows)),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def with_pmap(arguments, bank):
    parallel = jax.pmap(
        lambda arguments, bank: everything(arguments, bank, "devices"),
        axis_name="devices",
        in_axes=(0, None),
    )
    dealt = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), arguments)
    out = parallel.lower(dealt, bank).compile(golden.quick_compile())(dealt, bank)
    for x in jax.tree.leaves(out):
        assert np.all(np.asarray(x) == np.asarray(x)[0]), "devices disagree"
    return jax.tree.map(lambda x: np.asarray(x)[0], out)


@pytest.mark.parametrize("mode", MODES)
def test_devices_equal_one_device(mode):
    function = across(*MODES[mode]) if MODES[mode] else with_pmap
    ours = function(*device_arguments())
    for name, expected in one_device().items():
        assert 0 not in expected or name in ("plain", "identical captions"), name
        close(ours[name], expected, rtol=1e-6)


@pytest.mark.parametrize("which", ["statistics", "bank"])
def test_memory_does_not_grow_with_devices(which):
    def temporary(devices, gather=False):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )

        def local(image, text, bank):
            if gather:
                image, text = (
                    jax.lax.all_gather(x, "data", tiled=True) for x in (image, text)
                )
                return jax.lax.psum(jnp.sum(jnp.sin(image @ text.T) @ image), "data")
            if which == "statistics":
                return batch_statistics(image, text, axis_name="data")
            return bank_health(image, text, bank, axis_name="data", rows_axis="data")

        function = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
        x = jax.ShapeDtypeStruct((devices * 32, 512), jnp.float32)
        return jax.jit(function).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) <= 1.1 * temporary(2)
    # The measure itself must see growth where there is some.
    assert temporary(8, gather=True) > 2 * temporary(2, gather=True)


# --------------------------------------------------------------------------------------------
# What must not break.


@cache
def hostile_function():
    return golden.jit(lambda arguments, bank: everything(arguments, bank))


@pytest.mark.parametrize(
    "which", ["zero vectors", "zero images", "identical captions", "one group", "nothing valid"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hostile_batches_stay_finite(which, dtype):
    (image, text, photos, alike, groups, valid), bank = device_arguments()
    if which == "zero vectors":
        image[:3], text[2:5], bank[:2] = 0.0, 0.0, 0.0
    elif which == "zero images":
        image[:] = 0.0
    elif which == "identical captions":
        text[:] = text[:1]
    elif which == "one group":
        groups = np.zeros_like(groups)
    elif which == "nothing valid":
        valid = np.zeros_like(valid)
    image, text, photos, alike, bank = (
        jnp.asarray(x, dtype) for x in (image, text, photos, alike, bank)
    )
    ours = hostile_function()((image, text, photos, alike, groups, valid), bank)
    for name, result in ours.items():
        for field, x in result._asdict().items():
            assert x.shape == () and x.dtype == jnp.float32, (name, field)
            assert np.isfinite(x), (name, field)
    wide = [np.asarray(x, np.float32) for x in (image, text)]
    close(ours["plain"], dense_statistics(*wide))
    if which == "one group":
        # Nobody has a negative: no anchor to average, and nothing to rank the own pair below.
        assert ours["two columns"].hardest_negative_cosine == 0
        assert ours["two columns"].top1 == 1 and ours["two columns"].duplicates == REAL - 1
    if which == "nothing valid":
        assert not any(ours["two columns"])
        assert ours["bank, ragged"].dead_rows == K and ours["bank, ragged"].usage_entropy == 0


@pytest.mark.parametrize("devices", [1, 8])
def test_no_gradient_flows(devices):
    (image, text, *_), bank = device_arguments()

    def total(image, text, bank, scale, **axes):
        statistics = batch_statistics(image, text, axis_name=axes.get("axis_name"))
        health = bank_health(image, text, bank, scale=scale, **axes)
        return sum(statistics) + sum(health)

    if devices > 1:
        # As the step would: collectives without a derivative must not be differentiated.
        on_devices = jax.shard_map(
            lambda *x: total(*x, axis_name="data", rows_axis="data"),
            mesh=jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"), P("data"), P("data"), P()),
            out_specs=P(),
        )
    else:
        on_devices = total

    def loss(*x):
        return on_devices(*x) + jnp.sum(x[0])

    grads = golden.jit(jax.grad(loss, (0, 1, 2, 3)))(image, text, bank, 1.0)
    assert np.all(np.asarray(grads[0]) == 1)
    assert not any(np.any(g) for g in grads[1:])


def test_wrong_use_is_named():
    image, text = batch()
    with pytest.raises(ValueError, match="text has shape"):
        batch_statistics(image, text[:5])
    with pytest.raises(ValueError, match="positives has no column"):
        batch_statistics(image, text, positives=np.zeros((B, 0), int))
    with pytest.raises(ValueError, match="bank has shape"):
        bank_health(image, text, np.zeros((K, D + 1), np.float32))
    with pytest.raises(ValueError, match="bank_health: rows_axis.*fsdp"):
        bank_health(image, text, bank_of(), axis_name="data", rows_axis="fsdp")
