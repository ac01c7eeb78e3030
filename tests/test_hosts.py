"""Runs of several processes, real ones on this machine: what they find, lose and go on with."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import forked
import jax
import numpy as np
import pytest
from conftest import environment, scalars, tiny_run
from forked import run_command, run_command_that_ends, run_script

from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.distributed import hosts
from timesformer_jax.errors import InputError

# 24 steps. A small learning rate keeps what sums in another order add from growing.
LONG = {"epochs": 3, "model.depth": 1, "optimizer.learning_rate": 1e-4, "eval.every_epochs": 0}
LAST = 24

pytestmark = [
    pytest.mark.processes,
    pytest.mark.training,
    pytest.mark.timeout(1800),  # of processes that share few cores with much else
]

PEER = """
import sys
from timesformer_jax.distributed import hosts
from timesformer_jax.errors import InputError
try:
    with hosts.processes(**eval(sys.argv[1])):
        exec(sys.argv[2])
except InputError as e:
    sys.exit(f"error: {e}")
"""


def free_port():
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::", 0))
        return s.getsockname()[1]


def which(coordinator, count, process):
    return {"coordinator": coordinator, "num_processes": count, "process_id": process}


class Peers:
    """Starts processes that belong together; those that are left are killed in the end."""

    def __init__(self):
        self._started = []

    def start(self, devices, function, *arguments, **variables):
        """A process with so many CPU devices that calls the function."""
        environ = environment() | {"JAX_PLATFORMS": "cpu", **variables}
        environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        run = forked.Process(function, *arguments, environment=environ)
        self._started.append(run)
        return run

    def commands(self, count, devices, arguments, ends):
        """The command line in `count` processes, told of each other by flags.

        ends: (number of the process that sends itself a signal, which one, when).
        """
        several = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        several += ["--heartbeat_seconds=10"]
        which, how, when = ends
        return [
            self.start(
                devices, *((run_command_that_ends, how, when) if i == which else (run_command,)),
                *arguments, *several, f"--process_id={i}",
            )
            for i in range(count)
        ]  # fmt: skip

    def scripts(self, count, devices, work):
        """The work in `count` processes, within `hosts.processes`."""
        address = f"127.0.0.1:{free_port()}"
        return [
            self.script(work, devices, which(address, count, i) | {"heartbeat_seconds": 10})
            for i in range(count)
        ]

    def script(self, work, devices, given, **variables):
        return self.start(devices, run_script, PEER, repr(given), work, **variables)

    def close(self):
        for run in self._started:
            run.kill()
            run.communicate()


@pytest.fixture(scope="module")
def peers():
    with contextlib.closing(Peers()) as started:
        yield started


def ends(running):
    """The exit status, output and errors of each."""
    with ThreadPoolExecutor() as readers:  # no pipe may fill up while another is read
        output, errors = zip(*readers.map(forked.Process.communicate, running))
    return [run.returncode for run in running], output, errors


@pytest.fixture(scope="module")
def whole(demo_data, tmp_path_factory, peers):
    """The workdir of one process with 4 devices that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    statuses, _, errors = ends([peers.start(4, run_command, *tiny_run(demo_data, workdir, **LONG))])
    assert statuses == [0], errors
    return workdir


def test_a_run_killed_preempted_or_on_several_processes_equals_one_on_one_process(
    demo_data, whole, tmp_path, peers
):
    """4 processes, one of them killed; 2 with another mesh, one told to end; 2 to the end."""
    workdir, evaluated = tmp_path / "run", tmp_path / "evaluated.json"
    arguments = tiny_run(demo_data, workdir, **LONG)

    folder = os.fspath(workdir / "checkpoints")
    four = peers.commands(4, 1, arguments, (2, signal.SIGKILL, (folder, 8)))
    statuses, _, errors = ends(four)
    assert statuses[2] == -signal.SIGKILL
    assert 0 not in statuses
    assert not (workdir / "results.json").exists()

    # Told to end while it starts: both end after the same step, one of their first.
    arguments += ["--config.mesh.fsdp=2"]
    saved = checkpoints.Checkpoints(workdir / "checkpoints").latest_step()
    two = peers.commands(2, 2, arguments, (1, signal.SIGTERM, (folder, 0)))
    statuses, _, errors = ends(two)
    assert statuses == [128 + signal.SIGTERM] * 2, errors
    assert f"going on from step {saved}" in errors[0]
    said = int(errors[0].split("asked to end: step ")[1].split()[0])
    assert checkpoints.Checkpoints(workdir / "checkpoints").latest_step() == said
    assert saved < said < LAST

    evaluate = ["evaluate", f"--checkpoint={workdir}", "--batch_size=8", f"--output={evaluated}"]
    work = f"""
from timesformer_jax.cli import main as cli
cli.main(["timesformer", *{arguments!r}])
cli.main(["timesformer", *{evaluate!r}])
"""
    statuses, output, errors = ends(peers.scripts(2, 2, work))
    assert statuses == [0, 0], errors
    assert f"going on from step {said}" in errors[0]
    assert output[0].count("of 21 videos") == 2  # of training and evaluation
    assert "of 21 videos" not in output[1]
    assert "training:" not in errors[1]

    expected, found = scalars(whole, "train/loss"), scalars(workdir, "train/loss")
    assert sorted(found) == sorted(expected) == list(range(1, LAST + 1))
    for step, losses in found.items():
        np.testing.assert_allclose(losses, expected[step][0], rtol=2e-4, err_msg=str(step))
    reference = accuracy(whole / "results.json")
    assert accuracy(workdir / "results.json") == accuracy(evaluated) == reference
    (_, ours), (_, theirs) = map(checkpoints.load_parameters, (workdir, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


def accuracy(path):
    results = json.loads(path.read_text())
    return {k: results[k] for k in ("top1", "top5", "videos", "views", "crops", "classes")}


# ---- without a run ------------------------------------------------------------------------------

BATCHES = """
import jax, json, numpy as np
from timesformer_jax.distributed.mesh import batch_rows, make_mesh, put_batch
devices = jax.devices()
swapped = [devices[i] for i in (0, 4, 2, 6, 1, 5, 3, 7)]  # the hosts' devices by turns
whole = {"frames": np.arange(16 * 4 * 2 * 2 * 3).reshape(16, 4, 2, 2, 3), "label": np.arange(16)}
meshes = [
    (dict(data=8), devices), (dict(data=8), swapped), (dict(data=2, fsdp=2, tensor=2), devices),
    (dict(data=2, tensor=4), swapped), (dict(fsdp=2, sequence=4), devices),
    (dict(data=1, tensor=2, sequence=4), devices), (dict(data=2, sequence=4), swapped),
]
loaded = []
for axes, order in meshes:
    mesh = make_mesh(**axes | {"data": axes.get("data", 1)}, devices=order)
    rows = batch_rows(mesh, 16)
    loaded.append(rows.tolist())
    for name, array in put_batch(mesh, {k: v[rows] for k, v in whole.items()}).items():
        assert array.shape == whole[name].shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])
print("loaded", json.dumps(loaded))
"""


def test_a_process_loads_what_its_devices_hold(peers):
    statuses, output, errors = ends(peers.scripts(2, 4, BATCHES))
    assert statuses == [0, 0], errors
    loaded = [json.loads(re.search("loaded (.*)", out)[1]) for out in output]
    halves, whole = (list(range(8)), list(range(8, 16))), list(range(16))
    turns = [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]
    for found, half, turn in zip(loaded, halves, turns):
        assert found == [half, turn, half, whole, half, whole, whole]


def test_slurm_tells_the_processes_and_one_prepares_for_all(tmp_path, peers):
    work = f"""
import jax, pathlib, time
path = pathlib.Path({os.fspath(tmp_path / "prepared")!r})
def prepare():
    time.sleep(1)
    path.write_text(str(jax.process_index()))
hosts.once("prepare", prepare)
print("process", jax.process_index(), "of", jax.process_count(), "reads", path.read_text())
"""
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    running = [peers.script(work, 1, {}, **slurm(tasks=2, task=i), **port) for i in range(2)]
    statuses, output, errors = ends(running)
    assert statuses == [0, 0], errors
    assert [out.splitlines()[-1] for out in output] == [
        "process 0 of 2 reads 0",
        "process 1 of 2 reads 0",
    ]


def test_all_processes_get_the_numbers_of_the_first(peers):
    """In the context of a mesh too, in which training asks for them."""
    work = """
import jax, numpy as np
from timesformer_jax.distributed.mesh import make_mesh
mesh, own = make_mesh(), np.array([jax.process_index() + 7, 3], np.int32)
with jax.set_mesh(mesh):
    of_first = hosts.of_first(own)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    print(of_first, hosts.of_first(own), hosts.of_first(np.array([], np.int32)))
"""
    statuses, output, errors = ends(peers.scripts(2, 2, work))
    assert statuses == [0, 0], errors
    assert [out.splitlines()[-1] for out in output] == ["[7 3] [7 3] []"] * 2


def slurm(tasks, task):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
    }


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({}, {}),
        (slurm(tasks=1, task=0), {}),
        (slurm(tasks=4, task=2), {"num_processes": 1}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}),  # in a pod, but of no indexed job
    ],
)
def test_one_process_is_left_alone(variables, given, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with hosts.processes(**given):
        assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "a:1"}, "need --num_processes and --process_id too"),
        ({"num_processes": 2, "process_id": 1}, "need --coordinator too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be host:port, not a"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id must be 0 to 1 of 2 processes, not 2",
        ),
    ],
)
def test_flags_that_do_not_name_a_process_give_one_line_errors(given, said):
    with pytest.raises(InputError, match=said), hosts.processes(**given):
        pass


def test_a_job_that_jax_cannot_read_gives_a_one_line_error(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    said = r"`kubernetes` package .* --num_processes=1 for one"
    with pytest.raises(InputError, match=said), hosts.processes():
        pass


def test_processes_that_do_not_find_each_other_say_so_and_end(peers):
    with contextlib.closing(socket.socket(socket.AF_INET6)) as taken:
        taken.bind(("::", 0))
        taken.listen()
        cases = [
            (0, free_port(), 3, "process 0 of 2 waited 3 s for the others at"),  # alone
            (1, free_port(), 3, "process 1 of 2 waited 3 s for the others at"),  # no process 0
            (0, taken.getsockname()[1], 60, "choose a free port of its host for --coordinator"),
        ]
        running = [
            peers.script("", 1, which(f"127.0.0.1:{port}", 2, i) | {"startup_seconds": seconds})
            for i, port, seconds, _ in cases
        ]
        statuses, _, errors = ends(running)
    for status, error, (*_, said) in zip(statuses, errors, cases):
        assert status in (1, 2)  # of PEER, of hosts
        assert said in error.splitlines()[-1]
        assert "Traceback" not in error


def test_asked_to_end_all_do_at_the_same_step(peers):
    work = """
import os, signal, time
import jax
with hosts.termination() as stop_signal:
    for done in range(41, 2000):
        if done == 50 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01 * (1 + jax.process_index()))
        if ending := stop_signal(done):
            break
print("ended", done, ending)
"""
    statuses, output, errors = ends(peers.scripts(2, 1, work))
    assert statuses == [0, 0], errors
    ended = {tuple(re.search(r"ended (\d+) (\d+)", out).groups()) for out in output}
    [(step, number)] = ended
    assert 50 <= int(step) < 1999
    assert int(number) == signal.SIGTERM


def test_what_fails_in_one_process_ends_the_others(peers):
    work = """
hosts.SHUTDOWN_SECONDS = 1.0
import jax
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("here")
if jax.process_index() == 0:
    raise InputError("the disk is full")
multihost_utils.sync_global_devices("never")
"""
    statuses, _, errors = ends(peers.scripts(2, 1, work))
    assert statuses[0] == 2
    assert errors[0].splitlines()[-1] == "error: the disk is full"
    assert "Traceback" not in errors[0]
    assert statuses[1] != 0
