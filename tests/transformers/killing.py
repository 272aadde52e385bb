"""Kills conversions with SIGKILL and lets them go on: ROOT FOLDER random|writes KILLS.

Conversions are forked from this process, which has imported everything and computed nothing, so
that a kill costs no start of Python. Prints the number of kills; fails if a folder differs.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from attnreg.transformers.convert import convert
from attnreg.transformers.plan import Plan, Setting
from attnreg.transformers.task import Options, prepare
from tests.transformers.texts import contents

OPTIONS = Options(window=16, max_iterations=2, held_out=0.2, final_steps=16)


def fork(root, out, flushes=None):
    """A child that converts, and kills itself at that flush to the disk."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if flushes is not None:
            left, flush = [flushes], os.fsync

            def fsync(handle):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                flush(handle)

            os.fsync = fsync
        task = prepare(root / "llama", Plan(Setting(kv_heads=1)), root / "text.txt", OPTIONS)
        convert(task, out)
        code = 0
    finally:
        os._exit(code)


def killed(child):
    """Waits for a child; whether it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def main():
    root, folder, mode, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    (folder / "whole").mkdir()
    began = time.perf_counter()
    assert not killed(fork(root, folder / "whole" / "out"))
    length = time.perf_counter() - began
    expected = contents(folder / "whole")
    draw = random.Random(0)
    kills = 0
    while kills < wanted:
        (folder / "parts").mkdir()
        out = folder / "parts" / "out"
        alive = True
        flushes = 1
        while alive:
            if mode == "random":
                child = fork(root, out)
                time.sleep(draw.uniform(0.0, length if kills < wanted else 10 * length))
                os.kill(child, signal.SIGKILL)
            else:
                child = fork(root, out, flushes)
                flushes += draw.randrange(2)  # also twice at the same write
            alive = killed(child)
            kills += alive
            if alive and out.exists():
                assert contents(out) == expected_of(expected)  # never half a folder
        assert contents(folder / "parts") == expected
        shutil.rmtree(folder / "parts")
    sys.stdout.write(f"{kills}\n")


def expected_of(files):
    return {name.removeprefix("out/"): content for name, content in files.items()}


if __name__ == "__main__":
    main()
