#!/usr/bin/env bash
# usage: docker/build.sh [ARGUMENT…]     arguments go to docker build
# Builds the image megatron-harness, upstream's tree included.
#   BASE=image     instead of NVIDIA's image that the Dockerfile names
#   DOCKER=podman  another tool than docker
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
docker=${DOCKER:-docker}
type -P "$docker" >/dev/null || {
  echo "error: no $docker here; install it (https://docs.docker.com/engine/install), or DOCKER=podman" >&2
  exit 2
}
[[ -e megatron-lm/pretrain_gpt.py ]] || git submodule update --init megatron-lm ||
  echo "docker/build.sh: without the submodule; the image runs megatron-core's wheel" >&2
exec "$docker" build ${BASE:+--build-arg BASE="$BASE"} --file docker/Dockerfile --tag megatron-harness "$@" .
