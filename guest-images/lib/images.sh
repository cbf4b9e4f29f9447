# Images: a root file system from a recipe, put together with a kernel.
#
# A recipe is a folder recipes/NAME with recipe.sh, which sets
#   PACKAGES=(...)      Debian packages; what they depend on comes along
#   ONLY_PACKAGES=(...) packages without what they depend on
#   ROOT_SIZE           size of root.ext4 (mke2fs syntax)
#   MKE2FS=(...)        more options for mke2fs
#   BOOT_ARGS, DEFAULT_USER, MIN_VOLUME_GIB, DESCRIPTION    for the manifest
#   OWNER               "root" when every file belongs to root: then nobody need be root to build it
#   KERNELS_ALLOWED     which kernels it can boot (default: debian fast)
# and defines  recipe_root DIR WORK  to fill the new root DIR (as root); rootfs/, if there, is copied over it.
# It may define recipe_inputs, which prints what else the root is made of beside the recipe and the packages.
#
# shellcheck shell=bash

RECIPES=$ROOST_ROOT/guest-images/recipes

_load_recipe() {
    local recipe=$RECIPES/$1
    [[ -r $recipe/recipe.sh ]] || die "no image '$1'; there are: $(ls "$RECIPES" | tr '\n' ' ')"
    PACKAGES=() ONLY_PACKAGES=() MKE2FS=() OWNER='' ROOT_SIZE='' BOOT_ARGS='' DEFAULT_USER=root MIN_VOLUME_GIB=1 DESCRIPTION='' KERNELS_ALLOWED='debian fast'
    WITH=("${@:2}")
    # shellcheck disable=SC1091
    . "$recipe/recipe.sh"
}

# image_folder NAME KERNEL [WITH...]
image_folder() {
    local name=$1 kernel=$2 root_key kernel_dir full key
    shift 2
    _load_recipe "$name" "$@"
    full=$name$(printf -- '+%s' "$@")
    [[ $# == 0 ]] && full=$name
    if [[ $kernel == auto ]]; then
        kernel=debian
        # Built once, used when present: nobody waits minutes for a kernel unasked.
        [[ $KERNELS_ALLOWED == *fast* ]] && cache_has kernels fast "$(kernel_key fast)" && kernel=fast
    fi
    [[ " $KERNELS_ALLOWED " == *" $kernel "* ]] || die "image $name boots with: $KERNELS_ALLOWED, not with '$kernel'"
    kernel_dir=$(kernel_folder "$kernel")
    root_key=$(_root_key "$name" "$@")
    [[ $name == virtual-host ]] && root_key=$(printf '%s %s' "$root_key" "${kernel_dir##*/}" | hash_key)
    key=$( { echo "$root_key" "${kernel_dir##*/}"; hash_files "$ROOST_ROOT/guest-images/lib/images.sh"; } | hash_key)
    cache_entry images "$full.$kernel" "$key" _build_image "$name" "$full" "$root_key" "$kernel" "$kernel_dir" "$@"
}

_recipe_packages() {
    if ((${#PACKAGES[@]})); then packages_resolve "${PACKAGES[@]}"; fi
    if ((${#ONLY_PACKAGES[@]})); then packages_resolve_only "${ONLY_PACKAGES[@]}"; fi
}

_root_key() {
    {
        hash_files "$RECIPES/$1" "$ROOST_ROOT"/guest-images/lib/{ext4.sh,images.sh,make-root}
        _recipe_packages
        if declare -F recipe_inputs > /dev/null; then recipe_inputs; fi
        printf '%s\n' "$@" "$SOURCE_DATE_EPOCH"
        # The writer's own version is an input: other versions lay files out differently.
        dpkg-query -W -f '${Package} ${Version}\n' e2fsprogs
    } | hash_key
}

_build_image() {
    local out=$1 name=$2 full=$3 root_key=$4 kernel=$5 kernel_dir=$6 root
    shift 6
    root=$(cache_entry roots "$full" "$root_key" _build_root "$name" "$kernel_dir" "$@")
    # Hard links: an image costs the disk nothing beyond its parts.
    ln "$root/root.ext4" "$out/root.ext4"
    ln "$kernel_dir/kernel" "$out/kernel"
    local initrd=null
    if [[ $name == virtual-host ]]; then
        ln "$kernel_dir/initrd-host" "$out/initrd"
        ln -f "$kernel_dir/bzImage" "$out/kernel"
        initrd='"initrd"'
    elif [[ -e $kernel_dir/initrd ]]; then
        ln "$kernel_dir/initrd" "$out/initrd"
        initrd='"initrd"'
    fi
    cat > "$out/manifest.json" << JSON
{
  "name": "$full",
  "description": "$DESCRIPTION",
  "kernel": "kernel",
  "kernel_name": "$kernel",
  "kernel_release": "$(cat "$kernel_dir/release")",
  "initrd": $initrd,
  "root": "root.ext4",
  "boot_args": "$BOOT_ARGS",
  "default_user": "$DEFAULT_USER",
  "min_volume_gib": $MIN_VOLUME_GIB
}
JSON
}

_build_root() {
    local out=$1 name=$2 kernel_dir=$3 work
    shift 3
    work=$(mktemp -d "$CACHE/.work-XXXXXX")
    if [[ $OWNER == root ]]; then at_end rm -rf "$work"; else at_end as_root rm -rf "$work"; fi
    _recipe_packages > "$work/list"
    packages_fetch "$work/list" "$work/debs"
    local make_root=("$ROOST_ROOT/guest-images/lib/make-root" "$name" "$work" "$out/root.ext4" "$kernel_dir" "$@")
    if [[ $OWNER == root ]]; then
        "${make_root[@]}"
    else
        require_root_or_sudo "building the image $name (owners and devices of its files)"
        as_root "${make_root[@]}"
        as_root chown "$(id -u):$(id -g)" "$out/root.ext4"
    fi
    chmod 644 "$out/root.ext4"
}
