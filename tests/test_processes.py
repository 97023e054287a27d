"""Two real processes with gloo collectives train as one process with two devices."""

import os
import socket
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file
from test_trainer import CHANGES, rows

from brgsa_jax import config as configs
from brgsa_jax.data.builders import build_phantom


def test_two_processes_train_as_one(tmp_path):
    data = tmp_path / "data"
    build_phantom(data, seed=1, train=24, shape=(32, 32, 16), workers=1, progress=False)
    file = tmp_path / "config.json"
    file.write_text(configs.to_json(configs.get_config("phantom", **{
        **CHANGES, "data.path": str(data), "train.steps": 4, "train.checkpoint_every": 2})))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count={}")

    def start(workdir, devices, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "brgsa_jax.cli", "train", "--config", str(file), "--workdir",
             str(tmp_path / workdir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "XLA_FLAGS": flags.format(devices), **environment})

    pair = [start("two", 1, JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES="2",
                  JAX_PROCESS_ID=str(index)) for index in range(2)]
    for process in (*pair, start("one", 2)):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    two, one = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert len(one) == 4
    for a, b in zip(two, one, strict=True):
        for name, value in b.items():
            np.testing.assert_allclose(a[name], value, rtol=1e-5, err_msg=name)
    models = [load_file(tmp_path / w / "model/model.safetensors") for w in ("two", "one")]
    for name, value in models[1].items():
        np.testing.assert_allclose(models[0][name], value, atol=1e-5, err_msg=name)
