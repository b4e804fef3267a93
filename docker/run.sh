#!/usr/bin/env bash
# usage: docker/run.sh [COMMAND…]     default: a login shell where make 101<tab> works
# Runs the image megatron-harness on all GPUs; outdir/ and data/ are this checkout's.
#   DOCKER=podman  another tool than docker
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
docker=${DOCKER:-docker}
type -P "$docker" >/dev/null || {
  echo "error: no $docker here; install it (https://docs.docker.com/engine/install), or DOCKER=podman" >&2
  exit 2
}
inside=/workspace/megatron-harness
# NCCL and data loaders share memory between processes, RDMA locks it, and ranks on other nodes find this one's ports.
options=(--rm --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 --network=host
  --volume "$PWD/outdir:$inside/outdir" --volume "$PWD/data:$inside/data")
if [[ -e /dev/nvidiactl ]]; then options+=(--gpus all); fi
if [[ -t 0 && -t 1 ]]; then options+=(--interactive --tty); fi
mkdir -p outdir data
exec "$docker" run "${options[@]}" megatron-harness "$@"
