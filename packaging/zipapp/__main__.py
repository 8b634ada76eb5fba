"""Start of the zipapp: checks the host, makes the bundle's native modules importable, runs the command line.

The interpreter can't load a native module from a zip, and the file system may be read-only, /tmp noexec. So
each goes from the archive into a memfd (anonymous memory with a descriptor) and is loaded by way of
/proc/self/fd. Nothing is ever unpacked to a path. The descriptors stay open: the loader tells libraries apart
by name, and a number that is used again would be taken for the library that is loaded already. They close at
execve, so the daemon's second start finds everything as the first did.

`bytecode/<cache tag>/` holds all modules compiled, for the Pythons that were at hand when this was built: a
start takes half the time. For others the source is compiled at each start: a zip has no place to keep it.

`native/index.json` (bundle only): {"machine": …, "modules": {name: {cache tag, or "*": path}}}.
"""

import fcntl
import json
import os
import platform
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import MAGIC_NUMBER, spec_from_file_location

LOWEST_PYTHON = (3, 9)
LOWEST_CRYPTOGRAPHY = 38
MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL = 2, 8
F_ADD_SEALS, EVERY_SEAL = 1033, 15
INDEX = "native/index.json"


class Refused(Exception):
    """The host can't run this archive; the text says what to do."""


class NativeLoader(ExtensionFileLoader):
    def create_module(self, spec):
        try:
            return super().create_module(spec)
        except ImportError as error:  # of the dynamic linker
            raise SystemExit(
                "progressdb-kms: %s of this archive can't be loaded: %s (glibc 2.28 or newer, and /proc, are needed)"
                % (spec.name, error)
            )


class NativeModules:
    """Finder (sys.meta_path) for native modules of this archive."""

    def __init__(self, archive, modules):
        self._archive = archive
        self._modules = modules
        self._open = []

    def find_spec(self, name, path=None, target=None):
        if name not in self._modules:
            return None
        place = self._modules[name].get(cache_tag()) or self._modules[name].get("*")
        file = "/proc/self/fd/%d" % self._memfd(name, self._archive.get_data(archive_path(self._archive, place)))
        return spec_from_file_location(name, file, loader=NativeLoader(name, file))

    def _memfd(self, name, data):
        """A host may demand NOEXEC_SEAL (Linux 6.3): it forbids execve of the memfd, not loading from it."""
        try:
            number = os.memfd_create(name, os.MFD_CLOEXEC | MFD_NOEXEC_SEAL)
        except OSError:
            number = os.memfd_create(name, os.MFD_CLOEXEC | MFD_ALLOW_SEALING)
        self._open.append(number)
        with memoryview(data) as rest:
            while rest:
                rest = rest[os.write(number, rest) :]
        fcntl.fcntl(number, F_ADD_SEALS, EVERY_SEAL)  # from here on nothing changes it
        return number


def cache_tag():
    """Of this Python. The build without a lock takes neither modules nor bytecode of the other."""
    return sys.implementation.cache_tag + ("t" if "free-threading" in sys.version else "")


def add_bytecode(archive):
    folder = os.path.join("bytecode", cache_tag())
    try:
        head = archive.get_data(archive_path(archive, folder + "/progressdb_kms/__init__.pyc"))
    except OSError:
        return
    if head.startswith(MAGIC_NUMBER):
        sys.path.insert(0, archive_path(archive, folder))


def archive_path(archive, name):
    return os.path.join(archive.archive, name)


def check_python():
    if sys.version_info < LOWEST_PYTHON:
        raise Refused("Python 3.9 or newer is needed, this is %d.%d" % sys.version_info[:2])


def add_native(archive):
    """In a bundle: make its native modules importable."""
    try:
        index = json.loads(archive.get_data(archive_path(archive, INDEX)))
    except OSError:
        return
    if platform.machine() != index["machine"]:
        raise Refused("this archive is for %s, the host is %s" % (index["machine"], platform.machine()))
    for tags in index["modules"].values():
        if cache_tag() not in tags and "*" not in tags:
            raise Refused(
                "this archive has native modules for %s, this is %s: use one of those, or the plain .pyz with the "
                "host's cryptography" % (", ".join(tags), cache_tag())
            )
    if not os.path.exists("/proc/self/fd"):
        raise Refused("/proc is not mounted: native modules are loaded by way of /proc/self/fd")
    sys.meta_path.insert(0, NativeModules(archive, index["modules"]))


def check_cryptography():
    """Only the package's head, which is quick: its native module is loaded when it is needed."""
    try:
        from cryptography import __version__
    except ImportError:
        raise Refused(
            "the host has no cryptography for this Python (apt install python3-cryptography, dnf install "
            "python3-cryptography, or take the bundle)"
        )
    if int(__version__.partition(".")[0]) < LOWEST_CRYPTOGRAPHY:
        raise Refused("cryptography %d or newer is needed, the host has %s" % (LOWEST_CRYPTOGRAPHY, __version__))


def prepare(words):
    """The daemon's second start (hardening), here already: what is loaded before it is loaded twice."""
    from progressdb_kms.__main__ import serve_flags

    if serve_flags(words) is None:
        from progressdb_kms.tools.commands import COMMANDS

        name = " ".join(words[: 2 if words[:1] == ["audit"] else 1])
        if not any(command.keys and command.name == name for command in COMMANDS):
            return
    from progressdb_kms.process.hardening import prepare as start_anew

    start_anew(words, os.environ)


def main():
    try:
        check_python()
        add_bytecode(__loader__)
        prepare(sys.argv[1:])
        add_native(__loader__)
        check_cryptography()
    except Refused as refused:
        sys.stderr.write("progressdb-kms: %s\n" % refused)
        return 1
    from progressdb_kms.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
