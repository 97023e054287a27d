"""brgsa_jax.data.sources: random access, decoding, fingerprints, and what importing data costs."""

import json
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from brgsa_jax.config import UserError
from brgsa_jax.data import builders, recipe, shards, sources


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("sources") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 2 * 2 * 64 * 64 * 32)
        return builders.build_phantom(out, seed=1, train=5, valid=1, workers=1,
                                      progress=False).out


def test_positions(dataset):
    source = sources.open_source(dataset)
    assert len(source) == 5 and len(list(dataset.glob("*train.array_record*"))) == 3
    assert [item["id"] for item in source] == [row.id for row in source.index]
    assert source[-1]["id"] == source[4]["id"] == source[np.int64(4)]["id"]
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            source[wrong]
    assert sources.splits(dataset) == {"train": 5, "valid": 1}
    with pytest.raises(UserError, match="no split 'test'; choose one of train, valid"):
        sources.open_source(dataset, "test")


def test_items_do_not_copy_and_cannot_be_changed(dataset):
    item = sources.open_source(dataset)[0]
    assert item["volume"].dtype == np.int16 and item["volume"].shape == (64, 64, 32)
    assert not item["volume"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        item["volume"][0] = 0


def test_crops(dataset):
    source = sources.open_source(dataset)
    whole = source[2]["volume"]
    crop = source.volume_crop(2, (3, 10, 5), (40, 20, 27))
    np.testing.assert_array_equal(crop, whole[3:43, 10:30, 5:32])
    assert crop.flags.c_contiguous and crop.flags.writeable and crop.dtype == np.int16
    item = source.item(2, (0, 0, 0), (64, 64, 32))
    np.testing.assert_array_equal(item["volume"], whole)
    assert item["report"] == source[2]["report"]
    for origin, size in [((0, 0, 6), (64, 64, 27)), ((-1, 0, 0), (4, 4, 4)), ((0, 0, 0), (0, 4, 4)),
                         ((0, 0), (4, 4))]:
        with pytest.raises(ValueError):
            source.volume_crop(2, origin, size)
    with pytest.raises(ValueError, match="both"):
        source.item(2, origin=(0, 0, 0))


def test_pickles_to_its_path_and_reads_from_many_threads(dataset):
    source = sources.open_source(dataset, "train")
    want = [source[i]["volume"].copy() for i in range(5)]
    data = pickle.dumps(source)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy.fingerprint == source.fingerprint
    with ThreadPoolExecutor(8) as pool:
        positions = [i % 5 for i in range(200)]
        for position, item in zip(positions, pool.map(copy.__getitem__, positions), strict=True):
            np.testing.assert_array_equal(item["volume"], want[position])


def test_tfds_reads_the_same_without_tensorflow_or_jax(dataset):
    code = f"""
        import sys
        import numpy as np
        import tensorflow_datasets as tfds
        from brgsa_jax.data import builders, sources
        builder = tfds.builder_from_directory({str(dataset)!r})
        assert {{k: v.num_examples for k, v in builder.info.splits.items()}} == {{
            "train": 5, "valid": 1}}
        for split in ("train", "valid"):
            source = sources.open_source({str(dataset)!r}, split)
            read = builder.as_data_source(split)
            assert len(source) == len(read)
            for mine, theirs in zip(source, read):
                assert theirs["volume"].dtype == np.int16
                np.testing.assert_array_equal(mine["volume"], theirs["volume"])
                for name in ("id", "patient", "report"):
                    assert mine[name] == theirs[name].decode()
                assert list(mine["findings"]) == [f.decode() for f in theirs["findings"]]
                np.testing.assert_allclose(mine["spacing"], theirs["spacing"])
        bad = [m for m in ("tensorflow", "jax", "jaxlib", "grain", "flax", "torch")
               if m in sys.modules]
        assert not bad, bad
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_importing_and_reading_stays_light(dataset):
    code = f"""
        import sys
        import brgsa_jax.data.volume
        heavy = {{"jax", "grain", "flax", "tensorflow", "tensorflow_datasets", "torch",
                  "scipy.ndimage"}}
        print("importing:", *heavy & set(sys.modules))
        from brgsa_jax.data import builders, sources
        sources.open_source({str(dataset)!r})[0]
        print("reading:", *heavy & set(sys.modules))
        """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60,
                         capture_output=True, text=True)
    assert run.stdout.split() == ["importing:", "reading:"]


def test_reading_a_small_record_is_fast(dataset):
    source = sources.open_source(dataset)
    best = np.inf
    for _ in range(10):
        started = time.thread_time()
        for position in range(5):
            source[position]
        best = min(best, (time.thread_time() - started) / 5)
    assert best < 1e-3


def test_fingerprint_follows_content_and_order(dataset, tmp_path):
    source = sources.open_source(dataset)
    digests = [sources.record_digest(item) for item in source]
    assert digests == [row.digest for row in source.index] and len(set(digests)) == 5
    assert source.fingerprint == sources.chain_digests("train", digests)
    assert source.fingerprint != sources.chain_digests("train", digests[::-1])
    assert source.fingerprint != sources.open_source(dataset, "valid").fingerprint
    item = source[0]
    changed = item["volume"].copy()
    changed[1, 2, 3] += 1
    for change in ({"volume": changed}, {"id": "x"}, {"report": "x"}, {"findings": ("x",)},
                   {"patient": "x"}, {"boxes": {"x": [(0, 0, 0, 1, 1, 1)]}},
                   {"spacing": (1, 1, 1)}):
        assert sources.record_digest({**item, **change}) != digests[0]
    assert sources.record_digest({**item, "volume": item["volume"].astype(">i2")}) == digests[0]


def test_digests_of_volumes_stay_and_those_of_radiographs_differ():
    record = {"id": "i", "patient": "p", "report": "Text.", "findings": ("A", "B"),
              "boxes": {"A": [(0, 1, 2, 3, 4, 5)]}, "spacing": (1.5, 1.5, 3.0),
              "volume": np.arange(24, dtype=np.int16).reshape(2, 3, 4)}
    # Another value here means that published data sets no longer verify.
    assert sources.record_digest(record) == (
        "addeee5f77e790daab14a8542b47dbb1047bd9a0ebfe2fa93c00ae8af804195f")
    grey = record | {"volume": record["volume"].astype(np.uint8)}
    others = [record, grey, grey | {"volume": grey["volume"].reshape(6, 4)},
              grey | {"volume": grey["volume"] + np.uint8(1)}]
    assert len({sources.record_digest(other) for other in others}) == 4


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("radiographs")
    (root / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 70), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    (root / "t.csv").write_text("id,report\n" + "".join(f"{n},Text.\n" for n in range(3)))
    return builders.build_image2d(root / "set", images=root / "images", table=root / "t.csv",
                                  size=64, workers=1, progress=False).out


def test_radiographs_are_read_cropped_and_verified(radiographs, tmp_path):
    source = sources.open_source(radiographs)
    whole = source[1]["volume"]
    assert whole.dtype == np.uint8 and not whole.flags.owndata
    crop = source.volume_crop(1, (3, 10), (40, 54))
    np.testing.assert_array_equal(crop, whole[3:43, 10:64])
    assert crop.flags.c_contiguous and crop.flags.writeable
    for origin, size in [((0, 11), (64, 54)), ((0, 0, 0), (4, 4, 4)), ((0,), (4,))]:
        with pytest.raises(ValueError):
            source.volume_crop(1, origin, size)
    source.verify()
    copy = tmp_path / "copy"
    shutil.copytree(radiographs, copy)
    described = json.loads((copy / "dataset.json").read_text())
    described["preprocess"]["dtype"] = "float64"
    (copy / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="type 'float64' are not known, only int16 and uint8"):
        sources.open_source(copy)


def image(shape, spacing=(), **more):
    return ConfigDict({"shape": shape, "spacing": spacing, "window": (0, 255), **more})


def test_a_model_reads_radiographs_whole_or_their_centre(radiographs, dataset):
    source = sources.open_source(radiographs)
    for shape in ((64, 64), (56, 56)):
        recipe.check_recipe(source, image(shape))
        recipe.check_recipe(source, image(shape, stored=(64, 64)))
    assert recipe.central_shape((256, 256)) == (224, 224)
    for shape, spacing in (((48, 48), ()), ((128, 128), ()), ((64, 56), ()),
                           ((64, 64, 32), (6.0, 6.0, 12.0))):
        with pytest.raises(UserError, match="holds radiographs of 64×64 pixels, read whole or as "
                           "their central 56×56 pixels, the model is for "):
            recipe.check_recipe(source, image(shape, spacing))
    with pytest.raises(UserError, match="the model is for 64×64 pixels of 73×73 pixels; build"):
        recipe.check_recipe(source, image((64, 64), stored=(73, 73)))
    with pytest.raises(UserError, match="holds volumes of 64×64×32 voxels at 6×6×12 mm, the model "
                       "is for 64×64 pixels"):
        recipe.check_recipe(sources.open_source(dataset), image((64, 64)))


def test_verify_finds_a_changed_record(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    sources.open_source(copy).verify()
    index = copy / sources.index_file("train")
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="is not what was built"):
        sources.open_source(copy).verify()
    index.write_text("\n".join(lines) + "\n")
    shard = copy / "phantom-train.array_record-00000-of-00003"
    shutil.copy(copy / "phantom-train.array_record-00001-of-00003", shard)
    with pytest.raises(UserError, match="record .* is not what was built"):
        sources.open_source(copy).verify()
    shard.unlink()
    with pytest.raises(UserError, match="lacks phantom-train"):
        sources.open_source(copy)


def test_folders_that_are_no_data_set(dataset, tmp_path):
    with pytest.raises(UserError, match="is no data set"):
        sources.open_source(tmp_path)
    file = tmp_path / "dataset.json"
    for text, reason in [("{", "damaged"), ("[]", "damaged"), ("{}", "damaged"),
                         (json.dumps({"format": 99}), "format 99")]:
        file.write_text(text)
        with pytest.raises(UserError, match=reason):
            sources.open_source(tmp_path)


def test_metadata_is_a_copy(dataset):
    source = sources.open_source(dataset)
    source.metadata["findings"].clear()
    metadata = source.metadata
    assert len(metadata["findings"]) == 33 and metadata["split"] == "train"
    assert metadata["shape"] == [64, 64, 32] and metadata["spacing"] == [6.0, 6.0, 12.0]
    assert metadata["fingerprint"] == source.fingerprint


def test_parse_example_reads_every_kind_of_feature():
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    feature = message.features.feature
    feature["bytes"].bytes_list.value.extend([b"", b"a" * 300, "ä".encode()])
    feature["floats"].float_list.value.extend([1.5, -2.0])
    feature["ints"].int64_list.value.extend([0, -1, 2**62, 300])
    feature["nothing"].SetInParent()
    data = message.SerializeToString()
    parsed = sources.parse_example(data)
    assert [bytes(v) for v in parsed["bytes"]] == [b"", b"a" * 300, "ä".encode()]
    assert parsed["floats"] == [1.5, -2.0] and parsed["ints"] == [0, -1, 2**62, 300]
    assert parsed["nothing"] == []
    with pytest.raises(ValueError, match="cut short"):
        sources.parse_example(data[:-1])
    with pytest.raises(ValueError, match="no tf.train.Example"):
        sources.parse_example(b"\x0b\x0b")


def test_tune_malloc_is_accepted_by_glibc():
    # In a process of its own: the setting lasts.
    code = "from brgsa_jax.data.sources import tune_malloc; print(tune_malloc())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    libc = subprocess.run([sys.executable, "-c", "import platform; print(platform.libc_ver()[0])"],
                          capture_output=True, text=True, check=True).stdout.strip()
    assert done.stdout.strip() == str(libc == "glibc")
