"""`lte` on a stand-in for Windows: what Python lacks there is taken away, and open files are refused as they are there.

Windows itself is not at hand. This finds what our own code needs of POSIX: modules, functions and signals that are
missing, folders that cannot be opened, open files that can be neither removed nor replaced. The libraries are Linux's,
so it tells nothing of them; where `filelock` has flock here and msvcrt there, it has a marker file under this stand-in.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = ("resource", "pwd", "grp", "termios", "pty", "tty", "syslog")
OS_NAMES = (
    "fork", "forkpty", "sched_getaffinity", "sched_setaffinity", "getuid", "geteuid", "getgid", "getegid", "setsid",
    "getpgid", "killpg", "posix_fallocate", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "uname",
    "mkfifo", "nice", "getloadavg", "sysconf", "wait3", "wait4", "chown",
)  # fmt: skip
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGPIPE")


def become_windows() -> None:
    """Take away what Windows lacks; libraries are imported before, since their Linux builds need it."""
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # filelock says that it has no flock, as it would not on Windows
        import filelock  # noqa: F401
    import psutil  # noqa: F401
    import rich.console  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in OS_NAMES:
        delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)
    platform.system = lambda: "Windows"
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # as Python has it there
    os.open = _refusing_folders(os.open)
    os.fsync = _refusing_readers(os.fsync)
    for name in ("unlink", "remove", "replace", "rename"):
        setattr(os, name, _refusing_open_files(getattr(os, name)))


def _refusing_folders(function: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, *arguments: Any, **options: Any) -> int:
        # shutil.rmtree of Linux opens folders; that of Windows does not.
        if Path(path).is_dir() and sys._getframe(1).f_code.co_filename != shutil.__file__:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return function(path, *arguments, **options)

    return call


def _refusing_readers(function: Callable[[int], None]) -> Callable[[int], None]:
    def call(handle: int) -> None:
        lines = Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
        flags = int(dict(line.split(":") for line in lines if ":" in line)["flags"], 8)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        function(handle)

    return call


def _refusing_open_files(function: Callable[..., None]) -> Callable[..., None]:
    def call(path: Any, *more: Any, **options: Any) -> None:
        folder = Path(f"/proc/self/fd/{options['dir_fd']}").readlink() if options.get("dir_fd") else Path.cwd()
        touched = {str(folder / path), *(str(folder / other) for other in more)}
        for handle in Path("/proc/self/fd").iterdir():
            try:
                held = str(handle.readlink())
            except OSError:  # this listing's own
                continue
            if held in touched:
                raise PermissionError(errno.EACCES, "it is being used by another process", held)
        function(path, *more, **options)

    return call
