"""The start and the end of a run: one process, or several on machines of any kind.

Where this process stands among the others is read from the environment: JAX_* variables, Slurm,
or a TPU slice. The processes meet (`brgsa_jax.peers`) before JAX connects them, so that whatever
does not fit ends with a sentence within BRGSA_START_TIMEOUT seconds.
"""

import atexit
import contextlib
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from glob import glob
from importlib.util import find_spec
from typing import NamedTuple

import jax

from brgsa_jax import peers
from brgsa_jax.config import UserError
from brgsa_jax.peers import Place
from brgsa_jax.stopping import StopPoint, on_sigterm, stopping_on_sigterm
from brgsa_jax.version import __version__

START_TIMEOUT = 300.0
# Seconds a failed process may take for its last words before it is ended.
LAST_WORDS = 10.0
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TPU_PORT = 8482


class Found(NamedTuple):
    """What the environment says of this process.

    Attributes:
        place: among the processes of the run.
        devices: numbers of those of this machine's GPUs that are its own; None is all it sees.
    """

    place: Place
    devices: tuple[int, ...] | None = None


@contextlib.contextmanager
def initialize_runtime() -> Iterator[StopPoint]:
    """Joins the run that the environment announces; one process where it announces none.

    The context is the work of this process: a failure inside ends the others with its sentence,
    success waits for theirs. Must be entered before anything else touches a JAX device.

    Explicit: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. Slurm: `srun` with one
    task for each GPU or one for each node. TPU slices: their metadata. BRGSA_START_TIMEOUT:
    seconds within which all must have met, 300 by default.

    Yields:
        Where the work is to stop after a SIGTERM to any of the processes. SIGTERM before all of
        them have called it once ends them at once.

    Raises:
        UserError: the variables are incomplete or wrong, or the processes do not meet in time.
    """
    found = find_place(os.environ)
    if found is None or found.place.count == 1:
        with stopping_on_sigterm() as stop:
            yield stop
        return
    timeout = _start_timeout(os.environ)
    others = peers.meet(found.place, timeout=timeout,
                        versions=f"brgsa_jax {__version__} with jax {jax.__version__}")
    with on_sigterm(others.ask_to_stop):
        try:
            _connect(found, timeout)
            yield others.stop
            others.leave()
        except BaseException as error:
            _fail(others, error)
            raise


def _connect(found: Found, timeout: float) -> None:
    """Has JAX bring the processes together."""
    place = found.place
    # It would take SIGTERM for itself, and knows steps only: not validations, not compilations.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own detection would give every Slurm task one GPU, however many it has.
    jax.distributed.initialize(
        place.address, place.count, place.index, local_device_ids=found.devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=place.address if place.bind else None,
        initialization_timeout=int(timeout) + 1)
    _check_devices(place)


def _fail(others: peers.Peers, error: BaseException) -> None:
    """Ends the other processes, and this one soon after, without waiting for them."""
    sentence, code = str(error), 1
    if isinstance(error, KeyboardInterrupt):
        sentence, code = "stopped by Ctrl-C", 128 + signal.SIGINT
    elif not isinstance(error, UserError):
        # A collective fails when another process dies; that is told as the reason, and ends this
        # process, in a moment.
        time.sleep(peers.PROMPT)
        sentence = f"{type(error).__name__}: {sentence.partition(os.linesep)[0]}"
    others.fail(sentence)
    # JAX would wait for the others, and abort.
    atexit.register(os._exit, code)
    # Threads that write a checkpoint may wait for processes that are gone.
    timer = threading.Timer(LAST_WORDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _check_devices(place: Place) -> None:
    """Starts the devices, which every process must do alike."""
    try:
        seen = jax.process_count()
    except RuntimeError as error:
        raise UserError("the devices of the processes could not be brought together "
                        f"({str(error).partition(os.linesep)[0][:300]}); every machine needs the "
                        "same kind of devices and a working driver") from error
    if seen != place.count:
        raise UserError(f"the {jax.default_backend()} devices of {seen} of {place.count} processes "
                        "are there; every machine needs the same kind of devices, and none may be "
                        "given to two processes")


def find_place(environ: Mapping[str, str]) -> Found | None:
    """Reads where this process stands; None is a run of one process.

    Raises:
        UserError: variables are missing or make no sense.
    """
    return _explicit(environ) or _slurm(environ) or (
        _tpu_slice(environ, _metadata) if _has_tpu(environ) else None)


def _explicit(environ: Mapping[str, str]) -> Found | None:
    given = [name for name in EXPLICIT if environ.get(name)]
    if not given:
        return None
    missing = [name for name in EXPLICIT if name not in given]
    if missing:
        raise UserError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set but "
                        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; set "
                        "all three, or none for one process")
    address = environ[EXPLICIT[0]]
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address)
    if not parts or not 0 < int(parts[3]) < 2**16:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} is no HOST:PORT; give the machine "
                        "of process 0 and a port that is free there, as in node01:1234")
    return Found(_place(parts[1] or parts[2], int(parts[3]), _whole(environ, EXPLICIT[1]),
                        _whole(environ, EXPLICIT[2]), EXPLICIT[1:]))


def _place(host: str, port: int, count: int, index: int, names: tuple[str, str]) -> Place:
    if count < 1 or not 0 <= index < count:
        raise UserError(f"{names[1]}={index} of {names[0]}={count} is no number of a process; "
                        f"number them from 0 to {max(count, 1) - 1}")
    return Place(host, port, count, index)


def _slurm(environ: Mapping[str, str]) -> Found | None:
    """The place of a task of `srun`; a batch script itself is no task."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not environ.get(names[0]) or not environ.get("SLURM_STEP_NODELIST"):
        return None
    # The first of "gpu[03-05,9]-ib,login1" is gpu03-ib.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environ["SLURM_STEP_NODELIST"])
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""
    # Steps of one job may run side by side on a machine.
    own = 61 * _whole(environ, "SLURM_STEP_ID", 0) + _whole(environ, "SLURM_JOB_ID", 0)
    port = _whole(environ, "JAX_COORDINATOR_PORT", 61440 + own % 4096)
    place = _place(host, port, _whole(environ, names[0]), _whole(environ, names[1]), names)
    return Found(place, _share_of_gpus(environ))


def _share_of_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's GPUs among those that all tasks of its machine see; None is all."""
    tasks = [int(count) for count, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        for _ in range(int(times or 1))]
    here = tasks[min(_whole(environ, "SLURM_NODEID", 0), len(tasks) - 1)]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (len(glob("/dev/nvidia[0-9]*")) if visible is None
            else len([name for name in visible.split(",") if name]))
    # With fewer than the machine's share of the job, Slurm has bound its own to each task.
    if here == 1 or gpus <= 1 or gpus < _whole(environ, "SLURM_GPUS_ON_NODE", gpus):
        return None
    if gpus % here:
        raise UserError(f"{here} tasks of this machine cannot share {gpus} GPUs alike; start one "
                        "task for each GPU or one for each node")
    each, local = gpus // here, _whole(environ, "SLURM_LOCALID")
    return tuple(range(local * each, (local + 1) * each))


def _has_tpu(environ: Mapping[str, str]) -> bool:
    wanted = environ.get("JAX_PLATFORMS") or "tpu"
    return ("tpu" in wanted.split(",") and find_spec("libtpu") is not None
            and bool(glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")))


def _tpu_slice(environ: Mapping[str, str], metadata: Callable[[str], str | None]) -> Found | None:
    """The place of a host of a TPU slice, or of several slices.

    Kubernetes sets variables; a TPU VM asks the metadata server.
    """
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    worker, several = environ.get("TPU_WORKER_ID"), environ
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environ:
        # Newer machines list names, older ones name:id:address.
        hosts, worker = metadata("worker-network-endpoints"), metadata("agent-worker-number")
        hosts = hosts and ",".join(entry.split(":")[-1] for entry in hosts.split(","))
        several = {**dict(re.findall(r"(?m)^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)'?",
                                     metadata("tpu-env") or "")), **environ}
    if not hosts:
        return None
    names = [entry.split(":")[0] for entry in hosts.split(",")]
    slices = _whole(several, "MEGASCALE_NUM_SLICES", 1)
    first = several.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]
    index = (_whole({"TPU_WORKER_ID": worker or "0"}, "TPU_WORKER_ID")
             + len(names) * _whole(several, "MEGASCALE_SLICE_ID", 0))
    return Found(_place(first.split(":")[0], _whole(environ, "JAX_COORDINATOR_PORT", TPU_PORT),
                        len(names) * slices, index, ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")))


def _metadata(key: str) -> str | None:
    """An attribute of this virtual machine; None where there is no such thing."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"})
    # No proxy stands between a machine and its own metadata.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode()
    except (OSError, ValueError):
        return None


def _whole(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not re.fullmatch(r"-?\d{1,9}", text.strip()):
        raise UserError(f"{name}={text!r} is no whole number; set it to one")
    return int(text)


def _start_timeout(environ: Mapping[str, str]) -> float:
    text = environ.get("BRGSA_START_TIMEOUT") or str(START_TIMEOUT)
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 86400:
            return float(text)
    raise UserError(f"BRGSA_START_TIMEOUT={text!r} is no number of seconds up to a day; give one, "
                    "such as 300")
