"""Writes a report: whole or not at all, through no link, with the mode that the file had."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

# /dev/stdout is a link to a file where the shell has redirected it
_DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))


def why_not_writable(path: Path) -> str | None:
    """The reason why a file cannot be written, as the system words it; None when it can be."""
    try:
        reason = _why_not(path)
    except OSError as error:
        reason = error.errno
    return None if reason is None else os.strerror(reason)


def _why_not(path: Path) -> int | None:
    if path.is_dir():
        return errno.EISDIR
    if not path.parent.is_dir():
        return errno.ENOENT
    if path.exists() and not os.access(path, os.W_OK):
        return errno.EACCES
    if not is_stream(path):
        if not os.access(path.parent, os.W_OK):
            return errno.EACCES
        # trying says more than asking: root may write everywhere, but not on a read-only disk
        beside = _beside(path)
        beside.touch(exist_ok=False)
        beside.unlink()
    return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file; a reader meanwhile sees the old one or the new one.

    A new file is made beside it and takes its place. So a link in this place is replaced, not
    followed: in a shared folder somebody else may have put it there. The mode of an existing file
    stays. A new file has the mode of any other. A device or a pipe, such as /dev/stdout, is written
    to.

    Raises:
        OSError: the file cannot be written. An existing one is as it was.
    """
    if is_stream(path):
        with open(os.open(path, os.O_WRONLY), "wb") as stream:
            stream.write(data)
        return
    beside = _beside(path)
    # "x" never opens what is there already, links included
    with open(beside, "xb") as file:
        try:
            mode = _mode(path)
            if mode is not None:
                os.chmod(file.fileno() if os.chmod in os.supports_fd else beside, mode)
            file.write(data)
            file.close()  # Windows replaces no file by an open one
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")


def _mode(path: Path) -> int | None:
    """Permissions of the file in this place; None for no file, or a link."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode):
            return stat.S_IMODE(mode) & 0o777
    return None


def is_stream(path: Path) -> bool:
    """Is it something that is there to be written to, and not to be replaced?

    A pipe of somebody else's is not: opening it could last for ever.
    """
    if path.absolute().parent in _DEVICES:
        return True
    try:
        status = os.stat(path)
    except OSError:
        return False
    is_own_pipe = stat.S_ISFIFO(status.st_mode) and status.st_uid == os.geteuid()
    return stat.S_ISCHR(status.st_mode) or is_own_pipe
