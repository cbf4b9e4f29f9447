# Shared shell library: sourced by every script in scripts/ and by guest-images/build.
#
#   step/ok/warn/die    one line each, on stderr, so that stdout stays a result
#   wrong_usage TEXT    die with exit code 2: the command line cannot be understood
#   quoted WORD...      the words as a person would type them
#   stage NAME CMD...   runs CMD and remembers how long it took; stage_report prints the table
#   roost_cache_dir     $XDG_CACHE_HOME/roost: what can be built again
#   roost_state_dir     $XDG_STATE_HOME/roost: what cannot
#   virtual_host_dir N  the folder of the virtual host N: its data, and what it changed below /etc
#   as_root CMD...      runs CMD as root: directly, or through sudo
#   at_end CMD...       runs CMD however the script ends; Ctrl-C ends it with exit code 130
#   end_by_signal       the second half of that alone
#
# shellcheck shell=bash

[[ -n ${ROOST_COMMON_SH:-} ]] && return 0
ROOST_COMMON_SH=1

ROOST_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export ROOST_ROOT

# Colour only where a person reads it.
if [[ -t 2 && -z ${NO_COLOR:-} ]]; then
    _c_bold=$'\e[1m' _c_green=$'\e[32m' _c_yellow=$'\e[33m' _c_red=$'\e[31m' _c_off=$'\e[0m'
else
    _c_bold='' _c_green='' _c_yellow='' _c_red='' _c_off=''
fi

step() { printf '%s==>%s %s\n' "$_c_bold" "$_c_off" "$*" >&2; }
ok()   { printf '%s ok%s  %s\n' "$_c_green" "$_c_off" "$*" >&2; }
warn() { printf '%swarning:%s %s\n' "$_c_yellow" "$_c_off" "$*" >&2; }
die()  { printf '%serror:%s %s\n' "$_c_red" "$_c_off" "$*" >&2; exit 1; }

wrong_usage() { printf '%serror:%s %s; see %s --help\n' "$_c_red" "$_c_off" "$*" "${0##"$PWD"/}" >&2; exit 2; }

# Single quotes, and only where a shell would see more than one plain word.
quoted() {
    local word line=''
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# at_end CMD...: runs CMD when the script (or the subshell that says it) ends, with the exit code in $ended_with. It and the
# programs that it runs are not interrupted: whoever presses Ctrl-C again wants it over, not half of it left.
at_end() {
    _at_end=("$@")
    trap '_end $?' EXIT
    end_by_signal
}
_end() {
    ended_with=$1
    trap '' HUP INT TERM
    trap - EXIT
    "${_at_end[@]}" || true
    exit "$ended_with"
}

# With these a shell waits for what it has started, and for what that has to tidy up, before it ends.
end_by_signal() {
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# Milliseconds on a clock that only goes forward.
now_ms() {
    local up
    read -r up _ < /proc/uptime
    echo $((10#${up/./} * 10))
}

_stage_names=() _stage_ms=() _stage_rc=()

# stage NAME CMD...: runs CMD, keeps its exit code, remembers its wall time.
stage() {
    local name=$1 start rc=0
    shift
    step "$name"
    start=$(now_ms)
    "$@" || rc=$?
    _stage_names+=("$name") _stage_ms+=($(($(now_ms) - start))) _stage_rc+=("$rc")
    return "$rc"
}

# What each stage took, one line per stage, and the sum.
stage_report() {
    local i total=0
    ((${#_stage_names[@]})) || return 0
    printf '\n%-44s %10s\n' stage seconds >&2
    for i in "${!_stage_names[@]}"; do
        printf '%-44s %8d.%d%s\n' "${_stage_names[i]}" $((_stage_ms[i] / 1000)) \
            $((_stage_ms[i] % 1000 / 100)) "$( ((_stage_rc[i])) && echo "  failed (${_stage_rc[i]})")" >&2
        total=$((total + _stage_ms[i]))
    done
    printf '%-44s %8d.%d\n' total $((total / 1000)) $((total % 1000 / 100)) >&2
}

# The caller's own folders, also below sudo: a cache in root's home would never be found again.
_caller_home() {
    if [[ $EUID == 0 && -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
        getent passwd "$SUDO_USER" | cut -d: -f6
    else
        printf '%s\n' "${HOME:-/root}"
    fi
}
roost_cache_dir() { printf '%s/roost\n' "${XDG_CACHE_HOME:-$(_caller_home)/.cache}"; }
roost_state_dir() { printf '%s/roost\n' "${XDG_STATE_HOME:-$(_caller_home)/.local/state}"; }
# As in scripts/virtual-host, which does not know sudo.
virtual_host_dir() { printf '%s/roost/virtual-hosts/%s\n' "${XDG_STATE_HOME:-${HOME:-/root}/.local/state}" "$1"; }

# Ends the script unless it is root or can become it.
require_root_or_sudo() {
    [[ $EUID == 0 ]] && return 0
    command -v sudo > /dev/null || die "$1 needs root: run it as root, or install sudo"
}

# Runs CMD as root. HOME and the cache stay the caller's.
as_root() {
    if [[ $EUID == 0 ]]; then "$@"; else sudo --preserve-env=HOME,XDG_CACHE_HOME -- "$@"; fi
}

# "debian 12", "debian 13", or the ID and version of what else this is.
host_release() {
    local ID='' VERSION_ID=''
    # shellcheck disable=SC1091
    . /etc/os-release
    printf '%s %s\n' "$ID" "$VERSION_ID"
}
