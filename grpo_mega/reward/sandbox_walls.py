"""The walls around an untrusted program, as system calls: namespaces with a file system of their own,
Landlock, seccomp, and giving up privileges. Only the guard process of `sandbox.py` calls this.

ctypes and numbers, because Python 3.11 has none of these calls. The standard library only, and little of it:
this is imported for every program that is run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
CAP_CHOWN, CAP_SETGID, CAP_SETUID = 0, 6, 7
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

# Numbers shared by every architecture since Linux 5.1.
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446

# Of an architecture: how seccomp names it, pivot_root, prlimit64, and the calls denied where no namespace
# keeps the program from other processes and from the network: socket, kill, tkill, tgkill, rt_sigqueueinfo,
# rt_tgsigqueueinfo, ptrace, process_vm_readv, process_vm_writev, setsid, setpgid, unshare, open_by_handle_at.
# Without setsid and setpgid no process can leave the group that is killed at the end.
ARCHITECTURES = {
    "x86_64": (0xC000003E, 155, 302, (41, 62, 200, 234, 129, 297, 101, 310, 311, 112, 109, 272, 304)),
    "aarch64": (0xC00000B7, 41, 261, (198, 129, 130, 131, 138, 240, 117, 270, 271, 157, 154, 97, 265)),
}
DENIED_EVERYWHERE = (425, 424, 438)  # io_uring_setup (it opens sockets), pidfd_send_signal, pidfd_getfd
X32_CALLS = 0x40000000  # the second numbering of x86_64

DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int, extra: int = 0) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(extra), 0, 0), f"prctl {option}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _checked(
        _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None),
        f"mount {source} on {target}",
    )


def enter_namespaces(uid: int, gid: int) -> bool:
    """Own mounts, network, System V objects, host name, and processes (those forked from here on).

    Root does without a user namespace where it can: the program then gets a user of its own. Anybody else
    needs one, in which they stay who they are. Says whether it made one.
    """
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if uid == 0:
        with suppress(OSError):
            _checked(_libc.unshare(flags), "unshare")
            return False
    _checked(_libc.unshare(flags | CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        _write(f"/proc/self/{name}", text)
    with suppress(OSError):  # belongs to this user namespace: the program can make no further ones
        _write("/proc/sys/user/max_user_namespaces", "0")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def enter_own_root(base: str, readable: Sequence[str], hidden: Sequence[str], disk_bytes: int) -> None:
    """A file system in memory in place of the machine's: `readable` as it is, read-only, and nothing else of
    it.

    To be called by the first process of a new process namespace: /proc shows that namespace's.
    """
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    inodes = 16 + disk_bytes // 4096
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes={inodes},mode=755")
    for path in readable:
        _show(path, base)
    for path in hidden:
        _cover(base + path)
    os.makedirs(f"{base}/dev/shm", exist_ok=True)
    for name in DEVICES:
        _touch(f"{base}/dev/{name}")
        _mount(f"/dev/{name}", f"{base}/dev/{name}", None, MS_BIND)
    os.symlink("/proc/self/fd", f"{base}/dev/fd")
    for shared in ("/tmp", "/dev/shm"):
        os.makedirs(base + shared, exist_ok=True)
        os.chmod(base + shared, 0o1777)
    os.makedirs(f"{base}/proc", exist_ok=True)
    with suppress(OSError):  # some containers cover parts of /proc and then refuse a new one: it stays empty
        _mount("proc", f"{base}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(base)
    _, pivot_root, _, _ = ARCHITECTURES[os.uname().machine]
    _checked(_libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def _show(path: str, base: str) -> None:
    """The path of the old root at its place in the new one, read-only; a link as a link."""
    target = base + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return  # below one that is there already, or not on this machine
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        _touch(target)
    _mount(path, target, None, MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    arguments = (AT_FDCWD, os.fsencode(target), AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    if _libc.syscall(SYS_MOUNT_SETATTR, *arguments) == 0:
        return
    # Before Linux 5.12: the topmost mount only, and with the flags it must keep.
    kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 0x400 | 0x800)
    _mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def _cover(path: str) -> None:
    if os.path.isdir(path):
        _mount("none", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4096,mode=000")
    elif os.path.exists(path):
        _mount("/dev/null", path, None, MS_BIND)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))


# Landlock: what may be opened, by folder. Rights are bits; later kernels know more of them.
LANDLOCK_EXECUTE, LANDLOCK_WRITE_FILE, LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = 1, 2, 4, 8
LANDLOCK_TRUNCATE = 1 << 14
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
LANDLOCK_NEWEST = 5


def landlock_version() -> int:
    """0 where the kernel has none or does not let it be used."""
    asks_for_version = 1
    return max(0, _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), asks_for_version))


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """From here on this process reads `readable`, uses `writable` freely, and opens nothing else; nor does it
    look into processes that are not below it, or use TCP where the kernel is new enough."""
    version = landlock_version()
    rights = (1 << LANDLOCK_RIGHTS[min(version, LANDLOCK_NEWEST)]) - 1
    # File rights; from version 4 on bind and connect; from 6 on abstract sockets and signals.
    fields = (rights, *((3,) if version >= 4 else ()), *((3,) if version >= 6 else ()))
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    rules = _checked(
        _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock",
    )
    reading = LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_READ_DIR
    devices = [f"/dev/{name}" for name in DEVICES]
    for path, wanted in (
        *((path, reading) for path in readable),
        *((path, LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE) for path in devices),
        *((path, rights) for path in writable),
    ):
        _allow(rules, path, wanted & rights)
    _checked(_libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, rules, 0), "landlock")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE | LANDLOCK_TRUNCATE
    rule_for_path, rule = 1, struct.pack("=Qi", rights, folder)
    _checked(_libc.syscall(SYS_LANDLOCK_ADD_RULE, rules, rule_for_path, rule, 0), f"landlock rule for {path}")
    os.close(folder)


def restrict_calls() -> bool:
    """No network, no signal to anybody, no leaving of the process group. False where the kernel refuses."""
    if os.uname().machine not in ARCHITECTURES:
        return False
    audit, _, prlimit, denied = ARCHITECTURES[os.uname().machine]
    instructions = list(_filter(audit, prlimit, (*denied, *DENIED_EVERYWHERE)))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    return _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0) == 0


def _filter(audit: int, prlimit: int, denied: Sequence[int]) -> Iterable[tuple[int, int, int, int]]:
    """A seccomp filter: (code, jump if true, jump if false, constant); jumps count from the next
    instruction."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    number_at, architecture_at, first_argument_at = 0, 4, 16
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    remaining = len(denied) + 3  # from the first denied number to the refusal
    yield load, 0, 0, architecture_at
    yield equal, 0, remaining + 3, audit
    yield load, 0, 0, number_at
    yield at_least, remaining + 1, 0, X32_CALLS
    for place, number in enumerate(denied):
        yield equal, remaining - place, 0, number
    # The limits of another process are nobody's business; one's own (0) may be read and lowered.
    yield equal, 0, 2, prlimit
    yield load, 0, 0, first_argument_at
    yield equal, 0, 1, 0
    yield give, 0, 0, allow
    yield give, 0, 0, deny


def give_up_privileges(uid: int, gid: int) -> None:
    """No capability, now or through any program run later; another user and no groups where `uid` says so."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    with suppress(OSError):
        prctl(PR_CAP_AMBIENT, 4)  # clear all
    capability = 0
    with suppress(OSError):  # ends with the first number the kernel does not know, or for want of privilege
        while True:
            prctl(PR_CAPBSET_DROP, capability)
            capability += 1
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _checked(_libc.capset(header, nothing), "capset")
