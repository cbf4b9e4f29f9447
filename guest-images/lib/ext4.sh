# ext4 images with the same bytes every time: fixed uuid, hash seed and times.
#
# shellcheck shell=bash

# make_ext4 DIR OUT SIZE NAME [mke2fs options...]: SIZE as mke2fs takes it (3840K, 700M). The uuid is
# derived from NAME. Owners and modes are taken from DIR as they are; with OWNER=root everything belongs to root,
# so that such an image can be made by anybody.
make_ext4() {
    local dir=$1 out=$2 size=$3 name=$4 uuid
    shift 4
    uuid=$(_uuid_of "$name")
    find "$dir" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    find "$dir" -type d -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
    : > "$out"
    # The kernel need not write zeroes to inode tables and journal that are holes already.
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH /sbin/mke2fs -q -F -t ext4 -U "$uuid" -L "${name:0:16}" -m 1 \
        -E "hash_seed=$uuid,root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,nodiscard" "$@" -d "$dir" "$out" "$size"
    _fix_inodes "$out"
}

# mke2fs -d copies change times (and, before 1.47.1, access times) from DIR, where nobody can set them.
_fix_inodes() {
    local script=$1.inodes
    # dumpe2fs names the free inodes of each group as ranges: all the others are in use.
    /sbin/dumpe2fs "$1" 2> /dev/null | awk -v t="@$SOURCE_DATE_EPOCH" -v root="${OWNER:-}" '
        /^Inodes per group:/ { per = $NF }
        /^Group [0-9]+:/ { g = $2 + 0 }
        /^  Free inodes:/ {
            delete free
            sub(/^  Free inodes: */, "")
            n = split($0, ranges, /, */)
            for (r = 1; r <= n; r++) {
                split(ranges[r], e, "-")
                if (ranges[r] != "") for (i = e[1] + 0; i <= (e[2] == "" ? e[1] : e[2]) + 0; i++) free[i] = 1
            }
            for (i = g * per + 1; i <= (g + 1) * per; i++)
                if (!(i in free) && (i == 2 || i >= 11)) {
                    printf "sif <%d> atime %s\nsif <%d> ctime %s\n", i, t, i, t
                    if (root == "root") printf "sif <%d> uid 0\nsif <%d> gid 0\n", i, i
                }
        }' > "$script"
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH /sbin/debugfs -w -f "$script" "$1" > /dev/null 2>&1
    # With what a kernel would say of it: an image that needs repair is no image.
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH /sbin/e2fsck -fn "$1" > "$script" 2>&1 || { cat "$script" >&2; die "$1 is not a clean ext4 image"; }
    rm -f "$script"
}

_uuid_of() {
    local h
    h=$(printf 'roost image %s' "$1" | sha256sum)
    printf '%s-%s-5%s-a%s-%s\n' "${h:0:8}" "${h:8:4}" "${h:13:3}" "${h:17:3}" "${h:20:12}"
}
