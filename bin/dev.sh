#!/bin/sh
# Serve from the tree, for development: one command from a fresh clone to a running daemon.
set -eu

usage() {
    cat <<'END'
usage: bin/dev.sh [OPTION…]

Makes a virtual environment in .venv, installs the package, makes a development key once, and serves in the
foreground until Ctrl-C. What it makes is kept under .kms/ in the tree; the key is never made anew over data
that needs it.

  --no-build        take .venv as it is: nothing is installed
  --kms-bin PATH    run this progressdb-kms; nothing is installed
  --socket PATH     where to listen (default .kms/kms.sock)
  --data-dir PATH   where the store is (default .kms/data)
  --mkfile PATH     the master key file to use (default .kms/master.key, made at the first start)
  --help            this text
END
}

fail() {
    printf 'dev.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

build=yes bin='' socket='' data='' mkfile=''
while [ $# -gt 0 ]; do
    name=$1
    case $name in
    --socket=* | --data-dir=* | --mkfile=* | --kms-bin=*)
        value=${name#*=} name=${name%%=*}
        ;;
    --socket | --data-dir | --mkfile | --kms-bin)
        [ $# -ge 2 ] || fail "$name needs a path (see bin/dev.sh --help)" 2
        value=$2
        shift
        ;;
    --no-build) build=no value=- ;;
    --help | -h)
        usage
        exit 0
        ;;
    *) fail "unknown option $name (see bin/dev.sh --help)" 2 ;;
    esac
    [ -n "$value" ] || fail "$name needs a path (see bin/dev.sh --help)" 2
    case $name in
    --socket) socket=$value ;;
    --data-dir) data=$value ;;
    --mkfile) mkfile=$value ;;
    --kms-bin) bin=$value build=no ;;
    esac
    shift
done

absolute() {
    case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$(pwd)" "$1" ;;
    esac
}

# One pair of single quotes, for the shell: what is printed can be pasted.
quoted() {
    printf "'%s'\n" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
kms=$root/.kms
venv=$root/.venv

# ---- the program

if [ "$build" = yes ]; then
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "there is no $python: install Python 3.9 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' || fail "$python is older than Python 3.9"
    if [ ! -x "$venv/bin/pip" ]; then
        echo "dev.sh: making $venv" >&2
        "$python" "$root/bin/venv" "$venv" || exit 1
    fi
    # Editable: changes of the tree hold at the next start, so only new dependencies need an installation.
    if [ ! -x "$venv/bin/progressdb-kms" ] || [ -n "$(find "$root/setup.cfg" -newer "$venv/bin/progressdb-kms")" ]; then
        echo "dev.sh: installing the package" >&2
        # -qq: errors alone; what pip and setuptools find old-fashioned is nothing that the caller could mend.
        "$venv/bin/pip" install -qq --disable-pip-version-check --no-input --use-pep517 --editable "$root" ||
            fail "pip failed, see above; is PyPI within reach?"
        touch "$venv/bin/progressdb-kms"
    fi
fi
[ -n "$bin" ] || bin=$root/bin/progressdb-kms
[ "$build" = no ] || bin=$venv/bin/progressdb-kms
case $bin in */*) bin=$(absolute "$bin") ;; esac
command -v "$bin" >/dev/null || fail "$bin can't be run"

# ---- the folder

umask 077
mkdir -p "$kms"
chmod 0700 "$kms"
data=$(absolute "${data:-$kms/data}")
if [ -z "$socket" ]; then
    socket=$kms/kms.sock
    # A socket's path has at most 107 bytes; a deep clone goes past that.
    [ "$(printf %s "$socket" | wc -c)" -le 107 ] || socket=${XDG_RUNTIME_DIR:-/tmp}/progressdb-kms-dev-$(id -u).sock
fi
socket=$(absolute "$socket")

# ---- the key

if [ -n "$mkfile" ]; then
    key=$(absolute "$mkfile")
    if [ ! -f "$key" ]; then
        [ -z "$(ls -A "$data" 2>/dev/null)" ] || fail "there is no key file $key, and $data has data that needs it"
        fail "there is no key file $key (make one: $bin genkey $key)"
    fi
else
    key=$kms/master.key
    if [ ! -e "$key" ]; then
        if [ -d "$data" ] && [ -n "$(ls -A "$data")" ]; then
            fail "$data has data, but its key $key is gone: put the key back, or remove $data to start anew"
        fi
        "$bin" genkey "$key" >/dev/null
        echo "dev.sh: made a development key, $key" >&2
    fi
fi
kek_id=$("$bin" kek-id "$key")

config=$kms/config.yaml
if [ ! -e "$config" ]; then
    printf '%s\n' '# Made by bin/dev.sh, yours to change. Paths are relative to this folder.' \
        'master_key_file: master.key' >"$config"
fi

# ---- what the table of calls in the README wants, for bash and zsh

{
    printf 'kms() { curl -sS --unix-socket %s -H "Content-Type: application/json" "http://unix$1" "${@:2}"; }\n' "$(quoted "$socket")"
    cat <<'END'
field() { sed "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/"; }
K=$(kms /create_dek_for_thread -d '{"thread_id":"t1"}' | field key_id)
N=$(kms /create_dek_for_thread -d '{"thread_id":"t1"}' | field key_id)
W=$(kms "/get_wrapped?key_id=$K" | field wrapped)
T=$(kms /encrypt -d '{"key_id":"'$K'","plaintext":"aGVsbG8="}' | field ciphertext)
hex() { head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
(
    umask 077
    printf '{"dek":"%s"}' "$(head -c 32 /dev/urandom | base64)" >dek.json
    printf '{"key_id":"%s","new_kek_hex":"%s"}' "$K" "$(hex)" >rewrap.json
    printf '{"new_kek_hex":"%s","dry_run":true}' "$(hex)" >rotate.json
)
END
} >"$kms/try.sh"

# ---- serve

echo "socket  $socket"
echo "kek_id  ${kek_id%% *}"
echo "try     curl --unix-socket $(quoted "$socket") -H 'Content-Type: application/json' -d '{\"thread_id\":\"t1\"}' http://unix/create_dek_for_thread"
echo "all     . $(quoted "$kms/try.sh")    # bash, zsh: then every example of the manual's page on the API works"
if [ -n "$mkfile" ]; then
    unset PROGRESSDB_KMS_MASTER_KEY_HEX
    PROGRESSDB_KMS_MASTER_KEY_FILE=$key exec "$bin" serve --socket "$socket" --data-dir "$data"
fi
exec "$bin" serve --socket "$socket" --data-dir "$data" --config "$config"
