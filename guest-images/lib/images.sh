# Images: a root file system from a recipe, put together with a kernel.
#
# A recipe is a folder recipes/NAME with recipe.sh, which finds the variant that is asked for (of the image NAME-VARIANT)
# in VARIANT, or nothing in it, and sets
#   VARIANTS=(...)      which there are
#   PACKAGES=(...)      Debian packages; what they depend on comes along
#   ONLY_PACKAGES=(...) packages without what they depend on
#   ROOT_SIZE           size of root.ext4 (mke2fs syntax)
#   MKE2FS=(...)        more options for mke2fs
#   BOOT_ARGS, DEFAULT_USER, SSH (true or false), MIN_VOLUME_GIB, DESCRIPTION    for the manifest
#   OWNER               "root" when every file belongs to root: then nobody need be root to build it
#   KERNELS_ALLOWED     which kernels it can boot (default: debian fast)
# and defines  recipe_root DIR WORK  to fill the new root DIR (as root); rootfs/, if there, is copied over it.
# It may define recipe_inputs, which prints what else the root is made of beside the recipe and the packages, and
# recipe_finish DIR WORK, which runs last. What several recipes use is in shared/.
#
# shellcheck shell=bash

RECIPES=$ROOST_ROOT/guest-images/recipes
SHARED=$ROOST_ROOT/guest-images/shared

# Sets what the recipe of the image sets, and RECIPE to its folder.
_load_recipe() {
    RECIPE=$RECIPES/$1 VARIANT=''
    [[ -r $RECIPE/recipe.sh ]] || { RECIPE=$RECIPES/${1%-*} VARIANT=${1##*-}; }
    [[ -r $RECIPE/recipe.sh ]] || die "no image '$1'; there are: $(image_names)"
    PACKAGES=() ONLY_PACKAGES=() MKE2FS=() OWNER='' ROOT_SIZE='' BOOT_ARGS='' DEFAULT_USER=root SSH=true MIN_VOLUME_GIB=1 DESCRIPTION='' KERNELS_ALLOWED='debian fast' VARIANTS=()
    # shellcheck disable=SC1091
    . "$RECIPE/recipe.sh"
    [[ -z $VARIANT || " ${VARIANTS[*]} " == *" $VARIANT "* ]] || die "no image '$1'; there are: $(image_names)"
}

# Every image that can be built, on one line.
image_names() (
    names=()
    for recipe in "$RECIPES"/*; do
        _load_recipe "${recipe##*/}"
        names+=("${recipe##*/}")
        for variant in "${VARIANTS[@]}"; do names+=("${recipe##*/}-$variant"); done
    done
    echo "${names[*]}"
)

# image_folder NAME KERNEL
image_folder() {
    local name=$1 kernel=$2 root_key kernel_dir key
    _load_recipe "$name"
    if [[ $kernel == auto ]]; then
        kernel=debian
        # Built once, used when present: nobody waits minutes for a kernel unasked.
        [[ $KERNELS_ALLOWED == *fast* ]] && cache_has kernels fast "$(kernel_key fast)" && kernel=fast
    fi
    [[ " $KERNELS_ALLOWED " == *" $kernel "* ]] || die "image $name boots with: $KERNELS_ALLOWED, not with '$kernel'"
    kernel_dir=$(kernel_folder "$kernel")
    root_key=$(_root_key "$name")
    [[ $name == virtual-host ]] && root_key=$(printf '%s %s' "$root_key" "${kernel_dir##*/}" | hash_key)
    key=$( { echo "$root_key" "${kernel_dir##*/}"; hash_files "$ROOST_ROOT/guest-images/lib/images.sh"; } | hash_key)
    cache_entry images "$name.$kernel" "$key" _build_image "$name" "$root_key" "$kernel" "$kernel_dir"
}

_recipe_packages() {
    if ((${#PACKAGES[@]})); then packages_resolve "${PACKAGES[@]}"; fi
    if ((${#ONLY_PACKAGES[@]})); then packages_resolve_only "${ONLY_PACKAGES[@]}"; fi
}

_root_key() {
    {
        hash_files "$RECIPE" "$ROOST_ROOT"/guest-images/lib/{ext4.sh,images.sh,make-root}
        _recipe_packages
        if declare -F recipe_inputs > /dev/null; then recipe_inputs; fi
        printf '%s\n' "$1" "$SOURCE_DATE_EPOCH"
        # The writer's own version is an input: other versions lay files out differently.
        dpkg-query -W -f '${Package} ${Version}\n' e2fsprogs
    } | hash_key
}

_build_image() {
    local out=$1 name=$2 root_key=$3 kernel=$4 kernel_dir=$5 root
    root=$(cache_entry roots "$name" "$root_key" _build_root "$name" "$kernel_dir")
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
  "name": "$name",
  "description": "$DESCRIPTION",
  "kernel": "kernel",
  "kernel_name": "$kernel",
  "kernel_release": "$(cat "$kernel_dir/release")",
  "initrd": $initrd,
  "root": "root.ext4",
  "boot_args": "$BOOT_ARGS",
  "default_user": "$DEFAULT_USER",
  "ssh": $SSH,
  "min_volume_gib": $MIN_VOLUME_GIB
}
JSON
}

_build_root() {
    local out=$1 name=$2 kernel_dir=$3 work
    work=$(mktemp -d "$CACHE/.work-XXXXXX")
    if [[ $OWNER == root ]]; then at_end rm -rf "$work"; else at_end as_root rm -rf "$work"; fi
    _recipe_packages > "$work/list"
    packages_fetch "$work/list" "$work/debs"
    local make_root=("$ROOST_ROOT/guest-images/lib/make-root" "$name" "$work" "$out/root.ext4" "$kernel_dir")
    if [[ $OWNER == root ]]; then
        "${make_root[@]}"
    else
        require_root_or_sudo "building the image $name (owners and devices of its files)"
        as_root "${make_root[@]}"
        as_root chown "$(id -u):$(id -g)" "$out/root.ext4"
    fi
    chmod 644 "$out/root.ext4"
}
