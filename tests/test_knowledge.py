"""Bank read and knowledge interaction: golden vectors, sharded rows, definitions."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from brgsa_jax.losses import info_nce, knowledge, knowledge_interaction, read_bank


def check_cmki(file):
    meta = file.meta

    def function(x):
        loss = knowledge_interaction(x["img"], x["text"], x["W"], temperature=1 / meta["temp3"])
        codes = [read_bank(x[side], x["W"]) for side in ("img", "text")]
        losses = {
            "rows": loss.contrast.image_to_text,
            "cols": loss.contrast.text_to_image,
            "recon_rows": loss.contrast_reconstructed.image_to_text,
            "recon_cols": loss.contrast_reconstructed.text_to_image,
            "mse_img": loss.reconstruction.mse_image,
            "mse_text": loss.reconstruction.mse_text,
        }
        return losses, codes

    pair, recon, mse = ("rows", "cols"), ("recon_rows", "recon_cols"), ("mse_img", "mse_text")
    total = (
        dict.fromkeys(pair, meta["w_global"])
        | dict.fromkeys(recon, meta["w_recon"])
        | dict.fromkeys(mse, meta["w_mse"])
    )
    weights = {
        "total": total,
        "global": dict.fromkeys(pair, 1.0),
        "recon": dict.fromkeys(recon, 1.0),
        "mse": dict.fromkeys(mse, 1.0),
    }
    losses, reads, grads = golden.differentiate(function, file.inputs("img", "text", "W"), weights)
    file.value("loss_global_rows", losses["rows"])
    file.value("loss_global_cols", losses["cols"])
    for name in recon + mse:
        file.value(f"loss_{name}", losses[name])
    file.value("loss", sum(total[k] * losses[k] for k in losses))
    for side, read in zip(("img", "text"), reads, strict=True):
        file.value(f"recon_{side}", read.reconstruction)
        file.value(f"z_{side}", read.codes)
    for prefix in weights:
        file.gradients(prefix, grads[prefix])
    return file


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("path", golden.files("cmki"), ids=lambda p: p.stem)
def test_cmki_golden(path, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_cmki(golden.Golden(path, dtype)).finish()


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "visited"])
@pytest.mark.parametrize("rows", ["fsdp", "data", ("data", "fsdp")])
def test_sharded_rows_read_as_the_whole_bank(rows, gathered, monkeypatch):
    if not gathered:
        monkeypatch.setattr(knowledge, "LARGEST_GATHERED", 0)
    x, bank = random(16, 6), random(24, 6, seed=1)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    both = P(("data", "fsdp"))

    def loss(read):
        # Codes and reconstruction both carry gradient, every entry its own.
        weight = jnp.arange(read.codes.size).reshape(read.codes.shape) % 7
        return jnp.sum(jnp.sin(read.reconstruction)) + jnp.sum(weight * read.codes)

    def sharded(x, bank):
        read = jax.shard_map(
            lambda x, bank: read_bank(x, bank, scale=0.7, rows_axis=rows),
            mesh=mesh,
            in_specs=(both, P(rows)),
            out_specs=both,
        )(x, bank)
        return loss(read), read

    def whole(x, bank):
        read = read_bank(x, bank, scale=0.7)
        return loss(read), read

    results = [
        golden.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(x, bank) for f in (sharded, whole)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-6 * np.max(np.abs(b)))


def test_rows_of_a_large_bank_stay_where_they_are(monkeypatch):
    """No device ever holds the whole bank: the collectives carry samples."""
    # Just below what the bank takes.
    monkeypatch.setattr(knowledge, "LARGEST_GATHERED", 4096 * 6 * 4 - 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    read = jax.shard_map(
        lambda x, bank: read_bank(x, bank, rows_axis="data").reconstruction,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    x, bank = jnp.zeros((16, 6)), jnp.zeros((4096, 6))
    text = golden.jit(jax.grad(lambda x, b: read(x, b).sum(), (0, 1))).lower(x, bank).compile()
    assert "4096,6]" not in text.as_text() and "512,6]" in text.as_text()


def test_memory_of_the_ring_does_not_grow_with_the_devices():
    """At as many rows a device, bank read and contrast take the same on 2 and on 8 devices."""

    def temporaries(devices):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,),
                             devices=jax.devices()[:devices])
        terms = jax.shard_map(
            lambda image, text, bank: knowledge_interaction(
                image, text, bank, negatives="ring", axis_name="data",
                rows_axis="data").contrast_reconstructed.image_to_text,
            mesh=mesh, in_specs=P("data"), out_specs=P())
        shape = jax.ShapeDtypeStruct((32 * devices, 64), jnp.float32)
        bank = jax.ShapeDtypeStruct((256, 64), jnp.float32)
        program = golden.jit(jax.grad(terms, (0, 1, 2))).lower(shape, shape, bank).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 1.1 * temporaries(2)


@pytest.mark.parametrize("negatives", ["global", "ring"])
def test_both_contrasts_know_all_columns_of_positives(negatives):
    image, text, bank = random(6, 5), random(6, 5, seed=1), random(9, 5, seed=2)
    # Rows 0 and 1, and 1 and 2, are positives of each other; 0 and 2 are not.
    groups = np.array([[0, 10], [0, 11], [1, 11], [2, 12], [3, 13], [4, 14]])

    def ours(groups):
        return knowledge_interaction(
            image, text, bank, temperature=0.3, negatives=negatives, positives=groups
        )

    def expected(groups):
        reads = [read_bank(x, bank).reconstruction for x in (image, text)]
        return [
            sum(info_nce(*pair, temperature=0.3, positives=groups))
            for pair in ((image, text), reads)
        ]

    both = golden.jit(ours)(groups)
    first = golden.jit(ours)(groups[:, 0])
    np.testing.assert_allclose(
        [sum(both.contrast), sum(both.contrast_reconstructed)],
        golden.jit(expected)(groups),
        rtol=2e-6,
    )
    assert abs(sum(both.contrast) - sum(first.contrast)) > 1e-2
    assert abs(sum(both.contrast_reconstructed) - sum(first.contrast_reconstructed)) > 1e-3


def test_codes_are_a_softmax_without_overflow():
    read = golden.jit(read_bank)(100.0 * random(5, 8), 100.0 * random(12, 8, seed=1))
    assert np.all(np.isfinite(read.codes)) and np.all(np.isfinite(read.reconstruction))
    np.testing.assert_allclose(np.sum(read.codes, axis=1), 1.0, rtol=1e-6)


def test_wrong_use_is_named():
    image, text, bank = random(4, 3), random(4, 3), random(8, 3)
    with pytest.raises(ValueError, match="rows_axis.*fsdp"):
        knowledge_interaction(image, text, bank, rows_axis="fsdp", axis_name="data")
    with pytest.raises(ValueError, match="bank has shape"):
        read_bank(image, random(8, 4))
