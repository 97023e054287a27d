"""Batch normalisation and projection heads: golden vectors, masks, scopes over devices."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brgsa_jax import registry
from brgsa_jax.nn import heads  # noqa: F401  (registry entries)
from brgsa_jax.nn.norm import BatchNorm, Scope

DENSE = {"hidden": 0, "out": 3}
NORMS = {"hidden_norm": 1, "out_norm": 4}


def head_variables(file, side):
    """The state dict of a golden file as variables of our head."""
    get = lambda name: jnp.asarray(file[f"in_{side}_head.{name}"].astype(file.dtype))  # noqa: E731
    matrix = lambda w: w.reshape(w.shape[:2]).T  # noqa: E731
    params = {ours: {"kernel": matrix(get(f"{i}.weight")), "bias": get(f"{i}.bias")}
              for ours, i in DENSE.items()}
    params["hidden_norm"] = {"scale": get("1.weight"), "bias": get("1.bias")}
    stats = {ours: {"mean": get(f"{i}.running_mean"), "var": get(f"{i}.running_var")}
             for ours, i in NORMS.items()}
    return {"params": params, "batch_stats": stats}


def gradients_by_name(file, side, params):
    """Parameter gradients under the names and shapes of the golden file."""
    found = {}
    for ours, i in DENSE.items():
        shape = file[f"grad_{side}__head.{i}.weight"].shape
        found[f"head.{i}.weight"] = params[ours]["kernel"].T.reshape(shape)
        found[f"head.{i}.bias"] = params[ours]["bias"]
    found["head.1.weight"] = params["hidden_norm"]["scale"]
    found["head.1.bias"] = params["hidden_norm"]["bias"]
    return found


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("side", ["global", "local"])
@pytest.mark.parametrize("path", golden.files("heads"), ids=lambda p: p.stem)
def test_head_golden(path, side, dtype):
    with jax.enable_x64(dtype == "float64"):
        file = golden.Golden(path, dtype)
        variables = head_variables(file, side)
        x = jnp.asarray(file[f"in_{side}_x"].astype(dtype))
        cotangent = jnp.asarray(file[f"in_{side}_cotangent"].astype(dtype))
        head = registry.get("head", "batchnorm")(dim=cotangent.shape[-1],
                                                 hidden=variables["params"]["hidden"]["bias"].size)

        def loss(params, x):
            y, after = head.apply({**variables, "params": params}, x, train=True,
                                  mutable=["batch_stats"])
            return jnp.sum(y * cotangent), (y, after)

        grads, (y, after) = golden.jit(jax.grad(loss, (0, 1), has_aux=True))(
            variables["params"], x)
        assert y.dtype == dtype
        file.value(f"{side}_train", y)
        for ours, i in NORMS.items():
            for kind in ("mean", "var"):
                file.value(f"{side}_after_head.{i}.running_{kind}",
                           after["batch_stats"][ours][kind])
        file.value(f"{side}_eval", golden.jit(head.apply)({**variables, **after}, x))
        ours = {"x": grads[1], **gradients_by_name(file, side, grads[0])}
        # A bias before a normalisation has gradient zero: measured against its own kernel's.
        for i in DENSE.values():
            assert np.abs(file[f"grad_{side}__head.{i}.bias"]).max() < 1e-12
            largest = np.abs(file[f"grad_{side}__head.{i}.weight"]).max()
            bias = np.abs(ours.pop(f"head.{i}.bias")).max()
            assert bias <= golden.GRADIENT[dtype] * largest
        assert len(ours) == 5
        file.gradients(side, ours)
        file.finish()


def torch_norm(x, epsilon=1e-5):
    """Normalised rows of [N, W], mean and unbiased variance, in float64."""
    x = np.asarray(x, np.float64)
    mean, var = x.mean(0), x.var(0)
    return (x - mean) / np.sqrt(var + epsilon), mean, x.var(0, ddof=1)


def fresh(width):
    return {"mean": jnp.full(width, 0.5), "var": jnp.full(width, 2.0)}


def train_step(module, stats=None):
    """x[, mask] -> (y, running statistics) of a norm without affine part."""
    def run(x, mask=None):
        stats_ = fresh(x.shape[-1]) if stats is None else stats
        y, after = module.apply({"batch_stats": stats_}, x, mask, train=True,
                                mutable=["batch_stats"])
        return y, after["batch_stats"]
    return run


def test_masked_rows_enter_no_statistics_but_are_normalised():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (4, 5, 6)).astype("f4")
    mask = rng.random((4, 5)) < 0.6
    noisy = np.where(mask[..., None], x, np.float32(50.0))
    y, stats = golden.jit(train_step(BatchNorm(affine=False)))(noisy, mask)
    expected, mean, var = torch_norm(x[mask])
    np.testing.assert_allclose(np.asarray(y)[mask], expected, atol=2e-6)
    np.testing.assert_allclose(np.asarray(y)[~mask], (50 - mean + 0 * x[~mask]) / np.sqrt(
        x[mask].var(0) + 1e-5), rtol=1e-5)
    np.testing.assert_allclose(stats["mean"], 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * 2.0 + 0.1 * var, rtol=1e-5)
    whole, _ = golden.jit(train_step(BatchNorm(affine=False)))(noisy)
    assert np.abs(np.asarray(whole) - np.asarray(y)).max() > 0.1


def test_a_batch_without_rows_leaves_the_running_statistics():
    run = golden.jit(train_step(BatchNorm(affine=False)))
    y, stats = run(np.full((3, 2), np.nan, "f4"), np.zeros(3, bool))
    np.testing.assert_array_equal(stats["mean"], 0.5)
    np.testing.assert_array_equal(stats["var"], 2.0)
    assert y.shape == (3, 2)


def test_variance_survives_a_large_mean_and_bfloat16_input():
    rng = np.random.default_rng(0)
    x = (1e4 + rng.normal(0, 1, (64, 3))).astype("f4")
    y, stats = golden.jit(train_step(BatchNorm(affine=False, momentum=1.0)))(x)
    expected, _, var = torch_norm(x)
    np.testing.assert_allclose(y, expected, atol=2e-3)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)
    half = jnp.asarray(x - 1e4, jnp.bfloat16)
    y, _ = golden.jit(train_step(BatchNorm(affine=False)))(half)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, torch_norm(half.astype("f4"))[0], atol=2e-5)


def case():
    """A head, its variables, inputs [16, 3, W] of very unequal parts, and loss weights."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(16, 3, 6)) * (1 + np.arange(16))[:, None, None]
         + np.arange(16)[:, None, None]).astype("f4")
    weights = rng.normal(size=(16, 3, 4)).astype("f4")
    make = lambda scope: registry.get("head", "batchnorm")(dim=4, hidden=8, scope=scope)  # noqa: E731
    variables = golden.jit(make(Scope()).init)(jax.random.key(0), x)
    return make, variables, x, weights


def value_and_gradient(head, variables, axis_name=None, reduce=True):
    """(x, weights, mask) -> (y, running statistics, parameter gradients) of mean(y * weights)."""
    def run(x, weights, mask):
        def loss(params):
            y, after = head.apply({**variables, "params": params}, x, mask, train=True,
                                  mutable=["batch_stats"])
            value = jnp.mean(y * weights)
            if axis_name is not None:
                value = jax.lax.pmean(value, axis_name)
            return value, (y, after["batch_stats"])
        grads, (y, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        if axis_name is not None and reduce:
            grads = jax.lax.pmean(grads, axis_name)
        return y, stats, grads
    return run


def check_equal(one, many):
    y, stats, grads = one
    # Every device returns the statistics and gradients; all must agree, not only the first.
    np.testing.assert_allclose(np.asarray(many[0]).reshape(y.shape), y, atol=5e-6)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(many[1]), strict=True):
        np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=1e-5, atol=1e-6)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(many[2]), strict=True):
        np.testing.assert_allclose(b, np.broadcast_to(a, b.shape), rtol=0, atol=5e-6 * largest)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_devices_equal_one_device(devices, local, masked):
    make, variables, x, weights = case()
    mask = np.random.default_rng(1).random((16, 3)) < (0.7 if masked else 1.1)
    n = len(devices)
    one = golden.jit(value_and_gradient(make(Scope(shards=n if local else 1)), variables))(
        x, weights, mask)
    split = lambda a: a.reshape(n, -1, *a.shape[1:])  # noqa: E731
    many = jax.pmap(value_and_gradient(make(Scope("d", local=local)), variables, "d"), "d")(
        split(x), split(weights), split(mask))
    check_equal(one, many)
    other = golden.jit(value_and_gradient(make(Scope(shards=1 if local else n)), variables))(
        x, weights, mask)
    assert np.abs(other[0] - one[0]).max() > 0.1
    if not masked:
        plain = golden.jit(lambda x, w: value_and_gradient(
            make(Scope(shards=n if local else 1)), variables)(x, w, None))(x, weights)
        check_equal(plain, one)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_two_axes_equals_one_device(check_vma, local):
    make, variables, x, weights = case()
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    batch, whole = jax.P(("a", "b")), jax.P()
    # With check_vma the gradient of replicated parameters comes out already reduced.
    run = value_and_gradient(make(Scope(("a", "b"), local=local)), variables, ("a", "b"),
                             reduce=not check_vma)
    many = golden.jit(jax.shard_map(lambda x, w: run(x, w, None), mesh=mesh,
                                    in_specs=(batch, batch), out_specs=(batch, whole, whole),
                                    check_vma=check_vma))(x, weights)
    one = golden.jit(lambda x, w: value_and_gradient(
        make(Scope(shards=8 if local else 1)), variables)(x, w, None))(x, weights)
    check_equal(one, many)


def test_a_sharded_batch_under_jit_has_the_statistics_of_the_whole(devices):
    make, variables, x, weights = case()
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P("d")))  # noqa: E731
    for shards in (1, 8):
        run = golden.jit(lambda x, w, shards=shards: value_and_gradient(
            make(Scope(shards=shards)), variables)(x, w, None))
        check_equal(run(x, weights), run(place(x), place(weights)))


def test_shards_are_contiguous_rows():
    x = np.random.default_rng(0).normal(size=(6, 2)).astype("f4")
    x[3:] += 10
    y, stats = golden.jit(train_step(BatchNorm(affine=False, sharing=Scope(shards=2))))(x)
    parts = [torch_norm(x[:3]), torch_norm(x[3:])]
    np.testing.assert_allclose(y, np.concatenate([p[0] for p in parts]), atol=2e-5)
    for name, old, i in (("mean", 0.5, 1), ("var", 2.0, 2)):
        new = np.mean([p[i] for p in parts], axis=0)
        np.testing.assert_allclose(stats[name], 0.9 * old + 0.1 * new, rtol=1e-5)


def test_wrong_use_is_named():
    step = train_step(BatchNorm(affine=False))
    with pytest.raises(ValueError, match="larger batch"):
        step(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="4 rows cannot be split into 3"):
        train_step(BatchNorm(sharing=Scope(shards=3)))(jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="add local=True"):
        train_step(BatchNorm(sharing=Scope("d", shards=2)))(jnp.ones((4, 3)))


def test_linear_head_takes_what_every_head_takes():
    head = registry.get("head", "linear")(dim=3, scope=Scope("d"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.bfloat16)
    variables = golden.jit(head.init)(jax.random.key(0), x)
    assert set(variables) == {"params"}
    y = golden.jit(lambda x, m: head.apply(variables, x, m, train=True))(x, np.ones((2, 4), bool))
    assert y.dtype == jnp.float32
    linear = variables["params"]["linear"]
    np.testing.assert_allclose(y, x.astype("f4") @ linear["kernel"] + linear["bias"], atol=1e-6)


def test_a_single_row_says_nothing_of_the_spread():
    norm = BatchNorm(affine=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "f4")
    stats = norm.init(jax.random.key(0), x)["batch_stats"]
    _, changed = norm.apply({"batch_stats": stats}, x, jnp.arange(4) == 2, train=True,
                            mutable=["batch_stats"])
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * x[2], rtol=1e-6)
    np.testing.assert_array_equal(changed["batch_stats"]["var"], stats["var"])
