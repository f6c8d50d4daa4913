"""Directory of the ipc sockets between API processes and an engine process. Free of torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path

import zmq

SOCKET, HEARTBEAT = "engine", "heartbeat"
"""Names of the sockets in the directory."""


class EndpointError(RuntimeError):
    """A directory cannot be used for sockets; the message gives the reason."""


def new_directory() -> Path:
    """Make a private directory for an engine and the process that starts it. Raises EndpointError."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="magicdec-"))
    except OSError as error:
        raise EndpointError(f"no directory for the engine's sockets: {error}") from None
    if excess := _excess(directory):
        directory.rmdir()
        raise EndpointError(
            f"{directory.parent}: its name is too long for sockets in it, by {excess} bytes; set a shorter TMPDIR"
        )
    return directory


def default_directory() -> Path:
    """Return the default directory of an engine that this user starts with torchrun."""
    return Path(tempfile.gettempdir()) / f"magicdec-engine-{os.getuid()}"


def claim(directory: Path) -> None:
    """Create `directory`, or take over that of a killed engine, and reserve it until this process ends.

    Only this user can access it. Raises EndpointError, also if another engine has reserved it.
    """
    if excess := _excess(directory):
        raise EndpointError(f"{directory}: its name is too long for sockets in it, by {excess} bytes")
    try:
        while True:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            # Never closed: the lock ends with the process, even if that is killed.
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            found = os.fstat(fd)
            if not _is_private(found):
                os.close(fd)
                raise EndpointError(_not_private(directory))
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise EndpointError(f"{directory}: another engine runs in it") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(found, directory.stat()):
                    return
            os.close(fd)  # its engine has just ended and removed it
    except OSError as error:
        raise EndpointError(f"{directory}: no sockets there: {error.strerror}") from None


def check_private(directory: Path) -> None:
    """Raise EndpointError if another user may have created the sockets in this directory."""
    try:
        found = directory.lstat()
    except OSError as error:
        raise EndpointError(f"{directory}: {error.strerror}") from None
    if not _is_private(found):
        raise EndpointError(_not_private(directory))


def _is_private(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _not_private(directory: Path) -> str:
    return f"{directory}: not a directory that is only this user's (mode 0700)"


def remove(directory: Path) -> None:
    """Remove the sockets and the directory."""
    with contextlib.suppress(OSError):
        for name in (SOCKET, HEARTBEAT):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def _excess(directory: Path) -> int:
    """Number of bytes by which the sockets' paths exceed the system's limit."""
    return max(0, max(len(os.fsencode(directory / name)) for name in (SOCKET, HEARTBEAT)) - zmq.IPC_PATH_MAX_LEN)
