"""Tensors of any file: exact, lazily, and without running anything."""

import importlib
import json
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from brgsa_jax.config import UserError
from brgsa_jax.weights import pickle_machine, torch_file
from brgsa_jax.weights.tensors import open_tensors

EXTRAS = Path(__file__).parent / "golden/ckpt_extras"
NEEDLE = np.arange(12, dtype=np.float32)


# A small assembler: torch files that torch itself would not write.

def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else (
        b"\x8a\x0a" + value.to_bytes(10, "little", signed=True))


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def several(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *args):
    return name(function) + several(*args) + b"R"


def storage(key="0", kind="torch.FloatStorage", count=12, part=b"", tag="storage"):
    return several(text(tag), name(kind), text(key), text("cpu"), integer(count), part) + b"Q"


def tensor(shape=(12,), strides=(1,), offset=0, where=None):
    numbers = (several(*map(integer, shape)), several(*map(integer, strides)))
    return call("torch._utils._rebuild_tensor_v2", where or storage(), integer(offset), *numbers,
                b"\x89", call("collections.OrderedDict"))


def dictionary(**entries):
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def write_zip(path, body, blobs=None, *, compressed=(), **files):
    """A zip as torch.save makes it, around the opcodes of one object."""
    files = {"data.pkl": b"\x80\x02" + body + b".", **files}
    for key, data in ({"0": NEEDLE.tobytes()} if blobs is None else blobs).items():
        files[f"data/{key}"] = data
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            kind = zipfile.ZIP_DEFLATED if file in compressed else zipfile.ZIP_STORED
            archive.writestr(f"x/{file}", data, kind)
    return path


def write_legacy(path, body, blobs=None):
    blobs = {"0": NEEDLE} if blobs is None else blobs
    with open(path, "wb") as file:
        for value in (torch_file.MAGIC, torch_file.PROTOCOL, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        file.write(b"\x80\x02" + body + b".")
        pickle.dump(list(blobs), file, protocol=2)
        for data in blobs.values():
            file.write(struct.pack("<q", data.size) + data.tobytes())
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        tensors = open_tensors(path)
        for key in tensors.specs:
            tensors.read(key)
    message = str(caught.value)
    assert str(path.name) in message and "\n" not in message and ";" in message
    # Folders of tests are called after what they test.
    return message.replace(str(path.parent), "")


def read_all(path):
    """Everything of a file, or None if it is refused; any other exception passes through."""
    try:
        tensors = open_tensors(path)
        return {key: tensors.read(key) for key in tensors.specs}
    except UserError:
        return None


def same(found, expected):
    return (found.shape == expected.shape and found.flags.c_contiguous
            and np.array_equal(found.astype(expected.dtype), expected, equal_nan=True))


@pytest.mark.parametrize("file", ["formats_zip.ckpt", "formats_legacy.ckpt",
                                  "bare_state_dict.pth"])
def test_every_format_reads_exactly(file):
    expected = np.load(EXTRAS / "formats_expected.npz")
    tensors = open_tensors(EXTRAS / file)
    assert sorted(tensors.specs) == sorted(expected.files)
    dtypes = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64, "u8": np.uint8,
              "bool": np.bool_, "count": np.int64}
    for key, spec in tensors.specs.items():
        found = tensors.read(key)
        assert spec == (found.shape, found.dtype) and same(found, expected[key]), key
        assert spec.dtype == dtypes.get(key, expected[key].dtype), key
    assert tensors.extra == ({} if file.startswith("bare") else {"epoch": 1})


def test_released_lightning_checkpoint_with_omegaconf():
    expected = np.load(EXTRAS / "lightning_omegaconf.npz")
    tensors = open_tensors(str(EXTRAS / "lightning_omegaconf.ckpt"))
    assert list(tensors.specs) == list(expected.files)
    assert all(same(tensors.read(key), expected[key]) for key in expected.files)
    extra = json.loads(json.dumps(tensors.extra))
    assert extra["epoch"] == 39 and "state_dict" not in extra
    hyper = extra["hyper_parameters"]
    assert hyper["data"]["text"]["word_num"] == 20
    assert hyper["model"]["text"]["last_n_layers"] == 4
    assert hyper["data"]["image"]["imsize"] == [20, 16, 12]
    assert extra["hparams_type"] == "omegaconf.dictconfig.DictConfig"
    assert extra["optimizer_states"][0]["state"]["0"]["exp_avg"] == "<tensor>"


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_views_of_a_storage(tmp_path, write):
    two = several(text("part"), integer(4), integer(6)) if write is write_legacy else b""
    part = storage(part=two) if two else storage()
    shift = 4 if two else 0
    path = write(tmp_path / "v.pt", dictionary(
        whole=tensor(), part=tensor((3,), (2,), 1, part), rows=tensor((3, 2, 4), (0, 4, 1)),
        turned=tensor((4, 3), (1, 4)), one=tensor((), (), 7), none=tensor((0, 5), (5, 1)),
        parameter=call("torch._utils._rebuild_parameter", tensor((2,)), b"\x88", b"N"),
        subclass=call("torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_tensor"),
                      name("lib.Mine"), several(storage(), integer(3), several(integer(2)),
                                                several(integer(1))), b"N")))
    found = read_all(path)
    assert same(found["part"], NEEDLE[[1 + shift, 3 + shift, 5 + shift]])
    assert same(found["rows"], np.broadcast_to(NEEDLE[:8].reshape(2, 4), (3, 2, 4)))
    assert same(found["turned"], NEEDLE.reshape(3, 4).T) and same(found["one"], NEEDLE[7])
    assert found["none"].shape == (0, 5) and same(found["parameter"], NEEDLE[:2])
    assert same(found["subclass"], NEEDLE[3:5])
    found["whole"][:] = -1
    assert same(open_tensors(path).read("whole"), NEEDLE)


def test_big_endian_and_untyped_storages(tmp_path):
    untyped = call("torch._utils._rebuild_tensor_v3",
                   storage(kind="torch.storage.UntypedStorage", count=48), integer(2),
                   several(integer(3)), several(integer(1)), b"\x89", b"N", name("torch.bfloat16"))
    path = write_zip(tmp_path / "b.pt", dictionary(a=tensor(), b=untyped),
                     {"0": NEEDLE.astype(">f4").tobytes()}, byteorder=b"big")
    found = read_all(path)
    assert same(found["a"], NEEDLE)
    swapped = NEEDLE.astype(">f4").view(np.uint16)[2:5].byteswap().view(ml_dtypes.bfloat16)
    assert np.array_equal(found["b"], swapped)
    assert "damaged" in refusal(write_zip(tmp_path / "c.pt", dictionary(a=tensor()),
                                          byteorder=b"middle"))


def test_where_the_state_dict_lies(tmp_path):
    inner = dictionary(a=tensor())
    for key in ("state_dict", "model"):
        tensors = open_tensors(write_zip(tmp_path / "n.pt", dictionary(
            **{key: inner, "epoch": integer(3), "loose": tensor()})))
        assert list(tensors.specs) == ["a"] and tensors.extra == {"epoch": 3, "loose": "<tensor>"}
    tensors = open_tensors(write_zip(tmp_path / "n.pt", dictionary(
        a=tensor(), b=tensor(), _metadata=dictionary(version=integer(1)))))
    assert list(tensors.specs) == ["a", "b"] and tensors.extra == {"_metadata": {"version": 1}}
    assert "teacher" in refusal(write_zip(tmp_path / "o.pt", dictionary(teacher=inner)))
    assert "model.state_dict()" in refusal(write_zip(tmp_path / "p.pt", tensor()))
    assert "lib.Net" in refusal(write_zip(tmp_path / "q.pt", call("lib.Net")))
    assert "no text ('7')" in refusal(write_zip(tmp_path / "r.pt",
                                                b"}(" + integer(7) + tensor() + b"u"))
    for odd, shown in ((call("torch._utils._rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
                       (tensor(where=storage(kind="torch.QInt8Storage")), "torch.QInt8Storage")):
        assert shown in refusal(write_zip(tmp_path / "s.pt", dictionary(a=odd, b=tensor())))
        # Beside the state dict it is in nobody's way.
        beside = write_zip(tmp_path / "t.pt", dictionary(model=inner, odd=odd))
        assert open_tensors(beside).extra == {"odd": "<tensor>"}


def test_objects_beside_the_tensors_become_plain_data(tmp_path):
    state = dictionary(lr=integer(3), deep=b"](" + integer(1) + text("x") + b"e")
    dtype = call("numpy.dtype", text("f8"), b"\x89", b"\x88") + several(
        integer(3), text("<"), b"NNN" + integer(-1) + integer(-1) + integer(0)) + b"b"
    body = dictionary(
        model=dictionary(a=tensor()),
        args=name("argparse.Namespace") + b")\x81" + state + b"b",
        thing=name("lib.Thing") + b")\x81" + state + b"b",
        like_dict=name("lib.AttributeDict") + b")\x81(" + text("k") + integer(5) + b"u",
        path=call("pathlib.PosixPath", text("/"), text("a"), text("b")),
        device=call("torch.device", text("cuda"), integer(1)),
        number=call("numpy.core.multiarray.scalar", dtype, call(
            "_codecs.encode", text("\0\0\0\0\0\0\xf4?"), text("latin1"))),
        kind=name("__builtin__.list"), function=name("os.system"),
        enum=call("lib.Color", text("red")),
        inner=call("__builtin__.getattr", name("lib.Outer"), text("Inner")),
        pairs=call("collections.OrderedDict", b"]" + several(text("p"), integer(1)) + b"a"),
        keys=b"}(" + several(integer(1), integer(2)) + integer(3) + b"N" + integer(4) + b"u")
    extra = open_tensors(write_zip(tmp_path / "e.pt", body)).extra
    plain = {"lr": 3, "deep": [1, "x"]}
    assert extra == {
        "args": plain, "thing": {"__class__": "lib.Thing", **plain},
        "like_dict": {"__class__": "lib.AttributeDict", "k": 5}, "path": "/a/b",
        "device": "cuda:1", "number": 1.25, "kind": "builtins.list", "function": "os.system",
        "enum": {"__class__": "lib.Color", "args": ["red"]}, "inner": "lib.Outer.Inner",
        "pairs": {"p": 1}, "keys": {"[1, 2]": 3, "None": 4}}


class Evil:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil_bodies(marker):
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    yield "system", pickle.dumps(Evil(os.system, command), 2)
    yield "builtins.eval", pickle.dumps(Evil(eval, code), 2)
    yield "builtins.exec", pickle.dumps(Evil(exec, code), 4)
    yield "builtins.open", call("builtins.open", text(str(marker)), text("w")) + b"."
    # Protocol 2 writes the names of Python 2, here commands.Popen.
    yield "subprocess.Popen", pickle.dumps(Evil(subprocess.Popen, ["touch", str(marker)]), 2)
    yield "subprocess.check_output", pickle.dumps({"k": Evil(subprocess.check_output, command)}, 3)
    yield "importlib.import_module", pickle.dumps(Evil(importlib.import_module, "antigravity"), 0)
    yield "runpy", pickle.dumps(Evil(runpy.run_path, str(marker)), 1)
    yield "builtins.getattr", call("builtins.getattr", name("os.path"), text("join")) + b"."
    yield "builtins.getattr", call("builtins.getattr", name("subprocess.Popen"), text("X")) + b"."
    yield "torch.hub.load", call("torch.hub.load", text("a/b"), text("c")) + b"."
    yield "torch.serialization.os.system", (
        b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
        + text(command) + b"\x85R.")
    yield "pathlib.Path.unlink", (b"\x80\x04" + text("pathlib") + text("Path.unlink") + b"\x93"
                                  + call("pathlib.PosixPath", text("x")) + b"\x85R.")
    yield "pathlib.os.DirEntry", (b"\x80\x04" + text("pathlib") + text("os.DirEntry")
                                  + b"\x93)R.")
    yield "os.system", b"(" + text(command) + b"ios\nsystem\n."
    yield "os.system", b"(" + name("os.system") + text(command) + b"o."
    yield "webbrowser.Chrome", name("webbrowser.Chrome") + b")\x81."
    yield "subprocess.Popen", call("copy_reg._reconstructor", name("subprocess.Popen"),
                                   name("__builtin__.object"), b"N") + b"."
    yield "a call of functools.partial", call("functools.partial", name("os.system")) + several(
        text(command)) + b"R."
    yield "a computed function", text("f") + b")R."
    yield "_codecs.encode", call("_codecs.encode", text("x"), text("rot13")) + b"."
    yield "builtins.type", call("builtins.type", text("T"), b")", b"}") + b"."
    yield "typing.get_type_hints", call("typing.get_type_hints", text("x")) + b"."
    yield "torch.storage._load_from_bytes", call("torch.storage._load_from_bytes", text("")) + b"."
    yield ascii("a\nb.c\x1b[2J"), (b"\x80\x04" + text("a\nb") + text("c\x1b[2J") + b"\x93)R.")


def test_what_would_run_code_is_refused_by_name(tmp_path):
    marker = tmp_path / "ran"
    count = 0
    for shown, body in evil_bodies(marker):
        modern = tmp_path / "evil.ckpt"
        # The call stands in the middle of an ordinary checkpoint.
        around = dictionary(model=dictionary(a=tensor()), x=body.removesuffix(b"."))
        for path in (write_zip(modern, around), write_legacy(tmp_path / "evil.pth", around)):
            message = refusal(path)
            assert shown in message and "would run" in message and "safetensors" in message
        # PyTorch would also run a pickle that is no checkpoint at all.
        bare = tmp_path / "evil.bin"
        bare.write_bytes(body)
        assert shown in refusal(bare)
        count += 1
    assert count > 20 and not marker.exists()


def test_a_whole_module_is_refused(tmp_path):
    module = several(text("module"), name("lib.Net"), text("net.py"), text("import os")) + b"Q"
    assert "whole module" in refusal(write_legacy(tmp_path / "m.pt", dictionary(a=module), {}))


def test_a_module_is_in_the_way_only_inside_the_state_dict(tmp_path):
    def module(cls):
        return several(text("module"), name(cls), text("net.py"), text("import os")) + b"Q"

    net = module("lib.Net") + b")\x81" + dictionary(width=integer(3), weight=tensor()) + b"b"
    inner = dictionary(a=tensor(), b=tensor())
    path = write_legacy(tmp_path / "m.pt", dictionary(net=net, kind=module("lib.Net"), model=inner))
    tensors = open_tensors(path)
    assert list(tensors.specs) == ["a", "b"] and same(tensors.read("a"), NEEDLE)
    assert tensors.extra == {"kind": "lib.Net", "net": {
        "__class__": "lib.Net", "width": 3, "weight": "<tensor>"}}
    # PyTorch writes the source only beside the first module of a class.
    again = name("lib.Net") + b")\x81"
    for body in (dictionary(model=dictionary(a=tensor(), net=net)),
                 dictionary(a=tensor(), b=tensor(), net=net), dictionary(model=net),
                 dictionary(net=net, model=dictionary(a=tensor(), net=again))):
        assert "whole module" in refusal(write_legacy(tmp_path / "n.pt", body))
    # What is called a module may still not run.
    evil = module("os.system") + several(text("ls")) + b"R"
    assert "os.system" in refusal(write_legacy(tmp_path / "o.pt", dictionary(model=inner, x=evil)))
    odd = several(text("module"), text("lib.Net")) + b"Q"
    assert "damaged" in refusal(write_legacy(tmp_path / "p.pt", dictionary(model=inner, x=odd)))


@pytest.mark.parametrize("changed", [
    tensor((13,)), tensor((12,), (2,)), tensor((3,), (1,), 10), tensor((3,), (1,), -1),
    tensor((3,), (-1,), 5), tensor((-3,), (1,)), tensor((2, 2), (1,)), tensor((2**62,), (0,)),
    tensor((2**40, 2**40), (0, 0)), tensor((0, 2**60), (1, 1)), tensor((1,), (1,), 2**70),
    tensor((1,) * 40, (0,) * 40), tensor((2,), (2**62,)), tensor(where=storage(count=11)),
    tensor(where=storage(count=-12)), tensor(where=storage(key="../0")),
    tensor(where=storage(kind="torch.DoubleStorage")), tensor(where=text("storage")),
    tensor(where=storage(tag="other"))])
def test_places_outside_the_file_are_refused(tmp_path, changed):
    body = dictionary(good=tensor(), bad=changed)
    for path in (write_zip(tmp_path / "h.pt", body), write_legacy(tmp_path / "h.pth", body)):
        refusal(path)


def test_storages_of_another_size_and_changed_bytes_are_refused(tmp_path):
    body = dictionary(a=tensor())
    for data in (NEEDLE.tobytes()[:-1], NEEDLE.tobytes() + b"\0" * 4, b""):
        assert "not in the file" in refusal(write_zip(tmp_path / "w.pt", body, {"0": data}))
    assert "not in the file" in refusal(write_zip(tmp_path / "w.pt", body, {}))
    path = write_zip(tmp_path / "w.pt", body)
    content = path.read_bytes()
    path.write_bytes(content.replace(NEEDLE.tobytes(), NEEDLE[::-1].tobytes()))
    assert "damaged" in refusal(path)
    path = write_legacy(tmp_path / "w.pth", body, {"0": NEEDLE[:-1]})
    assert "damaged" in refusal(path)
    path = write_legacy(tmp_path / "w.pth", body, {"1": NEEDLE})
    assert "damaged" in refusal(path)


def test_nothing_may_be_compressed(tmp_path):
    bomb = dictionary(a=tensor()) + text("0" * (1 << 20)) + b"0"
    path = write_zip(tmp_path / "z.pt", bomb, compressed={"data.pkl"})
    assert path.stat().st_size < 1 << 16 and "compressed" in refusal(path)
    path = write_zip(tmp_path / "z.pt", dictionary(a=tensor()), compressed={"data/0"})
    assert "compressed" in refusal(path)


def test_large_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    many = dictionary(a=tensor()) + b"N0" * 1000
    assert "more Python objects" in refusal(write_zip(tmp_path / "l.pt", many))
    # One object made over and over from a long list of pairs.
    pairs = b"](" + several(text("k"), b"N") * 100 + b"eq\1"
    often = pairs + (name("collections.OrderedDict") + b"h\1\x85R0") * 20
    assert "more Python objects" in refusal(write_zip(tmp_path / "l.pt", often))
    calls = dictionary(a=tensor()) + (name("lib.A") + b")\x810") * 150
    assert "more Python objects" in refusal(write_zip(tmp_path / "l.pt", calls))
    names = b"".join(text(str(i)) + b"h\1" for i in range(60))
    entries = tensor() + b"q\x010}(" + names + b"u"
    assert "more Python objects" in refusal(write_zip(tmp_path / "l.pt", entries))
    for module in (pickle_machine, torch_file):
        monkeypatch.setattr(module, "MAX_PICKLE", 1 << 10)
    wide = dictionary(a=tensor()) + text("x" * 2000) + b"0"
    for path in (write_zip(tmp_path / "l.pt", wide), write_legacy(tmp_path / "l.pth", wide)):
        assert "more Python objects" in refusal(path)


def test_deep_and_circular_structures(tmp_path):
    deep = 100_000
    values = {
        "tuples": b")" + b"\x85" * deep,
        "lists": b"]" * deep + b"a" * (deep - 1),
        "key": b"}" + b")" + b"\x85" * deep + b"Ns",
        "objects": name("lib.A") + b")\x81" + (b"q\x010" + name("lib.A") + b")\x81h\1b") * 1000,
        "loop": b"]q\1(h\1h\1h\1e",
        "dict_loop": b"}q\1" + text("me") + b"h\1s",
        "long": b"](" + b"}" + text("x" * 9_000_000) + b"\x85q\1" + b"Ns"
                + b"}h\1Ns" * 100 + b"e",
        # 2^60 leaves of 60 lists.
        "laughs": b"]q\1" + b"0](h\1h\1eq\1" * 60}
    for key, value in values.items():
        body = dictionary(model=dictionary(a=tensor()), value=value,
                          after=b"]" + integer(1) + b"a")
        extra = open_tensors(write_zip(tmp_path / f"{key}.pt", body)).extra
        # What uses up all there is to keep leaves nothing for what follows.
        assert extra["after"] == ("…" if key in ("laughs", "long") else [1]), key
        assert "…" in json.dumps(extra["value"], ensure_ascii=False), key


def test_every_truncated_length_is_refused(tmp_path):
    body = dictionary(model=dictionary(a=tensor()), epoch=integer(3))
    save_file({"a": NEEDLE}, str(tmp_path / "whole.safetensors"))
    for path in (write_zip(tmp_path / "whole.pt", body), write_legacy(tmp_path / "whole.pth", body),
                 tmp_path / "whole.safetensors"):
        content = path.read_bytes()
        assert same(read_all(path)["a"], NEEDLE)
        cut = tmp_path / "cut"
        for length in range(len(content)):
            cut.write_bytes(content[:length])
            refusal(cut)


def test_flipped_bytes_read_or_are_refused(tmp_path):
    save_file({"a": NEEDLE, "b": NEEDLE.reshape(3, 4)}, str(tmp_path / "c.safetensors"))
    numbers = random.Random(0)
    refused = 0
    sources = [EXTRAS / "formats_zip.ckpt", EXTRAS / "formats_legacy.ckpt",
               tmp_path / "c.safetensors"]
    for source in sources:
        content = source.read_bytes()
        for _ in range(250):
            changed = bytearray(content)
            for _ in range(numbers.choice((1, 1, 2, 8))):
                changed[numbers.randrange(len(changed))] = numbers.randrange(256)
            path = tmp_path / "flipped"
            path.write_bytes(changed)
            refused += read_all(path) is None
    assert 100 < refused < 700


@pytest.mark.parametrize(("content", "mend"), [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    (b"hello", "damaged"), (b"\x80\x02K\1.", "damaged"), (b"{\"a\": 1}", "no index"),
    (b"[" * 100000, "damaged"), (b"{\"a\":" + b"[" * 100000, "no index"),
    (b"\0" * 257 + b"ustar\0", "newer PyTorch")])
def test_what_is_no_weights_file(tmp_path, content, mend):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert mend in refusal(path)


def test_folders_missing_files_and_other_zips(tmp_path):
    assert "give a file in it" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "no.ckpt")
    np.savez(tmp_path / "a.npz", a=1)
    assert "no PyTorch checkpoint" in refusal(tmp_path / "a.npz")
    script = write_zip(tmp_path / "s.pt", dictionary(a=tensor()), **{"constants.pkl": b")."})
    assert "TorchScript" in refusal(script)


ARRAYS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
          "a": np.arange(4).astype(ml_dtypes.bfloat16), "zero": np.array(2, np.float16),
          "none": np.empty((0, 3), np.int64), "flag": np.array([True, False])}


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "weights.bin"  # The name says nothing.
    save_file(ARRAYS, str(path), metadata={"format": "pt"})
    tensors = open_tensors(path)
    assert tensors.extra == {"format": "pt"} and set(tensors.specs) == set(ARRAYS)
    for key, array in ARRAYS.items():
        assert tensors.specs[key] == (array.shape, array.dtype)
        assert same(tensors.read(key), array) and tensors.read(key).dtype == array.dtype


def write_header(path, header, data=b"\0" * 16):
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


@pytest.mark.parametrize(("dtype", "shape", "offsets", "mend"), [
    ("F32", [4], [0, 12], "damaged"), ("F32", [5], [0, 20], "damaged"),
    ("F32", [-4], [0, 16], "damaged"), ("F99", [4], [0, 16], "damaged"),
    ("F8_E4M3", [16], [0, 16], "F8_E4M3"), ("F32", [2**62, 2**62], [0, 16], "damaged"),
    ("F32", [1] * 40 + [4], [0, 16], "damaged"), ("F32", "four", [0, 16], "damaged")])
def test_safetensors_headers_that_lie(tmp_path, dtype, shape, offsets, mend):
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    assert mend in refusal(write_header(tmp_path / "h.safetensors", header))


def test_an_empty_tensor_of_endless_shape(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}}
    assert "shape" in refusal(write_header(tmp_path / "h.safetensors", header, b""))


def write_index(folder, places):
    path = folder / "index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_shards_of_both_kinds(tmp_path):
    save_file({"a": NEEDLE, "unlisted": NEEDLE}, str(tmp_path / "m-1.safetensors"))
    write_zip(tmp_path / "m-2.bin", dictionary(b=tensor((4, 3), (1, 4))))
    tensors = open_tensors(write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.bin"}))
    assert tensors.path.name == "index.json" and list(tensors.specs) == ["a", "b"]
    assert same(tensors.read("a"), NEEDLE) and same(tensors.read("b"), NEEDLE.reshape(3, 4).T)


def test_shards_that_are_elsewhere_missing_or_incomplete(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": NEEDLE}, str(folder / "m.safetensors"))
    save_file({"a": NEEDLE}, str(tmp_path / "m.safetensors"))
    (folder / "sub").mkdir()
    for shard in ("../m.safetensors", str(tmp_path / "m.safetensors"), "..", "", "a\0b",
                  "sub/../m.safetensors", "..\\m.safetensors"):
        assert "no plain file name" in refusal(write_index(folder, {"a": shard}))
    with pytest.raises(UserError, match="other.safetensors does not exist"):
        open_tensors(write_index(folder, {"a": "other.safetensors"}))
    with pytest.raises(UserError, match="lacks 'b', which index.json says"):
        open_tensors(write_index(folder, {"a": "m.safetensors", "b": "m.safetensors"}))
    # An index of itself would never end.
    with pytest.raises(UserError, match="damaged"):
        open_tensors(write_index(folder, {"a": "index.json"}))
    for wrong in ({}, {"a": 1}, [], "m.safetensors"):
        assert "no index" in refusal(write_index(folder, wrong))


def test_reading_needs_the_memory_of_one_tensor(tmp_path):
    block = np.ones(2 << 20, np.float32)
    save_file({f"t{i}": block for i in range(12)}, str(tmp_path / "m.safetensors"))
    write_zip(tmp_path / "m.pt", dictionary(**{
        f"t{i}": tensor((block.size,), where=storage(str(i), count=block.size))
        for i in range(12)}), {str(i): block.tobytes() for i in range(12)})
    code = """
import sys, resource
from brgsa_jax.weights.tensors import open_tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.argv[1:]:
    tensors = open_tensors(file)
    assert len(tensors.specs) == 12
    for key in tensors.specs:
        assert tensors.read(key).sum() == 2 << 20
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors"),
                          str(tmp_path / "m.pt")], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40, f"{run.stdout} MiB for 96 MiB in tensors of 8"
