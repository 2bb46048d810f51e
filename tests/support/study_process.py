"""Studies in processes of their own, which are forked from one that has imported what they need."""

import atexit
import multiprocessing
import os
import runpy
import sys

from places import EXAMPLES

# What a study imports takes longer than what it does in these tests.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["study.command"])


def start(folder, *words):
    """Start the script as `python study.py WORDS` does, in the folder, with its output in the file `log`."""
    given = [*map(str, words), "--output", str(folder)]
    # Daemonic: one that hangs ends with the tests.
    process = FORKED.Process(target=run_script, args=(folder, given), daemon=True)
    process.start()
    return process


def run_script(folder, words):
    os.setsid()
    os.chdir(folder)
    log = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [str(EXAMPLES / "study.py"), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # A forked process goes without, and Ray's says goodbye to the cluster.


def wait_for_end(process, seconds):
    """Its exit status, minus the number of a signal that ended it."""
    process.join(seconds)
    return process.exitcode
