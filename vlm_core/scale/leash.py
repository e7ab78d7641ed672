"""Runs a command that ends when whoever started it ends, however that was: ``python leash.py COMMAND...``.

Its standard input is a pipe that nobody writes to: it closes with the process that holds the other end, also where that was killed. Where
this process is killed itself, Linux ends the command. The exit status is the command's; 128 and the signal's number where one ended it, or
told this process to end it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

_PARENT_DEATH_SIGNAL = 1


def main() -> int:
    """The command line."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_follow)
    told = []

    def obey(number: int, _) -> None:
        told.append(number)
        end()

    def end() -> None:
        try:
            os.killpg(command.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def watch() -> None:
        sys.stdin.buffer.read()
        end()

    signal.signal(signal.SIGTERM, obey)
    signal.signal(signal.SIGINT, obey)
    threading.Thread(target=watch, daemon=True).start()
    status = command.wait()
    end()  # what the command itself has left behind
    return 128 + told[0] if told else status if status >= 0 else 128 - status


def _follow() -> None:
    """In the command, before it begins: be killed when the parent ends (Linux; elsewhere the pipe alone tells)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # The watching thread holds the standard input: nothing is left to be closed in order.
    os._exit(status)
