"""Windows, acted out on Linux: with this folder first on PYTHONPATH, a Python and those that it starts find nothing that Windows
lacks, and meet some of what only Windows does.

Hidden: modules, functions and flags of POSIX. Acted: `sys.platform`; descriptors are not inherited, processes lead no group, only
sockets can be waited for, and no file is removed or replaced that this process or one below it has open or mapped. Not acted:
drives, backslashes, the code page of a console, text mode of a descriptor.
"""

import contextlib
import importlib
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog")
FUNCTIONS = """execv fork forkpty getuid geteuid getgid getegid getgroups getloadavg getpgid getpgrp getsid killpg setpgid setsid
    uname wait wait3 wait4 waitid memfd_create pread pwrite preadv pwritev readv writev sysconf confstr sched_getaffinity statvfs
    fstatvfs mkfifo mknod openpty posix_spawn posix_spawnp chown fchown fchmod lchown nice sync pipe2 sendfile lchflags
    O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_SYNC O_NOCTTY"""
# They look at the system when they are imported, and this one is Linux all the same
EARLY = """concurrent.futures.process ctypes filelock multiprocessing.connection multiprocessing.popen_spawn_posix
    multiprocessing.resource_tracker multiprocessing.synchronize numpy psutil pyarrow rich.console rich.progress sentencepiece"""

unlink, replace, rename, Popen = os.unlink, os.replace, os.rename, subprocess.Popen.__init__


def busy(path: object) -> bool:
    """Whether this process, or one below it, has a file open or mapped."""
    import psutil

    real = os.path.realpath(path)
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):
            proc = Path("/proc", str(process.pid))
            if real in map(os.readlink, (proc / "fd").iterdir()) or f" {real}\n" in (proc / "maps").read_text():
                return True
    return False


def refusing(call):
    """A call that refuses files in use, as Windows does; those of tempfile are opened there in a way that allows it."""
    def refused(*paths, **more):
        if sys._getframe(1).f_globals.get("__name__") != "tempfile" and any(map(busy, paths)):
            raise PermissionError(13, "The process cannot access the file because it is being used by another process", paths[0])
        return call(*paths, **more)
    return refused


def start(self, *args, pass_fds=(), start_new_session=False, preexec_fn=None, **more) -> None:
    assert not pass_fds, "pass_fds not supported on Windows."
    assert preexec_fn is None, "preexec_fn is not supported on Windows platforms"
    Popen(self, *args, **more)


def only_sockets(*_) -> None:
    raise OSError(10038, "An operation was attempted on something that is not a socket")


def act() -> None:
    wanted = EARLY.split() + ("score" not in sys.orig_argv) * os.environ.get("ACTED_EARLY", "").split()
    loaded = {name: importlib.import_module(name) for name in wanted}
    platform.uname()
    for name in MODULES:
        sys.modules[name] = None
    for name in FUNCTIONS.split():
        if hasattr(os, name):
            delattr(os, name)
    del signal.SIGKILL
    loaded["filelock"].FileLock = lambda path: contextlib.nullcontext()  # the package has its own code for Windows
    loaded["psutil"].Process.kill = lambda self: os.kill(self.pid, 9)
    subprocess.Popen.kill = lambda self: self.poll() is None and os.kill(self.pid, 9)
    subprocess.Popen.__init__ = start
    select.select = only_sockets
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False
    os.unlink = os.remove = refusing(unlink)
    os.replace, os.rename = refusing(replace), refusing(rename)
    tempfile.tempdir = os.environ.get("TEMP")
    sys.platform = os.environ.get("ACTED_PLATFORM", "win32")  # multiprocessing asks for it late


act()
