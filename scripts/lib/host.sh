# Sourced after build.sh: the host where instances live, and controller and agent on it.
#
#   use_this_machine NAME          NAME is the stack's: units, run folder, state folder
#   use_virtual_host NAME VH UP... the same in the virtual host VH, which is started with the options UP
#   in_virtual_host NAME VH        the same in VH as it is, for what ends it
#   start_stack FILE OPTIONS...    starts both with the options of scripts/lib/stack; the administrator's key goes to FILE
#   stop_stack                     removes both and everything of theirs
#   on_host COMMAND                runs a shell command there, as root
#   copy_to_host DIR FILE...       copies files and folders into a fresh folder there
# They set host_kind (machine, virtual or empty), host_bin, host_lib, state, stack_name, cli_endpoint.
# shellcheck shell=bash disable=SC2034 # what is set here is read by who sources it

host_kind='' stack_started=no

use_this_machine() {
    host_kind=machine stack_name=$1 host_bin=$(programs_dir) host_lib=$ROOST_ROOT/scripts/lib state=/var/lib/$1
    _port=$(free_port) _agent_port=$(free_port) _listen=127.0.0.1
    cli_endpoint=https://127.0.0.1:$_port
}

in_virtual_host() {
    host_kind=virtual stack_name=$1 _vh=$2 host_bin=/opt/roost/bin host_lib=/opt/roost/scripts/lib state=/var/lib/roost/${1#roost-}
}

use_virtual_host() {
    in_virtual_host "$1" "$2"
    shift 2
    # Would be built by what follows, too, but that waits for nobody when it is interrupted.
    guest-images/build virtual-host > /dev/null
    guest-images/build --qemu > /dev/null
    scripts/virtual-host --name "$_vh" "$@" up
    _port=7443 _agent_port=7444 _listen=0.0.0.0
    cli_endpoint=https://127.0.0.1:$(scripts/virtual-host --name "$_vh" port)
}

on_host() {
    case $host_kind in
    machine) as_root sh -c "$*" ;;
    virtual) scripts/virtual-host --name "$_vh" ssh "$*" ;;
    *) die "no host was chosen" ;;
    esac
}

copy_to_host() {
    on_host "rm -rf '$1' && mkdir -p '$1'" || return
    case $host_kind in
    machine) as_root cp -r "${@:2}" "$1" ;;
    virtual) scripts/virtual-host --name "$_vh" copy "${@:2}" "$1" ;;
    esac
}

start_stack() {
    local file=$1
    shift
    stack_started=yes
    on_host "$(quoted "$host_lib/stack" start --name "$stack_name" --bin "$host_bin" --state "$state" \
        --port "$_port" --agent-port "$_agent_port" --listen "$_listen" "$@")"
    on_host "$(quoted cat "$state/controller/admin.json")" > "$file"
}

stop_stack() {
    case $host_kind in
    machine)
        [[ $stack_started == no ]] ||
            as_root "$host_lib/stack" purge --name "$stack_name" --bin "$host_bin" --state "$state" ;;
    # Nothing in it is wanted any more. It may also be half started.
    virtual) scripts/virtual-host --name "$_vh" down --discard >&2 ;;
    esac
}
