#!/usr/bin/env bash
# usage: docker/run.sh [COMMAND…]     default: a shell where make 101<tab> works
# Runs the image megatron-harness on all GPUs, as the calling user. data/, outdir/ and weights/ of this checkout are mounted;
# files that a run writes there belong to the caller. The exit status is the command's; Ctrl-C ends the command.
#   OUTDIR=folder  another folder for runs
#   DOCKER=podman  another tool than docker
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
# shellcheck source=docker/engine.sh
. docker/engine.sh

# A bind mount as --mount's comma-separated values, quoted for paths with commas or quotes (colons need none here).
mount_of() {
  local source=$1
  printf 'type=bind,"source=%s",target=/workspace/megatron-harness/%s' "${source//\"/\"\"}" "$2"
}

find_engine
"${engine[@]}" image inspect "$image" >/dev/null 2>&1 || fail "no image $image here
build it: make docker-build"

user=$(id -u):$(id -g)
# With sudo, files belong to who called it.
# shellcheck disable=SC2153  # sudo sets both
if [[ $EUID == 0 && -n ${SUDO_UID:-} ]]; then user=$SUDO_UID:$SUDO_GID; fi
# NCCL and data loaders share memory between processes, RDMA locks it, and ranks on other nodes find this one's ports.
options=(--rm --init --interactive --ipc=host --network=host)
if is_podman; then
  # SELinux would keep the container out of the checkout.
  options+=(--security-opt label=disable)
  # Without root, podman maps the caller to root inside unless told otherwise.
  if [[ $EUID != 0 ]]; then options+=(--userns=keep-id); fi
  gpus=(--device nvidia.com/gpu=all)
  raises_limits() { (ulimit -l unlimited) 2>/dev/null; }
else
  gpus=(--gpus all)
  # Of a rootless Docker, root inside is the caller.
  if [[ $("${engine[@]}" info --format '{{.SecurityOptions}}') == *name=rootless* ]]; then
    user=0:0
    raises_limits() { (ulimit -l unlimited) 2>/dev/null; }
  else
    raises_limits() { true; } # the daemon does
  fi
fi
if raises_limits; then options+=(--ulimit memlock=-1 --ulimit stack=67108864); fi
if [[ -e /dev/nvidiactl ]]; then options+=("${gpus[@]}"); fi
outdir=${OUTDIR:-outdir}
mkdir -p "$outdir" data weights
options+=(--user "$user" --mount "$(mount_of "$(realpath "$outdir")" outdir)"
  --mount "$(mount_of "$PWD/data" data)" --mount "$(mount_of "$PWD/weights" weights)")
if [[ -t 0 && -t 1 ]]; then
  exec "${engine[@]}" run "${options[@]}" --tty "$image" "$@"
fi
# Without a terminal inside, Ctrl-C reaches the first process alone: forward.sh hands it to all that the command started.
(($#)) || set -- bash
exec "${engine[@]}" run "${options[@]}" "$image" docker/forward.sh "$@"
