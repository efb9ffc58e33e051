"""seccomp: the system calls that the model's code may make; every other one fails.

A list of what is allowed, not of what is dangerous. Left out are all sockets but anonymous pairs, namespaces, mounts,
keys, io_uring, bpf, ptrace and its kin, System V and POSIX queues and shared memory, memfd (memory that no process is
charged for), notification of file changes, clocks, modules, and whatever the kernel learns in years to come.

Sources  Linux, Documentation/userspace-api/seccomp_filter.rst; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Mapping, Sequence

_PLAIN = """
    access alarm arch_prctl brk capget chdir clock_getres clock_gettime clock_nanosleep close close_range
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2
    epoll_wait eventfd eventfd2 execve exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir
    fdatasync fgetxattr flistxattr flock fork fstat fstatfs fsync ftruncate futex futex_waitv get_mempolicy
    get_robust_list getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername
    getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getxattr lgetxattr link linkat listxattr llistxattr
    lseek lstat madvise membarrier mkdir mkdirat mmap mprotect mremap msync munmap nanosleep
    newfstatat open openat openat2 pause pipe pipe2 poll ppoll pread64 preadv preadv2 pselect6 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv recvfrom rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_yield select sendfile set_robust_list
    set_tid_address setitimer setpgid setsid shutdown sigaltstack signalfd signalfd4 stat statfs
    statx symlink symlinkat sysinfo tgkill time timer_create timer_delete timer_getoverrun
    timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask
    uname unlink unlinkat vfork wait4 waitid write writev
"""
# What it takes to compute, and to read files: nothing is made, changed, sent or started. For a parser.
_COMPUTING = """
    access brk clock_getres clock_gettime clock_nanosleep close exit exit_group faccessat faccessat2 fstat
    fstatfs futex getcpu getcwd getdents getdents64 getegid geteuid getgid getpid getppid getrandom getrlimit getrusage
    gettid gettimeofday getuid lseek lstat madvise membarrier mprotect mremap munmap nanosleep newfstatat poll ppoll
    pread64 preadv pselect6 read readlink readlinkat readv restart_syscall rseq rt_sigaction rt_sigprocmask rt_sigreturn
    sched_getaffinity sched_yield select set_robust_list sigaltstack stat statfs statx sysinfo time times uname write
    writev
"""

_NUMBERS = {
    "x86_64": """
    access=21 alarm=37 arch_prctl=158 brk=12 capget=125 chdir=80 chmod=90 chown=92 clock_getres=229
    clock_gettime=228 clock_nanosleep=230 clone3=435 clone=56 close=3 close_range=436 copy_file_range=326
    creat=85 dup2=33 dup3=292 dup=32 epoll_create1=291 epoll_create=213 epoll_ctl=233 epoll_pwait2=441
    epoll_pwait=281 epoll_wait=232 eventfd2=290 eventfd=284 execve=59 exit=60 exit_group=231 faccessat2=439
    faccessat=269 fadvise64=221 fallocate=285 fchdir=81 fchmod=91 fchmodat2=452 fchmodat=268 fchown=93
    fchownat=260 fcntl=72 fdatasync=75 fgetxattr=193 flistxattr=196 flock=73 fork=57 fremovexattr=199
    fsetxattr=190 fstat=5 fstatfs=138 fsync=74 ftruncate=77 futex=202 futex_waitv=449 futimesat=261
    get_mempolicy=239 get_robust_list=274 getcpu=309 getcwd=79 getdents64=217 getdents=78 getegid=108
    geteuid=107 getgid=104 getgroups=115 getitimer=36 getpeername=52 getpgid=121 getpgrp=111 getpid=39
    getppid=110 getpriority=140 getrandom=318 getresgid=120 getresuid=118 getrlimit=97 getrusage=98 getsid=124
    getsockname=51 getsockopt=55 gettid=186 gettimeofday=96 getuid=102 getxattr=191 io_uring_setup=425
    ioctl=16 kill=62 lchown=94 lgetxattr=192 link=86 linkat=265 listxattr=194 llistxattr=195 lremovexattr=198
    lseek=8 lsetxattr=189 lstat=6 madvise=28 membarrier=324 memfd_create=319 mkdir=83 mkdirat=258
    mknod=133 mknodat=259 mmap=9 mprotect=10 mremap=25 msync=26 munmap=11 nanosleep=35 newfstatat=262 open=2
    openat2=437 openat=257 pause=34 pidfd_open=434 pipe2=293 pipe=22 poll=7 ppoll=271 prctl=157 pread64=17
    preadv2=327 preadv=295 prlimit64=302 pselect6=270 pwrite64=18 pwritev2=328 pwritev=296 read=0
    readahead=187 readlink=89 readlinkat=267 readv=19 recvfrom=45 removexattr=197 rename=82 renameat2=316
    renameat=264 restart_syscall=219 rmdir=84 rseq=334 rt_sigaction=13 rt_sigpending=127 rt_sigprocmask=14
    rt_sigreturn=15 rt_sigsuspend=130 rt_sigtimedwait=128 sched_get_priority_max=146
    sched_get_priority_min=147 sched_getaffinity=204 sched_getattr=315 sched_getparam=143
    sched_getscheduler=145 sched_rr_get_interval=148 sched_setaffinity=203 sched_yield=24 select=23
    sendfile=40 sendto=44 set_robust_list=273 set_tid_address=218 setitimer=38 setpgid=109 setpriority=141
    setsid=112 setxattr=188 shutdown=48 sigaltstack=131 signalfd4=289 signalfd=282 socket=41
    socketpair=53 stat=4 statfs=137 statx=332 symlink=88 symlinkat=266 sync=162 syncfs=306
    sysinfo=99 tgkill=234 time=201 timer_create=222 timer_delete=226 timer_getoverrun=225 timer_gettime=224
    timer_settime=223 timerfd_create=283 timerfd_gettime=287 timerfd_settime=286 times=100 tkill=200
    truncate=76 umask=95 uname=63 unlink=87 unlinkat=263 utime=132 utimensat=280 utimes=235 vfork=58 wait4=61
    waitid=247 write=1 writev=20
    """,
    "aarch64": """
    brk=214 capget=90 chdir=49 clock_getres=114 clock_gettime=113 clock_nanosleep=115 clone3=435 clone=220
    close=57 close_range=436 copy_file_range=285 dup3=24 dup=23 epoll_create1=20 epoll_ctl=21 epoll_pwait2=441
    epoll_pwait=22 eventfd2=19 execve=221 exit=93 exit_group=94 faccessat2=439 faccessat=48 fadvise64=223
    fallocate=47 fchdir=50 fchmod=52 fchmodat2=452 fchmodat=53 fchown=55 fchownat=54 fcntl=25 fdatasync=83
    fgetxattr=10 flistxattr=13 flock=32 fremovexattr=16 fsetxattr=7 fstat=80 fstatfs=44 fsync=82 ftruncate=46
    futex=98 futex_waitv=449 get_mempolicy=236 get_robust_list=100 getcpu=168 getcwd=17 getdents64=61
    getegid=177 geteuid=175 getgid=176 getgroups=158 getitimer=102 getpeername=205 getpgid=155 getpid=172
    getppid=173 getpriority=141 getrandom=278 getresgid=150 getresuid=148 getrlimit=163 getrusage=165
    getsid=156 getsockname=204 getsockopt=209 gettid=178 gettimeofday=169 getuid=174 getxattr=8
    io_uring_setup=425 ioctl=29 kill=129 lgetxattr=9 linkat=37 listxattr=11 llistxattr=12 lremovexattr=15
    lseek=62 lsetxattr=6 madvise=233 membarrier=283 memfd_create=279 mkdirat=34 mknodat=33
    mmap=222 mprotect=226 mremap=216 msync=227 munmap=215 nanosleep=101 newfstatat=79 openat2=437 openat=56
    pidfd_open=434 pipe2=59 ppoll=73 prctl=167 pread64=67 preadv2=286 preadv=69 prlimit64=261 pselect6=72
    pwrite64=68 pwritev2=287 pwritev=70 read=63 readahead=213 readlinkat=78 readv=65 recvfrom=207
    removexattr=14 renameat2=276 renameat=38 restart_syscall=128 rseq=293 rt_sigaction=134 rt_sigpending=136
    rt_sigprocmask=135 rt_sigreturn=139 rt_sigsuspend=133 rt_sigtimedwait=137 sched_get_priority_max=125
    sched_get_priority_min=126 sched_getaffinity=123 sched_getattr=275 sched_getparam=121
    sched_getscheduler=120 sched_rr_get_interval=127 sched_setaffinity=122 sched_yield=124 sendfile=71
    sendto=206 set_robust_list=99 set_tid_address=96 setitimer=103 setpgid=154 setpriority=140
    setsid=157 setxattr=5 shutdown=210 sigaltstack=132 signalfd4=74 socket=198 socketpair=199 statfs=43
    statx=291 symlinkat=36 sync=81 syncfs=267 sysinfo=179 tgkill=131 timer_create=107
    timer_delete=111 timer_getoverrun=109 timer_gettime=108 timer_settime=110 timerfd_create=85
    timerfd_gettime=87 timerfd_settime=86 times=153 tkill=130 truncate=45 umask=166 uname=160 unlinkat=35
    utimensat=88 wait4=260 waitid=95 write=64 writev=66
    """,
}

# AUDIT_ARCH_*, and the syscall number of seccomp itself.
_MACHINES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}

_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_LOAD, _JUMP, _JEQ, _JGT, _JGE, _JSET, _AND, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06

# CLONE_NEW*, CLONE_PTRACE, CLONE_PIDFD.
_CLONE_REFUSED = 0x7E020000 | 0x2000 | 0x1000
# FIONREAD, FIONBIO, FIOCLEX, FIONCLEX, TCGETS, TIOCGWINSZ, TIOCGPGRP: questions, and flags of one's own descriptors.
_IOCTLS = (0x541B, 0x5421, 0x5451, 0x5450, 0x5401, 0x5413, 0x540F)
# PDEATHSIG, GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, CAPBSET_READ, TIMERSLACK, NO_NEW_PRIVS, THP, SET_VMA.
_PRCTLS = (1, 2, 3, 15, 16, 21, 23, 29, 30, 38, 39, 41, 42, 0x53564D41)
# Duplicates, flags, locks, and questions; no owners or signals, which reach other processes.
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 36, 37, 38, 1025, 1030, 1032, 1034)

Program = list[tuple[int, int, int, int]]


def is_supported() -> bool:
    return platform.machine() in _NUMBERS


def install(hide_metadata: bool) -> None:
    """Filter this process and its children for ever. ``hide_metadata`` lets changes of modes and times do nothing:
    where the host's file tree is in sight, nothing else keeps a process from those of its own user's files.

    Raises OSError.
    """
    _install(build(platform.machine(), hide_metadata))


def install_computing() -> None:
    """Leave this process and its threads nothing but to compute, and to read files, for ever. Raises OSError."""
    _install(build_computing(platform.machine()))


def _install(program: Program) -> None:
    packed = b"".join(struct.pack("HBBI", *one) for one in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    argument = Filter(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_NO_NEW_PRIVS; then SECCOMP_SET_MODE_FILTER.
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(_MACHINES[platform.machine()][1], 1, 0, ctypes.byref(argument)):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def build(machine: str, hide_metadata: bool) -> Program:
    """The filter as instructions: code, jump if true, jump if false, operand. Raises OSError for an unknown machine."""
    return _build(machine, _PLAIN.split(), _special(hide_metadata))


def build_computing(machine: str) -> Program:
    """The same for a process that only computes."""
    special = _special(hide_metadata=False)
    # Refused: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and O_TMPFILE without the flag that differs from machine to machine.
    writes = 0o3 | 0o100 | 0o1000 | 0o20000000
    kept = {name: special[name] for name in ("ioctl", "fcntl", "prlimit64", "mmap", "clone3", "memfd_create")}
    for index, name in ((1, "open"), (2, "openat")):
        kept[name] = [_argument(index), (_JSET, 0, 1, writes), *_fail(errno.EPERM), *_give(_ALLOW)]
    return _build(machine, _COMPUTING.split(), kept)


def _build(machine: str, plain: Sequence[str], special: Mapping[str, Program]) -> Program:
    if machine not in _NUMBERS:
        raise OSError(f"the filter of system calls is not written for {machine}; expected x86_64 or aarch64")
    numbers = {name: int(number) for name, _, number in (pair.partition("=") for pair in _NUMBERS[machine].split())}
    actions: dict[int, Program] = {numbers[name]: _give(_ALLOW) for name in plain if name in numbers}
    actions |= {numbers[name]: action for name, action in special.items() if name in numbers}
    ranges: list[tuple[int, int, Program]] = []
    for number in sorted(actions):
        if ranges and ranges[-1][1] == number - 1 and ranges[-1][2] == actions[number]:
            ranges[-1] = (ranges[-1][0], number, actions[number])
        else:
            ranges.append((number, number, actions[number]))
    head = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, _MACHINES[machine][0]), *_give(_KILL_PROCESS), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":
        # The numbers of x32, a second set of entries into the same calls.
        head += [(_JGE, 0, 1, 0x40000000), *_fail(errno.ENOSYS)]
    return head + _search(ranges)


def _special(hide_metadata: bool) -> dict[str, Program]:
    """What is more than a yes."""
    made: dict[str, Program] = {
        "clone": [_argument(0), (_JSET, 0, 1, _CLONE_REFUSED), *_fail(errno.EPERM), *_give(_ALLOW)],
        # An anonymous stream pair reaches nobody else; asyncio and multiprocessing need it.
        "socketpair": [
            *(_argument(0), (_JEQ, 1, 0, 1), *_fail(errno.EAFNOSUPPORT)),
            *(_argument(1), (_AND, 0, 0, 0xF), (_JEQ, 1, 0, 1), *_fail(errno.EAFNOSUPPORT), *_give(_ALLOW)),
        ],
        # No address: to the peer of the pair alone.
        "sendto": [
            *(_argument(4), (_JEQ, 1, 0, 0), *_fail(errno.EPERM)),
            *((_LOAD, 0, 0, 16 + 8 * 4 + 4), (_JEQ, 1, 0, 0), *_fail(errno.EPERM), *_give(_ALLOW)),
        ],
        # kill(-1) reaches everything of this user.
        "kill": [_argument(0), (_JEQ, 0, 1, 0xFFFFFFFF), *_fail(errno.EPERM), *_give(_ALLOW)],
        "ioctl": _one_of(1, _IOCTLS, errno.ENOTTY),
        "prctl": _one_of(0, _PRCTLS, errno.EPERM),
        "fcntl": _one_of(1, _FCNTLS, errno.EPERM),
        # Questions about oneself: whoever lowers RLIMIT_CORE from 1 to 0 lets a crash start the host's core handler.
        "prlimit64": [
            *(_argument(0), (_JEQ, 1, 0, 0), *_fail(errno.EPERM)),
            *(_argument(2), (_JEQ, 1, 0, 0), *_fail(errno.EPERM)),
            *((_LOAD, 0, 0, 16 + 8 * 2 + 4), (_JEQ, 1, 0, 0), *_fail(errno.EPERM), *_give(_ALLOW)),
        ],
        # MAP_HUGETLB: pages of the host's pool, which no process is charged for.
        "mmap": [_argument(3), (_JSET, 0, 1, 0x40000), *_fail(errno.ENOMEM), *_give(_ALLOW)],
        "setpriority": [
            *(_argument(0), (_JEQ, 1, 0, 0), *_fail(errno.EPERM)),
            *(_argument(1), (_JEQ, 1, 0, 0), *_fail(errno.EPERM), *_give(_ALLOW)),
        ],
        "mknod": [_argument(1), (_AND, 0, 0, 0xF000), (_JEQ, 1, 0, 0x1000), *_fail(errno.EPERM), *_give(_ALLOW)],
        "mknodat": [_argument(2), (_AND, 0, 0, 0xF000), (_JEQ, 1, 0, 0x1000), *_fail(errno.EPERM), *_give(_ALLOW)],
        "socket": _fail(errno.EACCES),
    }
    # Libraries have another way where these are not there; clone3 hides its flags in memory, where no filter can look.
    made |= {name: _fail(errno.ENOSYS) for name in ("clone3", "memfd_create", "pidfd_open", "io_uring_setup")}
    # Nothing to write out concerns the host's disks.
    made |= {name: _fail(0) for name in ("sync", "syncfs")}
    modes = ("chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "futimesat", "utimensat")
    made |= {name: _fail(0) if hide_metadata else _give(_ALLOW) for name in modes}
    return made


def _search(ranges: Sequence[tuple[int, int, Program]]) -> Program:
    """A binary search for the number in the accumulator; blocks are laid after each other, so that jumps stay short."""
    if len(ranges) > 1:
        middle = len(ranges) // 2
        left, right = _search(ranges[:middle]), _search(ranges[middle:])
        return [(_JGE, 0, 1, ranges[middle][0]), (_JUMP, 0, 0, len(left)), *left, *right]
    low, high, action = ranges[0]
    return [(_JGT, len(action) + 1, 0, high), (_JGE, 0, len(action), low), *action, *_fail(errno.EPERM)]


def _one_of(index: int, values: Sequence[int], number: int) -> Program:
    # Each test that holds jumps over the rest of them and over the refusal.
    tests = [(_JEQ, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [_argument(index), *tests, *_fail(number), *_give(_ALLOW)]


def _argument(index: int) -> tuple[int, int, int, int]:
    """Load the low half, which is all that the kernel reads of an int."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _fail(number: int) -> Program:
    return [(_RETURN, 0, 0, 0x00050000 | number)]


def _give(value: int) -> Program:
    return [(_RETURN, 0, 0, value)]
