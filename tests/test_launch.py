"""The launch scripts: shellcheck, what they would run, and real processes under local.sh."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *ROOT.glob("tests/slurm/*.sh")])
TPU = {"TPU_NAME": "pod-a", "TPU_ZONE": "zone-1", "TPU_TYPE": "v5litepod-16"}


def call(script, *arguments, **environment):
    return subprocess.run([str(LAUNCH / script), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, env={**os.environ, **environment})


def program(folder, name, text):
    """Puts a program on a path of its own; returns that path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 5
    # A package from PyPI brings the program along.
    check = subprocess.run([Path(sys.executable).parent / "shellcheck", *SCRIPTS],
                           capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_and_name_no_place_of_ours(path):
    text = path.read_text()
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    assert text.startswith("#!/usr/bin/env bash\n") and "set -" in text
    for line in text.splitlines():
        assert not re.search(r"--(project|zone|account|partition|reservation|qos)[= ][\w-]", line)
        assert not re.search(r"(api[_-]?key|token|password|secret)\s*=", line, re.IGNORECASE)


def test_slurm_that_cannot_be_installed_is_one_sentence(tmp_path):
    """Without Debian's tools, and without its packages for who is not root."""
    for name in ("bash", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))

    def install():
        return subprocess.run([ROOT / "tests/slurm/setup.sh", "install"], capture_output=True,
                              text=True, env={"PATH": str(tmp_path)})

    run = install()
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run
    assert "needs Debian or Ubuntu; install slurmctld slurmd slurm-client munge" in run.stderr
    program(tmp_path, "apt-get", "exit 1")
    (tmp_path / "id").unlink()
    program(tmp_path, "id", "echo 1000")
    run = install()
    assert run.returncode == 1 and "run as root: apt-get install slurmctld" in run.stderr


def python(code):
    return [sys.executable, "-c", code]


def test_local_gives_each_process_its_place(tmp_path):
    code = ("import os, socket; a = os.environ['JAX_COORDINATOR_ADDRESS']; "
            "h, p = a.split(':'); socket.create_server((h, int(p))).close() "
            "if os.environ['JAX_PROCESS_ID'] == '1' else None; "
            "print(*(os.environ['JAX_' + n] for n in ('PROCESS_ID', 'NUM_PROCESSES', "
            "'PLATFORMS')), a)")
    run = call("local.sh", 3, *python(code), BRGSA_LOGS=str(tmp_path / "logs of ü"))
    assert run.returncode == 0, run
    told = [(tmp_path / "logs of ü" / f"{index}.log").read_text().split() for index in range(3)]
    assert [one[:3] for one in told] == [[str(index), "3", "cpu"] for index in range(3)]
    assert len({one[3] for one in told}) == 1 and told[0][3].startswith("localhost:")
    assert " ".join(told[0]) in run.stdout and " ".join(told[1]) not in run.stdout


def test_local_deals_the_visible_gpus(tmp_path):
    logs = {"BRGSA_LOGS": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3,GPU-5,7"}
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['JAX_PLATFORMS'])"
    assert call("local.sh", 2, "--gpus", *python(code), **logs).returncode == 0
    assert [(tmp_path / f"{index}.log").read_text() for index in range(2)] == [
        "3 cuda,cpu\n", "GPU-5 cuda,cpu\n"]
    run = call("local.sh", 4, "--gpus", "true", **logs)
    assert run.returncode == 1 and "4 processes need 4 GPUs, this machine shows 3" in run.stderr


@pytest.mark.parametrize("arguments", [[], ["0", "true"], ["x", "true"], ["-1", "true"], ["2"]])
def test_local_refuses_wrong_use(arguments):
    run = call("local.sh", *arguments)
    assert run.returncode == 2 and "usage:" in run.stderr


def test_local_ends_all_when_one_fails(tmp_path):
    code = ("import os, sys, time\n"
            "if os.environ['JAX_PROCESS_ID'] == '1':\n"
            "    print('brgsa: the reason', file=sys.stderr)\n"
            "    sys.exit(7)\n"
            "time.sleep(100)")
    start = time.monotonic()
    run = call("local.sh", 3, *python(code), BRGSA_LOGS=str(tmp_path))
    assert run.returncode == 7 and time.monotonic() - start < 60
    assert "process 1 ended with 7" in run.stderr and "brgsa: the reason" in run.stderr


def test_local_names_the_killed_one_among_those_that_failed_for_it(tmp_path):
    code = ("import os, pathlib, sys, time\n"
            f"flag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
            "if os.environ['JAX_PROCESS_ID'] == '1':\n"
            "    flag.touch()\n"
            "    os.kill(os.getpid(), 9)\n"
            "while not flag.exists():\n"
            "    time.sleep(0.01)\n"
            "sys.exit(1)")
    run = call("local.sh", 3, *python(code), BRGSA_LOGS=str(tmp_path))
    assert run.returncode == 137 and "process 1 ended with 137" in run.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_local_passes_signals_on_to_all(tmp_path, number, code):
    work = ("import signal, sys, time\n"
            "def save(*_):\n"
            "    print('saved', flush=True)\n"
            "    sys.exit(143)\n"
            "signal.signal(signal.SIGTERM, save)\n"
            "try:\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(100)\n"
            "except KeyboardInterrupt:\n"
            "    print('stopped', flush=True)\n"
            "    sys.exit(130)")
    process = subprocess.Popen([LAUNCH / "local.sh", "2", *python(work)], start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "BRGSA_LOGS": str(tmp_path)})
    deadline = time.monotonic() + 60
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # As a terminal does: to the whole foreground group, which is the script.
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    word = {signal.SIGTERM: "saved", signal.SIGINT: "stopped"}[number]
    assert [log.read_text().split() for log in logs] == [["ready", word]] * 2


def test_gpu_node_trains_on_the_gpus_or_says_there_are_none(tmp_path):
    path = program(tmp_path / "bin", "brgsa", 'echo "$JAX_PLATFORMS" "$@"')
    none = call("gpu_node.sh", "--config", "brgsa",
                PATH=program(tmp_path / "bin", "nvidia-smi", "exit 9"))
    assert none.returncode == 1 and "no NVIDIA GPU" in none.stderr
    program(tmp_path / "bin", "nvidia-smi", "echo GPU 0")
    assert call("gpu_node.sh", PATH=path).returncode == 2
    run = call("gpu_node.sh", "--pmap", "--config", "a b", PATH=path)
    assert run.stdout.splitlines() == [
        "GPU 0", "cuda,cpu train --config a b --config.train.parallel=pmap"]
    assert "pmap" not in call("gpu_node.sh", "--config", "brgsa", PATH=path).stdout


def tpu(*arguments, path=None, **environment):
    # Without a gcloud, unless the test brings its own.
    base = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    return subprocess.run([LAUNCH / "tpu_pod.sh", *arguments], capture_output=True, text=True,
                          timeout=60, env={**base, "PATH": path or base["PATH"], "TPU_RETRY": "0",
                                           **TPU, **environment})


def test_tpu_pod_only_prints_when_asked_to(tmp_path):
    path = program(tmp_path / "bin", "gcloud", f"touch {tmp_path}/called")
    run = tpu("--dry-run", "resume", "brgsa", "train", "--workdir", "/mnt/a b", "--config.x=$(id)",
              path=path, TPU_SPOT="1", TPU_PROJECT="mine", TPU_SETUP="mount 'x y'")
    assert run.returncode == 0 and not (tmp_path / "called").exists()
    lines = [line for line in run.stderr.splitlines() if line.startswith("+ ")]
    words = [line.split()[1:] for line in lines]
    verbs = [line[4] if line[0] == "gcloud" else line[0] for line in words]
    assert verbs == ["ssh", "describe", "delete", "create", "git", "scp", "ssh", "ssh"]
    for line in lines:
        if "gcloud" in line:
            assert "--zone=zone-1" in line and "--project=mine" in line and " pod-a" in line
    assert "--accelerator-type=v5litepod-16" in lines[3] and lines[3].endswith("--spot")
    assert all("--worker=all" in lines[place] for place in (0, 5, 6, 7))
    # What the shell of a worker gets is the command as it was given.
    sent = subprocess.run(["bash", "-c", f"printf '%s' {lines[0].split('--worker=all ')[1]}"],
                          capture_output=True, text=True).stdout
    command = sent.removeprefix("--command=PATH=$HOME/venv/bin:$PATH exec")
    got = subprocess.run(["bash", "-c", f"printf '%s|'{command}"], capture_output=True, text=True)
    assert got.stdout == "brgsa|train|--workdir|/mnt/a b|--config.x=$(id)|"


def test_tpu_pod_deletes_without_a_question():
    run = tpu("--dry-run", "delete")
    assert run.stderr == ("+ gcloud compute tpus tpu-vm delete pod-a --zone=zone-1 --quiet\n")


@pytest.mark.parametrize(("arguments", "environment", "word"), [
    ([], {}, "usage:"), (["explode"], {}, "usage:"), (["run"], {}, "usage:"),
    (["delete", "x"], {}, "usage:"), (["delete"], {"TPU_NAME": ""}, "set TPU_NAME"),
    (["create"], {"TPU_TYPE": ""}, "set TPU_TYPE"),
    (["delete"], {"TPU_ZONE": "--help"}, "TPU_ZONE"),
    (["delete"], {"TPU_NAME": "a;id"}, "TPU_NAME"),
    (["delete"], {"TPU_PROJECT": "$(id)"}, "TPU_PROJECT")])
def test_tpu_pod_refuses_wrong_use(arguments, environment, word):
    run = tpu("--dry-run", *arguments, **environment)
    assert run.returncode == 2 and word in run.stderr and "gcloud" not in run.stderr


FAKE_CLOUD = """
case "$4" in
describe) cat STATE ;;
create) if [ -e REFUSE ]; then rm REFUSE; exit 1; fi; echo READY >STATE ;;
delete) rm -f STATE ;;
ssh)
    case "$*" in
    *exec*)
        echo "$*" >>RUNS
        case $(wc -l <RUNS) in
        1) echo PREEMPTED >STATE; exit 255 ;;
        2) exit 143 ;;
        esac
        ;;
    esac
    ;;
esac
"""


def test_tpu_pod_goes_on_after_preemptions_until_the_run_has_finished(tmp_path):
    path = program(tmp_path / "bin", "gcloud", re.sub(
        r"\b(STATE|REFUSE|RUNS)\b", lambda word: str(tmp_path / word[0]), FAKE_CLOUD))
    (tmp_path / "STATE").write_text("READY\n")
    (tmp_path / "REFUSE").touch()
    run = tpu("resume", "brgsa", "train", path=path)
    assert run.returncode == 0, run.stderr
    assert len((tmp_path / "RUNS").read_text().splitlines()) == 3
    assert run.stderr.count("tpu-vm delete") == 1 and run.stderr.count("tpu-vm create") == 2
    # Another failure is no reason to try again.
    path = program(tmp_path / "bin", "gcloud", "if [ $4 = describe ]; then echo READY; else exit 3"
                   "; fi")
    again = tpu("resume", "brgsa", "train", path=path)
    assert again.returncode == 3 and again.stderr.count("tpu-vm ssh") == 1


@pytest.mark.parametrize(("file", "values", "resource", "count"), [
    ("gke_jobset.yaml", {"TOPOLOGY": "4x4", "CHIPS": "4"}, "google.com/tpu", 4),
    ("gke_jobset_gpu.yaml", {"GPUS": "8"}, "nvidia.com/gpu", 8)])
def test_jobsets_start_all_pods_anew_when_one_fails(file, values, resource, count):
    text = (LAUNCH / file).read_text()
    values = {"NAME": "run-a", "IMAGE": "registry/image:1", "CLAIM": "files", "HOSTS": "4",
              "ACCELERATOR": "kind", **values}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(values)
    assert not re.search(r"gcr\.io|pkg\.dev|docker\.io|project|secret|token|password", text, re.I)
    jobset = yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], text))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 10
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (1, 4, 4)
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {resource: count}
    assert container["command"][:2] == ["brgsa", "train"]
    assert "/mnt/runs/run-a" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert all(value is None or isinstance(value, str) for value in environment.values())
    if "gpu" in file:
        # The name that JobSet gives the first pod: set, job, number of the job, number of the pod.
        assert environment["JAX_COORDINATOR_ADDRESS"] == f"run-a-{job['name']}-0-0.run-a:1234"
        assert environment["JAX_NUM_PROCESSES"] == "4" and "JAX_PROCESS_ID" in environment
