# The build cache: one folder per thing built, named <name>-<key>, where the key is the hash of
# everything that went in (recipe files and resolved package versions). An entry appears by rename,
# so it is whole or absent; one lock per name, so two builders never race.
#
# shellcheck shell=bash

# Without this, bash forgets `set -e` in every $(...), and a failed build would be kept.
shopt -s inherit_errexit

CACHE=$(roost_cache_dir)
KEEP=2 # entries of one name that survive pruning

# Prints the key of everything read from stdin.
hash_key() { sha256sum | cut -c1-16; }

# Content and executable bit of each file below the named folders, in a fixed order.
hash_files() {
    local f
    find "$@" \( -type f -o -type l \) | LC_ALL=C sort | while read -r f; do
        if [[ -L $f ]]; then printf '%s -> %s\n' "${f#"$ROOST_ROOT"/}" "$(readlink "$f")"
        else printf '%s %s %s\n' "${f#"$ROOST_ROOT"/}" "$([[ -x $f ]] && echo x)" "$(sha256sum < "$f")"; fi
    done
}

# cache_entry KIND NAME KEY BUILDER ARGS...: prints the folder $CACHE/KIND/NAME-KEY; when it is not
# there, runs `BUILDER DIR ARGS...` on a fresh folder first.
cache_entry() {
    local kind=$1 name=$2 key=$3 entry tmp lock start
    shift 3
    entry=$CACHE/$kind/$name-$key
    if [[ ! -d $entry ]]; then
        mkdir -p "$CACHE/$kind" "$CACHE/locks"
        exec {lock}> "$CACHE/locks/$kind-$name"
        flock -n "$lock" || { step "waiting for another build of $kind/$name"; flock "$lock"; }
        if [[ ! -d $entry ]]; then
            step "building $kind/$name ($key)"
            start=$(now_ms)
            # Under the lock, whatever a killed build left can only be rubbish.
            rm -rf "$CACHE/$kind/.new-$name"-??????
            tmp=$(mktemp -d "$CACHE/$kind/.new-$name-XXXXXX")
            chmod 755 "$tmp"
            (
                # However the builder ends: what is not whole is not kept.
                at_end rm -rf "$tmp"
                # A subshell of its own, not a condition: `set -e` must hold inside the builder.
                # The modes of files go into what is built.
                (set -e; umask 022; end_by_signal; "$1" "$tmp" "${@:2}" >&2)
                mv -T "$tmp" "$entry"
            )
            _cache_prune "$kind" "$name"
            ok "built $kind/$name in $((($(now_ms) - start) / 1000)) s"
        fi
        exec {lock}>&-
    fi
    touch -c "$entry" # pruning goes by last use
    printf '%s\n' "$entry"
}

# True when KIND/NAME-KEY is built.
cache_has() { [[ -d $CACHE/$1/$2-$3 ]]; }

_cache_prune() {
    local kind=$1 name=$2 old
    # shellcheck disable=SC2012 # the names are ours: no newlines in them
    ls -dt "$CACHE/$kind/$name-"???????????????? 2> /dev/null | tail -n +$((KEEP + 1)) | while read -r old; do
        rm -rf "$old"
    done
}
