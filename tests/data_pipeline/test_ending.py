import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit, os
from data_pipeline.ending import leave
atexit.register(os.abort)  # as Arrow's threads do now and then
print("all of the output")
leave({code})
"""


def end(code):
    command = [sys.executable, "-c", SCRIPT.format(code=code)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=False)


def test_what_aborts_when_the_interpreter_ends_changes_neither_exit_code_nor_output():
    for code in (0, 75):
        ended = end(code)
        assert (ended.returncode, ended.stdout) == (code, "all of the output\n")
