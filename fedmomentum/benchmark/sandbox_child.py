"""Runs inside the sandbox: seals the process, then runs one program. Standard library only.

`sandbox` starts this file in separate namespaces. It reads a nonce and a program from standard
input, replaces the file system with a read-only one that has only Python's own libraries, sets
limits, forbids system calls, and runs the program. It writes `ready` before the program, and the
nonce after it if nothing was raised.
"""

import ctypes
import json
import os
import platform
import resource
import sys
from typing import Any

# mount(2)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MNT_DETACH = 2
# mount_setattr(2), from Linux 5.12, which has the same number on all architectures
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

# prctl(2), seccomp(2), capset(2)
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
SECCOMP_ALLOW, SECCOMP_ERRNO = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = 1, 38
CAPABILITY_VERSION_3 = 0x20080522
# Filter instructions: load a word, jump if equal, jump if at least, return.
BPF_LOAD, BPF_JUMP_EQUAL, BPF_JUMP_AT_LEAST, BPF_RETURN = 0x20, 0x15, 0x35, 0x06
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4
X32_CALLS = 0x40000000

# Machine -> its id in filters, and the numbers of forbidden system calls.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FORBIDDEN = {
    # name: (x86_64, aarch64); None if there is no such call
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory that is not covered by the limits of this process
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "msgget": (68, 186),
}
# Reported as missing, so that glibc falls back to clone, which is forbidden.
CLONE3 = 435

LIBC = ctypes.CDLL(None, use_errno=True)


class FilterStep(ctypes.Structure):
    """`struct sock_filter`."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class Filter(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(FilterStep))]


def call(name: str, *arguments: Any) -> None:
    """Call a C library function; raise OSError if it fails."""
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system."""
    texts = [text.encode() for text in (source, target, kind)]
    call("mount", *texts, ctypes.c_ulong(flags), data.encode())


def make_read_only(path: str) -> None:
    """Make a mount and all mounts below it read-only, without devices."""
    flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    # attributes to set, to clear, propagation, namespace
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    where = path.encode()
    call("syscall", MOUNT_SETATTR, AT_FDCWD, where, AT_RECURSIVE, attributes, size)


def replace_file_system(root: str) -> None:
    """Replace the file system with only Python's own libraries, read-only."""
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    # The standard library, and the system libraries that its extension modules load.
    libraries = {os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    for library in sorted({os.path.realpath(path) for path in libraries if os.path.isdir(path)}):
        target = root + library
        os.makedirs(target, exist_ok=True)
        mount(library, target, "", MS_BIND | MS_REC)
    # The new root replaces the old one, to which nothing refers anymore.
    os.mkdir(f"{root}/old")
    os.chdir(root)
    number = 155 if platform.machine() == "x86_64" else 41
    call("syscall", number, b".", b"old")
    os.chdir("/")
    call("umount2", b"/old", MNT_DETACH)
    os.rmdir("/old")
    make_read_only("/")


def set_limits(limits: dict[str, int]) -> None:
    """Limit memory, time and files irrevocably."""
    hard_limits = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, limit in hard_limits.items():
        resource.setrlimit(kind, (limit, limit))


def drop_capabilities() -> None:
    """Give up root's privileges within these namespaces."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)


def forbid_system_calls(machine: str) -> None:
    """Make the kernel refuse new processes, sockets and calls that reach out of the sandbox."""
    column = list(ARCHITECTURES).index(machine)
    refuse = SECCOMP_ERRNO | EPERM
    steps = [
        # calls of other architectures have different numbers
        (BPF_LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (BPF_JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (BPF_RETURN, 0, 0, refuse),
        (BPF_LOAD, 0, 0, NUMBER_OFFSET),
        (BPF_JUMP_AT_LEAST, 0, 1, X32_CALLS),
        (BPF_RETURN, 0, 0, refuse),
        (BPF_JUMP_EQUAL, 0, 1, CLONE3),
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | ENOSYS),
    ]
    for numbers in FORBIDDEN.values():
        number = numbers[column]
        if number is not None:
            steps += [(BPF_JUMP_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, refuse)]
    steps.append((BPF_RETURN, 0, 0, SECCOMP_ALLOW))
    array = (FilterStep * len(steps))(*[FilterStep(*step) for step in steps])
    program = Filter(len(steps), array)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def main() -> None:
    """Seal the process and run the program from standard input."""
    request = json.loads(sys.stdin.buffer.read())
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {machine}; there is one for x86_64 and aarch64")
    verdict = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    # Errors up to here and while sealing are the sandbox's own and go to standard error.
    replace_file_system(request["root"])
    drop_capabilities()
    set_limits(request["limits"])
    forbid_system_calls(machine)
    os.write(verdict, b"ready\n")
    os.dup2(null, 2)
    os.close(null)
    # Python itself sets a locale if the environment is empty.
    os.environ.clear()
    # From here on, everything that happens is the program's responsibility.
    passed = False
    try:
        exec(compile(request["program"], "program.py", "exec"), {"__name__": "__main__"})
        passed = True
    except BaseException:
        pass
    if passed:
        os.write(verdict, request["nonce"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
