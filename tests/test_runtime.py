"""How processes find, lose and leave one another: threads for the rules, processes for the end."""

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from brgsa_jax import peers, runtime, stopping
from brgsa_jax.config import UserError
from brgsa_jax.peers import Place

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def meeting(*places, timeout=20.0, versions=None):
    """Lets every (count, index) meet in a thread; returns what each got, or its error."""
    port = free_port()

    def come(number, count, index):
        try:
            return peers.meet(Place("localhost", port, count, index), timeout=timeout,
                              versions=versions[number] if versions else "one")
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(come, range(len(places)), *zip(*places, strict=True)))


@pytest.fixture
def ended(monkeypatch):
    """Sentences with which processes would have ended."""
    sentences = []
    monkeypatch.setattr(peers, "end", lambda sentence, code: sentences.append(
        sentence if code == 1 else f"{code}: {sentence}"))
    return sentences


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_meet_and_leave_together(ended):
    three = meeting(*((3, index) for index in range(3)))
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(three[index].leave) for index in (0, 1)]
        time.sleep(0.3)
        assert not any(future.done() for future in early)
        three[2].leave()
        for future in early:
            future.result(timeout=20)
    assert not ended and not [t for t in threading.enumerate() if t.name == "peers"]


@pytest.mark.parametrize(("places", "everyone", "sentences"), [
    ([(4, 0), (4, 1), (4, 2)], True, ["only 3 of 4 processes came", "without number 3"]),
    ([(3, 0), (3, 1), (3, 1)], True, ["process 1 on", "has the number of another process"]),
    ([(3, 0), (4, 1), (3, 2)], False, ["was started for 4 processes", "for 3; give all"]),
    ([(2, 1)], True, ["process 0 could not be reached at localhost:", "within 2 s"]),
])
def test_what_does_not_fit_is_told_to_all_within_the_limit(places, everyone, sentences, ended):
    start = time.monotonic()
    told = meeting(*places, timeout=2.0)
    assert time.monotonic() - start < 2 + peers.PROMPT
    assert all(isinstance(sentence, str) for sentence in told), told
    for part in sentences:
        assert (all if everyone else any)(part in sentence for sentence in told), told
    assert not ended


def test_other_versions_are_refused_by_name(ended):
    told = meeting((2, 0), (2, 1), versions=["jax 1", "jax 2"])
    assert all("has jax 2" in one and "has jax 1" in one and "install" in one for one in told)


def test_a_taken_port_is_told():
    with socket.create_server(("localhost", 0)) as other, \
            pytest.raises(UserError, match=r"cannot listen on port \d+ .*choose another port"):
        peers.meet(Place("localhost", other.getsockname()[1], 2, 0), versions="", timeout=5)


def test_a_name_that_is_no_machine_is_told():
    with pytest.raises(UserError, match=r"could not be reached at no.such.machine.invalid:1"):
        peers.meet(Place("no.such.machine.invalid", 1, 2, 1), versions="", timeout=1)


def test_another_program_at_the_address_is_told():
    with socket.create_server(("localhost", 0)) as other:
        def answer():
            link = other.accept()[0]
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            link.close()

        threading.Thread(target=answer).start()
        with pytest.raises(UserError, match="another program's"):
            peers.meet(Place("localhost", other.getsockname()[1], 2, 1), versions="", timeout=5)


def test_strangers_disturb_no_meeting(ended):
    port = free_port()
    place = Place("localhost", port, 2, 0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(peers.meet, place, versions="", timeout=20)
        wait_for(lambda: _connects(port))
        strangers = [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"index": "x"}\n',
                     b"\xff\xfe\x00\n", b"x" * 100_000 + b"\n", b"[" * 60_000 + b"\n",
                     b'{"index": 1e999, "count": 2}\n',
                     b'{"index": true, "count": 2, "host": "a", "versions": ""}\n']
        links = []
        for words in strangers:
            links.append(socket.create_connection(("localhost", port)))
            with contextlib.suppress(OSError):
                links[-1].sendall(words)
        second = pool.submit(peers.meet, place._replace(index=1), versions="", timeout=20)
        both = [first.result(timeout=20), second.result(timeout=20)]
        for link in links:
            link.close()
        list(pool.map(peers.Peers.leave, both))
    assert not ended


def _connects(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port)).close()
        return True
    return False


def test_a_process_that_starts_again_before_the_meeting_takes_its_place(ended):
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(peers.meet, Place("localhost", port, 3, 0), versions="", timeout=20)
        wait_for(lambda: _connects(port))
        with socket.create_connection(("localhost", port)) as crashed:
            crashed.sendall(b'{"index": 1, "count": 3, "host": "a", "versions": ""}\n')
            time.sleep(0.2)
        time.sleep(0.2)
        rest = [pool.submit(peers.meet, Place("localhost", port, 3, index), versions="",
                            timeout=20) for index in (1, 2)]
        three = [future.result(timeout=20) for future in (first, *rest)]
        list(pool.map(peers.Peers.leave, three))
    assert not ended


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_connection_ends_everyone_else(lost, ended, monkeypatch):
    three = meeting(*((3, index) for index in range(3)))
    # Process 0 waits so long for the others, which here do not really end.
    monkeypatch.setattr(peers, "PROMPT", 0.2)
    # As the kernel does for a process that was killed.
    victim = three[lost]
    victim.over = True
    for link in victim._links:
        link.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    wait_for(lambda: len(ended) >= 2)
    assert all(f"process {lost} on " in one and "ended without a word" in one for one in ended)
    for one in three:
        one.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_to_the_others(failing, ended, monkeypatch):
    three = meeting(*((3, index) for index in range(3)))
    monkeypatch.setattr(peers, "PROMPT", 0.2)
    three[failing].fail("the disk is \x1b[31mfull")
    wait_for(lambda: len(ended) >= 2)
    assert all(f"process {failing} on " in one and "failed: the disk is" in one for one in ended)
    # Words of another machine carry no terminal codes.
    assert "\x1b" not in "".join(ended)
    for one in three:
        one.close()


EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(("address", "host", "port"), [
    ("node01:1234", "node01", 1234), ("[::1]:65535", "::1", 65535), ("10.0.0.1:1", "10.0.0.1", 1)])
def test_explicit_variables_name_the_place(address, host, port):
    found = runtime.find_place({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": address})
    assert found == runtime.Found(Place(host, port, 4, 3))
    assert found.place.address == address


@pytest.mark.parametrize(("changes", "message"), [
    ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID is not; set all three"),
    ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is not; set all three"),
    ({"JAX_COORDINATOR_ADDRESS": None, "JAX_NUM_PROCESSES": ""}, "JAX_PROCESS_ID is set but"),
    ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 of JAX_NUM_PROCESSES=4 .* from 0 to 3"),
    ({"JAX_PROCESS_ID": "-1"}, "from 0 to 3"),
    ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID='two' is no whole number"),
    ({"JAX_NUM_PROCESSES": "4.0"}, "JAX_NUM_PROCESSES='4.0' is no whole number"),
    ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0"),
    *(({"JAX_COORDINATOR_ADDRESS": address}, "is no HOST:PORT") for address in (
        "node01", "node01:", ":1234", "node01:port", "node01:0", "node01:70000", "a b:1",
        "http://a:1", "::1:1"))])
def test_wrong_variables_are_explained(changes, message):
    environ = {name: text for name, text in {**EXPLICIT, **changes}.items() if text is not None}
    with pytest.raises(UserError, match=message):
        runtime.find_place(environ)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_a_wrong_time_limit_is_explained(text, monkeypatch):
    for name, value in {**EXPLICIT, "BRGSA_START_TIMEOUT": text}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="BRGSA_START_TIMEOUT"), runtime.initialize_runtime():
        pass


STEP = {"SLURM_JOB_ID": "5000", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03,05]",
        "SLURM_PROCID": "6", "SLURM_NODEID": "1", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(("nodes", "first"), [
    ("node1", "node1"), ("node1,other7", "node1"), ("gpu[03-05,9]-ib,login1", "gpu03-ib"),
    ("r[1-2]n[07,09]", "r1n07"), ("a[5]", "a5")])
def test_slurm_tasks_meet_at_their_first_node(nodes, first):
    place = runtime.find_place({**STEP, "SLURM_STEP_NODELIST": nodes}).place
    assert (place.host, place.count, place.index) == (first, 8, 6)
    assert 61440 <= place.port < 2**16
    other = runtime.find_place({**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_ID": "2"})
    assert other.place.port != place.port


@pytest.mark.parametrize(("tasks", "local", "visible", "on_node", "own"), [
    ("4(x2)", 2, "0,1,2,3", "4", (2,)),         # One task for each GPU, all of them visible.
    ("4(x2)", 2, "2", "4", None),               # The same, bound by Slurm.
    ("1(x2)", 0, "0,1,2,3", "4", None),         # One task for each node.
    ("2,2", 1, "0,1,2,3", "4", (2, 3)),
    ("2,2", 1, "2,3", "4", None),
    ("4(x2)", 2, "", "0", None),                # No GPUs.
])
def test_slurm_tasks_share_the_gpus_of_their_node(tasks, local, visible, on_node, own):
    found = runtime.find_place({**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks,
                                "SLURM_LOCALID": str(local), "SLURM_GPUS_ON_NODE": on_node,
                                "CUDA_VISIBLE_DEVICES": visible})
    assert found.devices == own


def test_gpus_that_do_not_divide_over_the_tasks_are_refused():
    with pytest.raises(UserError, match="4 tasks of this machine cannot share 6 GPUs"):
        runtime.find_place({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"})


def test_a_batch_script_and_a_plain_shell_are_one_process():
    assert runtime.find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) \
        is None
    assert runtime.find_place({}) is None


def nothing(key):
    return None


def test_hosts_of_tpu_slices_in_kubernetes_are_numbered_over_the_slices():
    environ = {"TPU_WORKER_HOSTNAMES": "h0.x,h1.x", "TPU_WORKER_ID": "1"}
    found = runtime._tpu_slice(environ, nothing)
    assert found.place == Place("h0.x", runtime.TPU_PORT, 2, 1)
    several = {**environ, "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2",
               "MEGASCALE_COORDINATOR_ADDRESS": "first:8080", "JAX_COORDINATOR_PORT": "77"}
    assert runtime._tpu_slice(several, nothing).place == Place("first", 77, 6, 5)
    assert runtime._tpu_slice({}, nothing) is None
    with pytest.raises(UserError, match="TPU_WORKER_ID='x'"):
        runtime._tpu_slice({**environ, "TPU_WORKER_ID": "x"}, nothing)


@pytest.mark.parametrize(("endpoints", "first"), [
    ("host-0,host-1", "host-0"), ("a:1:10.0.0.7,b:2:10.0.0.8", "10.0.0.7")])
def test_hosts_of_a_tpu_vm_ask_its_metadata(endpoints, first, monkeypatch):
    values = {"worker-network-endpoints": endpoints, "agent-worker-number": "1",
              "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'\n"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.rpartition("/")[2])
            good = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
        found = runtime._tpu_slice({}, runtime._metadata)
        assert runtime._metadata("none") is None
        server.shutdown()
    assert found.place == Place(first, runtime.TPU_PORT, 4, 1)
    assert runtime._tpu_slice({"TPU_SKIP_MDS_QUERY": "1"}, runtime._metadata) is None


def test_devices_that_do_not_come_together_are_explained(monkeypatch):
    place = Place("a", 1, 4, 0)
    with pytest.raises(UserError, match=r"cpu devices of 1 of 4 processes"):
        runtime._check_devices(place)

    def broken():
        raise RuntimeError("DEADLINE_EXCEEDED: topology\nand a long trace")

    monkeypatch.setattr(runtime.jax, "process_count", broken)
    with pytest.raises(UserError, match=r"\(DEADLINE_EXCEEDED: topology\)"):
        runtime._check_devices(place)


def test_all_stop_at_the_first_place_that_none_has_passed(ended):
    three = meeting(*((3, index) for index in range(3)))
    for one, calls in zip(three, (4, 7, 6), strict=True):
        assert not any(one.stop() for _ in range(calls))
    three[2].ask_to_stop()
    # A second notice, to another one, changes nothing.
    three[0].ask_to_stop()
    # Only then is it known how many calls there were when they agreed.
    wait_for(lambda: all(one.stop._last is not None for one in three))
    with ThreadPoolExecutor(3) as pool:
        def count(one, calls):
            while not one.stop():
                calls += 1
            return calls + 1

        assert list(pool.map(count, three, (4, 7, 6))) == [8, 8, 8]
        list(pool.map(peers.Peers.leave, three))
    assert not ended


def test_a_place_is_agreed_on_while_they_work(ended):
    """Threads that count as fast as they can, kept together by what takes turns with the notice."""
    two = meeting((2, 0), (2, 1))
    together = threading.Barrier(2)

    def work(one):
        for step in range(1, 10**6):
            # As collectives keep processes together: none is two steps ahead.
            together.wait(20)
            if one.stop():
                return step
            if step == 500 and one is two[1]:
                one.ask_to_stop()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, two)
        assert first == second > 500
        list(pool.map(peers.Peers.leave, two))
    assert not ended


def test_all_end_at_once_when_one_has_not_come_to_any_place(ended, monkeypatch):
    three = meeting(*((3, index) for index in range(3)))
    monkeypatch.setattr(peers, "PROMPT", 0.2)
    assert not three[0].stop()
    three[1].ask_to_stop()
    wait_for(lambda: len(ended) >= 3)
    assert all(one.startswith("143: asked to stop; the same command goes on") for one in ended)
    for one in three:
        one.close()


def test_a_notice_after_the_end_is_no_error(ended):
    two = meeting((2, 0), (2, 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(peers.Peers.leave, two))
    for one in two:
        one.ask_to_stop()
    assert not ended


def test_sigterm_stops_a_single_process_at_its_next_place(monkeypatch):
    for name in EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with runtime.initialize_runtime() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(stop)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_before_the_first_place_ends_a_single_process(monkeypatch):
    ends = []
    monkeypatch.setattr(stopping, "end", lambda *words: ends.append(words))
    with stopping.stopping_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: ends)
    assert ends == [(stopping.ASKED, 143)]


WORK = """
import sys, time
from brgsa_jax.config import UserError
from brgsa_jax.runtime import initialize_runtime

try:
    with initialize_runtime():
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((jax.process_count(),), ("data",), axis_types=(AxisType.Auto,))
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, P()))
        own = np.ones(1, np.float32)
        for step in range(10 if sys.argv[1] == "finish" else 10**9):
            batch = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), own)
            assert total(batch) == jax.process_count()
            if step == 3:
                print("running", flush=True)
            if sys.argv[1] == "fail" and jax.process_index() == 1 and step == 5:
                raise UserError("the data are not there")
except UserError as error:
    print(f"brgsa: {error}", file=sys.stderr)
    sys.exit(1)
print("finished")
"""


@contextlib.contextmanager
def running(folder, what, count, indices):
    """Starts processes of a run of `count`; ends what is left of them."""
    port = free_port()
    processes = []
    try:
        for index in indices:
            environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
                       "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                       "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
                       # Long where all come: the machine may be busy.
                       "BRGSA_START_TIMEOUT": "120" if len(indices) == count else "8"}
            with (folder / f"{index}.log").open("w") as log:
                processes.append(subprocess.Popen([sys.executable, "-c", WORK, what], stdout=log,
                                                  stderr=subprocess.STDOUT, env=environ))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(folder, index):
    return (folder / f"{index}.log").read_text()


def until_running(folder, processes):
    deadline = time.monotonic() + 200
    for index, process in enumerate(processes):
        while "running" not in log_of(folder, index):
            assert process.poll() is None and time.monotonic() < deadline, log_of(folder, index)
            time.sleep(0.05)


def test_three_of_four_processes_end_with_one_sentence(tmp_path):
    with running(tmp_path, "finish", 4, range(3)) as processes:
        codes = [process.wait(200) for process in processes]
    assert codes == [1, 1, 1]
    for index in range(3):
        lines = log_of(tmp_path, index).splitlines()
        # On a busy machine even process 0 may come late.
        assert len(lines) == 1 and lines[0].startswith(
            ("brgsa: only", "brgsa: process 0 could not be reached")), lines


def test_processes_finish_together_without_a_word(tmp_path):
    with running(tmp_path, "finish", 2, range(2)) as processes:
        codes = [process.wait(200) for process in processes]
    for index, code in enumerate(codes):
        lines = [line for line in log_of(tmp_path, index).splitlines() if "[Gloo]" not in line]
        assert code == 0 and lines == ["running", "finished"], lines


def test_a_killed_process_ends_the_others_with_a_sentence(tmp_path):
    """JAX itself aborts them when it is process 0; of another one see test_processes."""
    victim = 0
    with running(tmp_path, "work", 3, range(3)) as processes:
        until_running(tmp_path, processes)
        processes[victim].kill()
        start = time.monotonic()
        codes = [process.wait(60) for process in processes]
        assert time.monotonic() - start < 60
    for index, code in enumerate(codes):
        if index != victim:
            last = log_of(tmp_path, index).splitlines()[-1]
            assert code == 1 and f"process {victim} on " in last, last
            assert last.startswith("brgsa: ") and "ended without a word" in last


def test_a_failed_process_ends_the_others_with_its_sentence(tmp_path):
    with running(tmp_path, "fail", 3, range(3)) as processes:
        codes = [process.wait(200) for process in processes]
    assert codes == [1, 1, 1]
    for index in range(3):
        last = log_of(tmp_path, index).splitlines()[-1]
        expected = "the data are not there"
        assert last.startswith("brgsa: ") and last.endswith(expected), last
        assert (f"process 1 on {socket.gethostname()} failed" in last) == (index != 1), last
