"""The start of progressdb-kms.pyz: takes `cryptography` from the host, after a look at its version.

Kept in the syntax of old interpreters, so that they can say what they lack.
"""

import os
import sys

OLDEST_PYTHON = (3, 9)
OLDEST_CRYPTOGRAPHY = 38

GET_IT = (
    "apt install python3-cryptography, dnf install python3-cryptography, or take the bundle, "
    "progressdb-kms-ARCH.pyz, which carries it"
)


def main():
    trouble = python_trouble() or cryptography_trouble()
    if trouble:
        sys.stderr.write("progressdb-kms: %s\n" % trouble)
        return 1
    from progressdb_kms.cli import main as run

    return run()


def python_trouble():
    if sys.version_info < OLDEST_PYTHON:
        return "Python 3.9 or newer is needed, this is %d.%d (%s)" % (sys.version_info[:2] + (sys.executable,))
    return ""


def cryptography_trouble():
    """What is wrong with the host's package, or an empty text."""
    try:
        import cryptography
    except ImportError:
        return "%s has no package cryptography (%s)" % (sys.executable, GET_IT)
    version = cryptography.__version__
    if int(version.partition(".")[0]) < OLDEST_CRYPTOGRAPHY:
        place = os.path.dirname(cryptography.__file__)
        return "cryptography %d or newer is needed, %s has %s (%s)" % (OLDEST_CRYPTOGRAPHY, place, version, GET_IT)
    return ""


if __name__ == "__main__":
    sys.exit(main())
