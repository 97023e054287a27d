"""Eight simulated CPU devices for the whole suite, set before anything imports JAX."""

import os
import tempfile
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR",
                      str(Path(tempfile.gettempdir()) / "brgsa_jax_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TQDM_DISABLE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_sessionstart(session):
    count = jax.device_count()
    assert count == DEVICES, f"the suite needs {DEVICES} simulated devices, JAX shows {count}"


@pytest.fixture(scope="session")
def devices():
    return jax.devices()
