# Initial RAM disks with the same bytes every time.
#
# shellcheck shell=bash

# 2026-01-01: every file we make carries this time, whatever the caller's environment says: it goes into the bytes.
export SOURCE_DATE_EPOCH=1767225600

# pack_cpio DIR OUT: DIR as an lz4-compressed cpio, sorted, owned by root, with one fixed time.
pack_cpio() {
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    # -l: the kernel reads only the legacy lz4 frame.
    (cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z |
        cpio --null --create --format=newc --quiet --reproducible --owner=+0:+0) | lz4 -l -9 -q > "$2"
}

# copy_modules TREE DEST MODULE...: the modules and all that they depend on, named 00-a.ko, 01-b.ko … in
# the order in which insmod wants them. A module that is built into the kernel is passed over.
copy_modules() {
    local tree=$1 dest=$2 m
    shift 2
    mkdir -p "$dest"
    _copied=' '
    for m in "$@"; do _copy_module "$tree" "$dest" "$m"; done
}

_copy_module() {
    local tree=$1 dest=$2 name=${3//-/_} file deps dep n
    [[ $_copied == *" $name "* ]] && return 0
    file=$(find "$tree" -regex ".*/${name//_/[-_]}\.ko\(\.xz\|\.zst\)?" | head -1)
    if [[ -z $file ]]; then
        grep -qE "/${name//_/[-_]}\.ko$" "$tree"/modules.builtin || die "the kernel has no module $name"
        return 0
    fi
    deps=$(/sbin/modinfo -F depends "$file")
    for dep in ${deps//,/ }; do _copy_module "$tree" "$dest" "$dep"; done
    _copied+="$name "
    n=$(find "$dest" -type f | wc -l)
    cp "$file" "$dest/$(printf '%02d' "$n")-${file##*/}"
}
