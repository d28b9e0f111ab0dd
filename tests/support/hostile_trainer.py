"""Training code that misbehaves in the trials that `options.acts` names, and otherwise returns outcomes at once."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import memtail


def train(task):
    act = task.options["acts"].get(str(task.trial), "nothing")
    result = globals()[act](task)
    return outcome(task) if result is None else result


def outcome(task, **metrics):
    rng = np.random.default_rng(task.seed)
    inside = np.zeros(task.dataset.n_train, bool)
    inside[task.subset] = True
    train_correct = inside | (rng.random(task.dataset.n_train) < 0.5)
    return memtail.Outcome(train_correct=train_correct, test_correct=np.ones(task.dataset.n_test, bool), metrics=metrics)


def nothing(task):
    pass


def leave_children(task):
    """Leave a child in this process group, one in its own group, one in its own session, and an orphan in its own session."""
    sleep = ["sleep", "1000"]
    children = [
        subprocess.Popen(sleep).pid,
        subprocess.Popen(sleep, process_group=0).pid,
        subprocess.Popen(sleep, start_new_session=True).pid,
    ]
    orphan = subprocess.run(["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"], stdout=subprocess.PIPE, check=True)
    children.append(int(orphan.stdout))
    Path(task.options["file"]).write_text(json.dumps(children))


def leave_children_and_die(task):
    leave_children(task)
    os._exit(1)


def hang(task):
    time.sleep(1000)


def print_and_hang(task):
    print("before the hang")
    hang(task)


def hang_in_native_code(task):
    ctypes.PyDLL(None).sleep(1000)  # holds the lock of the interpreter


def ignore_signals(task):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Path(task.options["file"]).touch()
    hang(task)


def print_much(task):
    line = "x" * 99 + "\n"
    for _ in range(task.options["mib"]):
        sys.stdout.write(line * (2**20 // 100))
    print("the last line")
    raise ValueError("printed")


def exit_0(task):
    os._exit(0)


def exit_3(task):
    print("before the end")
    os._exit(3)


def leave_python(task):
    sys.exit(0)


def killed(task):
    os.kill(os.getpid(), signal.SIGKILL)


def leak(task):
    kept = []
    while True:
        kept.append(bytearray(b"x") * (1 << 26))


def bus_error(task):
    os.kill(os.getpid(), signal.SIGBUS)


def segfault(task):
    ctypes.string_at(0)


def fail(task):
    raise RuntimeError("\ud800 of the code")


def no_outcome(task):
    return {"train_correct": []}


def stop_unasked(task):
    raise memtail.TrainingStopped


def blame_the_worker(task):
    raise memtail.WorkerFaultError("not mine")


def blame_the_version(task):
    raise memtail.UnsupportedError("not mine")


def change_the_folder(task):
    os.chdir("/")


def remove_the_folder(task):
    task.workdir.rmdir()


def replace_the_output(task):
    sys.stdout = sys.stderr = None


def leave_a_thread(task):
    threading.Thread(target=hang, args=(task,)).start()


def lock_a_folder(task):
    (task.workdir.parent.parent / "locked" / "inside").mkdir(parents=True)
    (task.workdir.parent.parent / "locked").chmod(0)


def connection():
    """The number of the socket to memtail."""
    return next(int(number) for number, target in opened().items() if "socket:" in target)


def opened():
    """What is behind each file descriptor."""
    paths = Path("/proc/self/fd").iterdir()
    return {path.name: str(path.readlink()) for path in paths if path.is_symlink()}


def close_the_connection(task):
    os.close(connection())


def send_garbage(task):
    os.write(connection(), b"\xff" * 64)


def send_text(task):
    text = b"no JSON"
    os.write(connection(), len(text).to_bytes(8, "big") + bytes(8) + text)


def send_half(task):
    os.write(connection(), (100).to_bytes(8, "big") + bytes(8))
    hang(task)


def send_much(task):
    text = b'{"progress": 0.5}'
    while True:
        os.write(connection(), len(text).to_bytes(8, "big") + bytes(8) + text)


def forge_a_batch(task):
    text, data = b'{"batch": true}', b"no batch"
    os.write(connection(), len(text).to_bytes(8, "big") + len(data).to_bytes(8, "big") + text + data)
    hang(task)


def look(task):
    """Write what this process can see and do into `options.file`."""
    seen = {
        "environment": dict(os.environ),
        "open": opened(),
        "out of memory": int(Path("/proc/self/oom_score_adj").read_text()),
        "parents": [attempt(lambda path=f"/proc/{pid}/{name}": _read(path)) for pid in parents() for name in ("environ", "mem")],
        "files of parents": [attempt(lambda path=f"/proc/{pid}/fd": _read_links(path)) for pid in parents()],
        "signals": [attempt(lambda pid=pid: os.kill(pid, 0)) for pid in parents()],
        "read": {path: attempt(lambda path=path: _read(path)) for path in task.options["read"]},
        "write": {path: attempt(lambda path=path: _write(path)) for path in task.options["write"]},
        "append": {path: attempt(lambda path=path: Path(path).open("ab").close()) for path in task.options["read"]},
        "remove": {path: attempt(lambda path=path: _remove(path)) for path in task.options["remove"]},
        "use": {name: attempt(lambda use=use: use(task)) for name, use in USES.items()},
    }
    Path(task.options["file"]).write_text(json.dumps(seen))


def parents():
    """The guardian and the process with credentials."""
    guardian = os.getppid()
    return [guardian, int(Path(f"/proc/{guardian}/stat").read_text().rpartition(")")[2].split()[1])]


def attempt(act):
    try:
        act()
    except OSError as error:
        return error.strerror
    except Exception as error:
        return repr(error)
    return "done"


def _read(path):
    with Path(path).open("rb") as file:
        file.read(1)


def _read_links(folder):
    for path in Path(folder).iterdir():
        path.readlink()


def _write(path):
    Path(path).write_bytes(b"written")


def _remove(path):
    Path(path).rename(path + ".renamed")


def _use_workers(task):
    import torch

    loader = torch.utils.data.DataLoader(list(range(8)), batch_size=4, num_workers=1)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def _use_pool(task):
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]


def _use_figures(task):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    pyplot.plot([1, 2])
    pyplot.savefig(task.workdir / "figure.png")


def _use_shell(task):
    subprocess.run(["sh", "-c", "echo text >file && mv file ../moved && rm ../moved"], check=True)


def _use_sockets(task):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


USES = {"workers": _use_workers, "pool": _use_pool, "figures": _use_figures, "shell": _use_shell, "sockets": _use_sockets}
