# Debian packages without touching the machine's own package state: a private apt root with an empty
# dpkg status, so that what is resolved depends on the archive alone, not on this host or its release.
#
#   packages_resolve PKG...   every package needed (essential ones too): "name_version_arch.deb sha256" lines
#   packages_fetch LIST       downloads what such a list names, prints the folder that holds it
#
# shellcheck shell=bash

GUEST_SUITE=bookworm
APT_ROOT=$CACHE/apt/$GUEST_SUITE
INDEX_DAYS=7 # an older package index is fetched again, when the archive can be reached

_apt() {
    # No file of the host's apt is read but its proxy and transport settings in apt.conf.
    apt-get -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o APT::Install-Recommends=false \
        -o Dir::State="$APT_ROOT/state" -o Dir::State::status="$APT_ROOT/status" -o Dir::Cache="$APT_ROOT/cache" \
        -o Dir::Etc::sourcelist="$APT_ROOT/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::srcpkgcache=srcpkgcache.bin -o Acquire::ForceHash=SHA256 \
        -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 \
        -o Debug::NoLocking=1 -o APT::Get::AllowUnauthenticated=false "$@"
}

# The archive of this kind that this machine's own package sources name, or nothing.
_mirror() {
    local kind=$1
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 2> /dev/null |
        awk -v k="$kind" '$1 == "Debian" && $2 == k { sub(/\/$/, "", $NF); print $NF; exit }'
}

_index_prepare() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg main security
    [[ -r $keyring ]] || die "no $keyring: install the package debian-archive-keyring (scripts/setup does)"
    mkdir -p "$APT_ROOT"/{state/lists/partial,cache/archives/partial}
    [[ -z ${ROOST_REFRESH_PACKAGES:-} && -n $(find "$APT_ROOT/fetched" -mtime "-$INDEX_DAYS" 2> /dev/null) ]] && return 0
    : > "$APT_ROOT/status"
    main=${ROOST_DEBIAN_MIRROR:-$(_mirror Debian)}
    if [[ -z $main ]]; then
        # Whose an archive is stands in its index, which a fresh machine has not fetched.
        as_root apt-get -qq update >&2 || true
        main=$(_mirror Debian)
    fi
    [[ -n $main ]] || die "this machine's package sources name no archive of Debian, or their index was never fetched (apt-get update): guest images are made of Debian packages. ROOST_DEBIAN_MIRROR can name one"
    security=${ROOST_DEBIAN_SECURITY_MIRROR:-$(_mirror Debian-Security)}
    # Mirrors keep both side by side.
    security=${security:-${main%/debian}/debian-security}
    {
        echo "deb [signed-by=$keyring] $main $GUEST_SUITE main"
        echo "deb [signed-by=$keyring] $main $GUEST_SUITE-updates main"
        echo "deb [signed-by=$keyring] $security $GUEST_SUITE-security main"
        [[ -z ${BACKPORTS:-} ]] || echo "deb [signed-by=$keyring] $main $GUEST_SUITE-backports main"
    } > "$APT_ROOT/sources.list"
    step "fetching the package index of Debian $GUEST_SUITE"
    if _apt -qq update >&2; then touch "$APT_ROOT/fetched"
    elif [[ -e $APT_ROOT/fetched ]]; then warn "the package archive cannot be reached; using the index of $(date -r "$APT_ROOT/fetched" +%F)"
    else die "the package archive cannot be reached, and no index of Debian $GUEST_SUITE is cached"; fi
}

# Under a lock of its own: several builds resolve at once.
packages_index() {
    local lock
    [[ -n ${_index_ready:-} ]] && return 0
    mkdir -p "$CACHE/locks"
    exec {lock}> "$CACHE/locks/apt"
    flock "$lock"
    _index_prepare
    exec {lock}>&-
    _index_ready=1
}

# What apt answers is kept as long as the index is: the second build in a row asks nothing.
_resolve_cached() {
    local kept
    packages_index
    kept=$APT_ROOT/resolved/$(printf '%s\n' "$@" "$(stat -c %Y "$APT_ROOT/fetched")" | hash_key)
    if [[ ! -s $kept ]]; then
        mkdir -p "$APT_ROOT/resolved"
        find "$APT_ROOT/resolved" -type f ! -newer "$APT_ROOT/fetched" -delete
        (
            tmp=$(mktemp "$APT_ROOT/resolved/.new-XXXXXX")
            at_end rm -f "$tmp"
            _apt -qq -y --print-uris "$@" | awk '{ sub(/^SHA256:/, "", $4); print $2, $4 }' | LC_ALL=C sort > "$tmp"
            awk 'length($2) != 64 { exit 1 }' "$tmp" || die "no SHA-256 for some package of: $*"
            mv "$tmp" "$kept"
        )
    fi
    cat "$kept"
}

packages_resolve() { _resolve_cached install '?essential' "$@"; }

# The same for the named packages alone, without what they depend on.
packages_resolve_only() { _resolve_cached download "$@"; }

# The real package behind a meta package such as linux-image-cloud-amd64; $2 matches its name.
package_behind() { _resolve_cached install "$1" | sed 's/_.*//' | grep -Em1 "$2"; }

# The package sources of the images, as lines for a guest's own sources.list. A password in an address stays here.
guest_sources() { sed -E 's/ \[[^]]*\]//; s|://[^/@ ]*@|://|' "$APT_ROOT/sources.list"; }

# packages_fetch FILE DIR: links every .deb of the list in FILE into DIR, downloading what is missing.
packages_fetch() {
    local list=$1 dir=$2 name sum lock store=$CACHE/apt/debs missing=()
    mkdir -p "$store/partial" "$dir"
    exec {lock}> "$CACHE/locks/apt"
    flock "$lock"
    while read -r name sum; do
        [[ -e $store/$sum.deb ]] || missing+=("$(_deb_spec "$name")")
    done < "$list"
    if ((${#missing[@]})); then
        step "downloading ${#missing[@]} packages"
        (cd "$store/partial" && _apt -qq download "${missing[@]}" >&2)
    fi
    while read -r name sum; do
        if [[ ! -e $store/$sum.deb ]]; then
            echo "$sum  $store/partial/$name" | sha256sum --status -c || die "$name: wrong checksum or not downloaded"
            mv "$store/partial/$name" "$store/$sum.deb"
        fi
        touch -c "$store/$sum.deb"
        ln -f "$store/$sum.deb" "$dir/${name//%3a/:}"
    done < "$list"
    find "$store" -maxdepth 1 -name '*.deb' -mtime +30 -delete
    exec {lock}>&-
}

# name_1%3a2.3_amd64.deb → name=1:2.3
_deb_spec() {
    local n=${1%_*}
    n=${n//%3a/:}
    printf '%s=%s\n' "${n%%_*}" "${n#*_}"
}
