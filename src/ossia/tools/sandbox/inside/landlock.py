"""Landlock: a process gives up every file, TCP port, abstract socket and foreign process that it was not granted.

Source   Linux, Documentation/userspace-api/landlock.rst. Signals are scoped from ABI 6 (Linux 6.12) on, TCP from 4
         (6.7), truncation from 3 (6.2).
"""

from __future__ import annotations

import ctypes
import os
import stat

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# How many rights of files the ABI of this number knows.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_MAX_KNOWN_ABI = 6


class _Ruleset(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The newest ABI that both the kernel and this file know; 0 where there is none."""
    return max(0, min(_MAX_KNOWN_ABI, _libc.syscall(_CREATE_RULESET, None, 0, 1)))


def restrict(read: list[str], write: list[str], devices: list[str], max_abi: int = _MAX_KNOWN_ABI) -> int:
    """Confine this process and its children for ever; the ABI used.

    ``read`` are folders and files to read and run, ``write`` folders to do everything in but make devices and sockets,
    ``devices`` files to read and write. What does not exist is passed by. No TCP, no signal or abstract socket out.
    Raises OSError.
    """
    version = min(abi(), max_abi)
    if version < 1:
        raise OSError("this kernel has no Landlock, or it is not switched on")
    handled = (1 << _NUM_RIGHTS.get(version, 16)) - 1
    attributes = _Ruleset(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(_libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), size, 0))
    everything = handled & ~(_MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV)
    try:
        for paths, allowed in ((read, _READ), (write, everything), (devices, _READ_FILE | _WRITE_FILE)):
            for path in paths:
                _allow(ruleset, path, allowed & handled)
        # PR_SET_NO_NEW_PRIVS, without which nobody may confine himself.
        _check(_libc.prctl(38, 1, 0, 0, 0))
        _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, allowed: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            allowed &= _OF_FILES
        rule = _PathBeneath(allowed, fd)
        _check(_libc.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0))
    finally:
        os.close(fd)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
