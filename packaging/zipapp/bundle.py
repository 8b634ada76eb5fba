"""The start of progressdb-kms-ARCH.pyz: `cryptography` and its native parts come out of this file.

The dynamic loader of the system wants a file with a name, and a zip has none to give. So a native module is
copied into a memfd, an anonymous file in memory, sealed against changes, and loaded by its name under
/proc/self/fd. Nothing is unpacked to a path: the file system may be read-only and /tmp noexec.

Which file fits is decided as for any folder, by the suffixes that this interpreter takes: `.abi3.so`, or
`.cpython-312-x86_64-linux-gnu.so`.

Kept in the syntax of old interpreters, so that they can say what they lack.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import spec_from_file_location

OLDEST_PYTHON = (3, 9)

MFD_NOEXEC_SEAL = 8  # Linux 6.3: no program can be started from it; mapping its code stays possible


def main():
    trouble = python_trouble()
    if not trouble:
        finder = NativeFinder(__loader__)
        trouble = finder.trouble()
    if trouble:
        sys.stderr.write("progressdb-kms: %s\n" % trouble)
        return 1
    # Nothing but this file and the standard library: what the host has installed is not asked.
    sys.path[:] = [path for path in sys.path if not path.endswith(("site-packages", "dist-packages"))]
    sys.meta_path.insert(0, finder)
    from progressdb_kms.cli import main as run

    return run()


def python_trouble():
    if sys.version_info < OLDEST_PYTHON:
        return "Python 3.9 or newer is needed, this is %d.%d (%s)" % (sys.version_info[:2] + (sys.executable,))
    return ""


class NativeFinder:
    """Finds the native modules of the zip that `loader` (a zipimporter) reads. On sys.meta_path."""

    MODULES = ("_cffi_backend", "cryptography.hazmat.bindings._rust")

    def __init__(self, loader):
        self._loader = loader

    def trouble(self):
        """Why this interpreter can't use what is carried, or an empty text. Looks at the one that is bound to
        an interpreter's version."""
        if not hasattr(__import__("os"), "memfd_create"):
            return "this bundle needs Linux, and a Python that knows memfd_create"
        if self._read(self.MODULES[0])[0]:
            return ""
        return "this bundle has nothing for %s, which takes %s (it has %s)" % (
            sys.executable,
            " or ".join(EXTENSION_SUFFIXES),
            ", ".join(self._carried()),
        )

    def _carried(self):
        import zipfile

        with zipfile.ZipFile(self._loader.archive) as archive:
            return sorted(name for name in archive.namelist() if name.startswith(self.MODULES[0]))

    def _read(self, module):
        """(name, content) of the file that fits this interpreter, or two times None."""
        for suffix in EXTENSION_SUFFIXES:
            name = module.replace(".", "/") + suffix
            try:
                return name, self._loader.get_data(self._loader.archive + "/" + name)
            except OSError:
                continue
        return None, None

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.MODULES:
            return None
        name, data = self._read(fullname)
        if name is None:
            return None
        try:
            place = in_memory(name, data)
        except OSError as error:
            raise ImportError("%s can't be put into memory: %s (is /proc mounted?)" % (name, error)) from None
        return spec_from_file_location(fullname, place, loader=ExtensionFileLoader(fullname, place))


def in_memory(name, data):
    """A path under /proc to an anonymous, sealed file with `data`. It stays open, since the dynamic loader takes
    one name for one file: a number that is used again would give the first module a second time."""
    import fcntl
    import os

    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create(name, flags)
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    # F_ADD_SEALS; SEAL, SHRINK, GROW, WRITE: nobody changes the code that is mapped. Python 3.9 has no names.
    fcntl.fcntl(fd, 1033, 1 | 2 | 4 | 8)
    place = "/proc/self/fd/%d" % fd
    os.stat(place)
    return place


if __name__ == "__main__":
    sys.exit(main())
