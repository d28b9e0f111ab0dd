"""Signals that end a command or a service, where the interpreter or a library drops the exception that a signal handler raises."""

import os
import signal
import subprocess
import sys

import pytest

# A command that receives a signal within a place that drops exceptions, then goes on for seconds.
SCRIPT = """
import ctypes, os, signal, sys, time
from contextlib import suppress
from memtail.cli import app as cli
from memtail.cli.arguments import interruptible

number, place = int(sys.argv.pop()), sys.argv.pop()

def receive():
    os.kill(os.getpid(), number)
    time.sleep(0)

class Destructor:
    def __del__(self):
        receive()

def library():
    with suppress(BaseException):
        receive()

places = {"destructor": Destructor, "callback": ctypes.CFUNCTYPE(None)(receive), "library": library}

@cli.app.command()
def wait():
    with interruptible():
        places[place]()
        print("goes on", flush=True)
        time.sleep(0 if place == "library" else 5)

cli.main()
"""
SERVICE = """
import os, signal, time
from services.common.process import start

class Destructor:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

def serve(settings):
    Destructor()
    print("goes on", flush=True)
    time.sleep(5)
    return 1

start(serve)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("place", ["destructor", "callback"])
def test_a_signal_takes_effect_soon_although_the_interpreter_dropped_it(place, name, status):
    result = run(place, name)
    assert result.returncode == status, result.stderr
    assert result.stdout == "goes on\n"
    assert "Traceback" not in result.stderr


def test_a_termination_that_was_dropped_without_a_trace_shows_in_the_exit_status():
    assert run("library", "SIGTERM").returncode == 143


def test_a_service_ends_although_the_interpreter_dropped_the_signal(tmp_path):
    environment = {**os.environ, "MEMTAIL_STORE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", SERVICE], capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "goes on\n", "")


def run(place, name):
    arguments = [sys.executable, "-c", SCRIPT, "wait", place, str(int(signal.Signals[name]))]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
