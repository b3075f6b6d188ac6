"""Whether code can be compiled here: a C++ compiler that works, and a folder for what it makes."""

import ctypes
import getpass
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

ROOM = 2**24  # bytes: the loops of a small model take 5 MB


def obstacle() -> str | None:
    """Why nothing can be compiled on this machine, and the remedy; None where a trial succeeds (0.05 s).

    Without compiled code everything gives the same results, only slower, so the caller warns and goes on. A terminal
    sends Ctrl-C to the trial's compiler, too: a compiler that ended so is no obstacle, and raises `KeyboardInterrupt`.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}; install g++ or name another in the environment variable CXX"
    remedy = "name a folder with room that can be written to in the environment variable TORCHINDUCTOR_CACHE_DIR"
    folder = "a temporary one"
    try:
        folder = _folder()
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            library = Path(place, "trial.so")
            made = subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)], text=True,
                                  input='extern "C" int trial() { return 1; }', capture_output=True)
            if shutil.disk_usage(place).free < ROOM:
                return f"the folder for compiled code, {folder}, has less than {ROOM >> 20} MiB of room; {remedy}"
            if made.returncode == -signal.SIGINT:
                raise KeyboardInterrupt
            if made.returncode or not library.exists():
                said = (made.stderr.strip() or f"exit status {made.returncode}").splitlines()[0]
                return (f"the C++ compiler {compiler!r} does not work ({said}); install g++ or name another in the "
                        "environment variable CXX")
            ctypes.CDLL(str(library))
    except OSError as error:
        return f"the folder for compiled code, {folder}, cannot be used ({error}); {remedy}"
    return None


def _folder() -> str:
    """Where inductor keeps compiled code. Its own function for this is private, and takes a second to import."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return os.path.abspath(folder)
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def uncompiled(name: str, obstacle: str) -> str:
    """The warning for a function that an obstacle keeps from being compiled."""
    return f"jit: {obstacle}. Until then {name} runs as it is, slower"
