import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from brgsa_jax import mesh as meshes
from brgsa_jax import paths
from brgsa_jax.config import UserError


def test_mesh_shapes_and_auto_axes():
    mesh = meshes.make_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert meshes.make_mesh(1, 1, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 3), (-1, -1), (16, 1), (0, -1)])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        meshes.make_mesh(*sizes)


def test_parameters_are_sharded_over_fsdp_by_default_and_by_rule():
    mesh = meshes.make_mesh(4, 2)
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((3, 128, 256), "f4"),
                  "bias": jax.ShapeDtypeStruct((256,), "f4")}}
    specs = meshes.parameter_specs(tree, mesh)
    assert specs == {"a": {"kernel": P(None, None, "fsdp"), "bias": P()}}
    specs = meshes.parameter_specs(tree, mesh, [("a/kernel", (None, "fsdp"))])
    assert specs["a"]["kernel"] == P(None, "fsdp")
    with pytest.raises(UserError, match="matches no parameter"):
        meshes.parameter_specs(tree, mesh, [("b/.*", ("fsdp",))])


def test_bank_rows_lie_over_all_devices():
    mesh = meshes.make_mesh(4, 2)
    assert meshes.bank_spec(64, mesh) == P(("data", "fsdp"))
    with pytest.raises(UserError, match="multiple such as 72"):
        meshes.bank_spec(65, mesh)


def test_path_matcher_covers_every_leaf_or_says_which_not():
    tree = {"vision": {"w": 1}, "text": {"w": 2}}
    assert paths.match(tree, [("vision/.*", 0.1), (".*", 1.0)]) == {
        "vision": {"w": 0.1}, "text": {"w": 1.0}}
    with pytest.raises(UserError, match="no rule covers 'text/w'"):
        paths.match(tree, [("vision/.*", 0.1)])


def test_constrain_batch_shards_the_first_axis():
    mesh = meshes.make_mesh()
    x = jax.jit(lambda x: meshes.constrain_batch(x * 2, mesh))(jnp.ones((16, 3)))
    assert x.addressable_shards[0].data.shape == (2, 3)
    assert meshes.constrain_batch(x, None) is x


def test_sharding_trees_follow_specs():
    mesh = meshes.make_mesh(4, 2)
    shardings = meshes.shardings({"a": P("fsdp"), "b": P()}, mesh)
    x = jax.device_put(np.zeros((4, 2)), shardings["a"])
    assert x.addressable_shards[0].data.shape == (2, 2)


def test_a_mesh_and_single_devices_hold_the_same_rows(devices):
    host = {"ids": np.arange(16 * 3).reshape(16, 3), "mask": np.arange(16)}
    mesh = meshes.make_mesh(4, 2)
    sharding = meshes.batch_sharding(mesh)
    whole, dealt = meshes.place(host, sharding), meshes.place(host, sharding, 8)
    for name, column in host.items():
        assert whole[name].shape == column.shape
        assert dealt[name].shape == (8, 2, *column.shape[1:])
        for position, device in enumerate(devices):
            rows = [shard.data for array in (dealt[name], whole[name])
                    for shard in array.addressable_shards if shard.device == device]
            np.testing.assert_array_equal(rows[0][0], column[2 * position:2 * position + 2])
            np.testing.assert_array_equal(rows[1], rows[0][0])
    # Shapes a per-device program takes as they are.
    sums = jax.pmap(lambda batch: batch["ids"].sum(), devices=devices)(dealt)
    np.testing.assert_array_equal(sums, host["ids"].reshape(8, -1).sum(1))


@pytest.mark.parametrize(("rule", "message"), [
    ((".*", "fsdp"), "the spec 'fsdp'"), ((".*", ("model",)), "spec"),
    (("(", (None,)), "a rule is"), ((".*",), "a rule is"),
    ((".*", (None, None, "fsdp")), "every named axis"),
    ((".*", ("fsdp",)), "divide its size")])
def test_wrong_rules_are_refused(rule, message):
    with pytest.raises(UserError, match=message):
        meshes.parameter_specs({"a": np.zeros((7, 4))}, meshes.make_mesh(4, 2), (rule,))
