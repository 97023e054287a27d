"""Eight simulated CPU devices for the whole suite, set before anything imports JAX."""

import gc
import os

DEVICES = 8
FLAGS = (f"--xla_force_host_platform_device_count={DEVICES}"
         # Tests compile far more than they compute.
         " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
         " --xla_cpu_parallel_codegen_split_count=1")
# Workers of pytest-xdist inherit what the process that started them has set.
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs for several simulated devices that come from the compilation cache may start their
# collectives in another order on each device and then wait for one another for ever.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
os.environ.setdefault("TQDM_DISABLE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_sessionstart(session):
    # Tracing makes many small objects that live on: looking for garbage at every 700 of them
    # takes a quarter of the time of tracing.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    count = jax.device_count()
    assert count == DEVICES, f"the suite needs {DEVICES} simulated devices, JAX shows {count}"


@pytest.fixture(scope="session")
def devices():
    return jax.devices()


@pytest.fixture
def one_device(monkeypatch):
    """Every mesh is of one device: programs for it compile fastest."""
    from brgsa_jax import mesh

    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda *_: make(1, 1, jax.devices()[:1]))
