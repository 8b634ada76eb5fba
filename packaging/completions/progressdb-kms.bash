# bash completion for progressdb-kms. Made by packaging/make-manual from the table of commands: change that.

# The words of COMP_WORDS as the shell sees them: it takes `--socket=x` apart, this puts it together.
_progressdb_kms() {
    local -a words=() options=()
    local at joined='' first='' second='' takes='' cur kind=''
    COMPREPLY=()
    for ((at = 1; at <= COMP_CWORD; at++)); do
        if [[ ${COMP_WORDS[at]} == = && ${#words[@]} -gt 0 ]]; then
            words[-1]+== joined=yes
        elif [[ $joined ]]; then
            words[-1]+=${COMP_WORDS[at]} joined=''
        else
            words+=("${COMP_WORDS[at]}")
        fi
    done
    cur=${words[-1]}
    for ((at = 0; at < ${#words[@]} - 1; at++)); do
        if [[ $takes ]]; then
            takes=''
        elif [[ ${words[at]} == -* ]]; then
            first=${first:-serve} # without a command it serves
            case ${words[at]} in
            --aad | --config | --data-dir | --days | --deks | --keep | --key | --key-id | --lines | --new-key-file | --older-than | --receipts | --seconds | --snapshot | --socket | --thread-id | -n) takes=${words[at]} ;;
            esac
        elif [[ ! $first ]]; then
            first=${words[at]}
        elif [[ ! $second ]]; then
            second=${words[at]}
        fi
    done
    if [[ $cur == --*=* ]]; then
        takes=${cur%%=*} cur=${cur#*=}
    fi
    case $takes in
    --config) kind=file ;;
    --data-dir) kind=folder ;;
    --new-key-file) kind=file ;;
    --receipts) kind=file ;;
    --snapshot) kind=folder ;;
    --socket) kind=file ;;
    esac
    if [[ ! $takes ]]; then
        case "$first $second" in
        ' ') kind='serve status create-dek list describe encrypt decrypt disable enable shred rewrap rotate-kek genkey kek-id audit verify backup restore export import backups doctor bench' options=(--socket --data-dir --config --help --version) ;;
        'audit ') kind='verify tail' options=(--help) ;;
        'backups ') kind='list prune' options=(--help) ;;
        'serve '*) options=(--socket --data-dir --config --help) ;;
        'status '*) options=(--socket --json --ready --help) ;;
        'create-dek '*) options=(--socket --thread-id --key-id --json --help) ;;
        'list '*) options=(--socket --thread-id --json --help) ;;
        'describe '*) options=(--socket --json --help) ;;
        'encrypt '*) [[ $cur == -* ]] && options=(--socket --key-id --aad --help) || kind=file ;;
        'decrypt '*) [[ $cur == -* ]] && options=(--socket --key-id --aad --help) || kind=file ;;
        'disable '*) options=(--socket --json --help) ;;
        'enable '*) options=(--socket --json --help) ;;
        'shred '*) options=(--socket --now --days --json --help) ;;
        'rewrap '*) options=(--socket --new-key-file --json --help) ;;
        'rotate-kek '*) options=(--socket --config --generate --new-key-file --resume --dry-run --forget-old --json --help) ;;
        'genkey '*) [[ $cur == -* ]] && options=(--json --help) || kind=file ;;
        'kek-id '*) [[ $cur == -* ]] && options=(--json --help) || kind=file ;;
        'audit verify') [[ $cur == -* ]] && options=(--data-dir --config --receipts --partial --json --help) || kind=file ;;
        'audit tail') options=(--data-dir --config -n --lines -f --follow --json --help) ;;
        'verify '*) options=(--data-dir --config --json --help) ;;
        'backup '*) [[ $cur == -* ]] && options=(--data-dir --config --json --help) || kind=file ;;
        'restore '*) [[ $cur == -* ]] && options=(--data-dir --config --snapshot --key --force --json --help) || kind=file ;;
        'export '*) [[ $cur == -* ]] && options=(--data-dir --config --help) || kind=file ;;
        'import '*) [[ $cur == -* ]] && options=(--data-dir --config --skip-bad --json --help) || kind=file ;;
        'backups list') options=(--data-dir --config --json --help) ;;
        'backups prune') options=(--data-dir --config --keep --older-than --json --help) ;;
        'doctor '*) options=(--socket --data-dir --config --json --help) ;;
        'bench '*) kind='calls store rotate' options=(--seconds --deks --json --help) ;;
        esac
    fi
    case $kind in
    file) mapfile -t COMPREPLY < <(compgen -f -- "$cur") && compopt -o filenames 2>/dev/null ;;
    folder) mapfile -t COMPREPLY < <(compgen -d -- "$cur") && compopt -o filenames 2>/dev/null ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$kind ${options[*]}" -- "$cur") ;;
    esac
}
complete -F _progressdb_kms progressdb-kms
