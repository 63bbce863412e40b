"""What the kernel can forbid a process that runs code nobody has read: two filters of Linux, by their system calls.

In: the process itself, just forked. Out: no sockets, no new processes, no signals to others (seccomp); no file
changed outside one folder (Landlock, kernel 5.13). Both need no privileges, are inherited, and can't be taken off
again. Where a kernel has neither, nothing happens and the return value says so. Reading files stays allowed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _NO_SUCH_CALL = 0x7FFF0000, 0x00050001, 0x00050026  # errno EPERM and ENOSYS in the low bits
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_CLONE_THREAD = 0x10000
_CLONE3 = 435  # its flags lie behind a pointer; told that it is missing, the C library falls back on clone
_X32_CALLS = 0x40000000
# (AUDIT_ARCH, clone, tgkill, calls refused): socket; fork, vfork; kill, tkill; ptrace, process_vm_writev. Then those
# with the same number everywhere: pidfd_send_signal, io_uring_setup (which can open sockets).
_EVERYWHERE = (424, 425)
_MACHINES = {
    "x86_64": (0xC000003E, 56, 234, (41, 57, 58, 62, 200, 101, 311)),
    "aarch64": (0xC00000B7, 220, 131, (198, 129, 130, 117, 271)),
}
# Landlock's rights: write a file, remove and make entries of every kind; TRUNCATE since its third version.
_WRITE_FILE = 1 << 1
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_TRUNCATE = 1 << 14
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_VERSION = 1


def confine(folder: str) -> list[str]:
    """Confine this process and its threads, for good. Returns what took hold: "seccomp", "landlock"."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return []
    held = ["landlock"] if _landlock(libc, folder) else []
    return [*held, "seccomp"] if _seccomp(libc) else held


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _landlock(libc: ctypes.CDLL, folder: str) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    if version < 1:
        return False
    rights = _CHANGES | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=Q", rights)
    rules = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    try:
        for path, allowed in ((folder, rights), (os.devnull, rights & (_WRITE_FILE | _TRUNCATE))):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, opened)
            refused = libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
            os.close(opened)
            if refused:
                return False
        return libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> bool:
    if platform.machine() not in _MACHINES:
        return False
    code = _filter(*_MACHINES[platform.machine()])
    program = _Program(len(code) // 8, code)
    return libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0


def _filter(architecture: int, clone: int, tgkill: int, refused: tuple[int, ...]) -> bytes:
    """Instructions (code, jump if true, jump if false, operand) of the kernel's packet filter."""
    refuse, allow = (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_EQUAL, 1, 0, architecture),
        refuse,
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, 0, 1, _X32_CALLS),
        refuse,
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
    ]
    for number in (*refused, *_EVERYWHERE):
        lines += [(_JUMP_EQUAL, 0, 1, number), refuse]
    # Threads may be made, and the process may signal itself (abort does).
    lines += [(_JUMP_EQUAL, 0, 4, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD)]
    lines += [refuse, allow]
    lines += [(_JUMP_EQUAL, 0, 4, tgkill), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_JUMP_EQUAL, 1, 0, os.getpid())]
    lines += [refuse, allow, allow]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
