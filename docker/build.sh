#!/usr/bin/env bash
# usage: docker/build.sh [ARGUMENT…]     arguments go to docker build
# Builds the image megatron-harness, upstream's tree included.
#   BASE=image     instead of NVIDIA's image, which the Dockerfile pins by digest
#   DOCKER=podman  another tool than docker
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
# shellcheck source=docker/engine.sh
. docker/engine.sh

# The commit of the checkout $1, and "dirty" where its files differ; nothing where git does not know.
commit_of() {
  local top commit changes
  top=$(git -C "$1" rev-parse --show-toplevel 2>/dev/null) && [[ $top -ef $1 ]] || return 0
  commit=$(git -C "$1" rev-parse --verify --quiet HEAD) || return 0
  changes=$(git -C "$1" status --porcelain --ignore-submodules --untracked-files=no)
  echo "$commit${changes:+ dirty}"
}

find_engine
[[ -e megatron-lm/pretrain_gpt.py ]] || git submodule update --init megatron-lm ||
  echo "docker/build.sh: without the submodule; the image runs megatron-core's wheel" >&2
commit=$(commit_of .)
[[ -n $commit ]] || echo "docker/build.sh: git does not know this checkout's commit; runs of the image will name none" >&2
arguments=(--build-arg COMMIT="$commit" --build-arg UPSTREAM_COMMIT="$(commit_of megatron-lm)")
if [[ -n ${BASE:-} ]]; then arguments+=(--build-arg BASE="$BASE"); fi
exec "${engine[@]}" build "${arguments[@]}" --file docker/Dockerfile --tag "$image" "$@" .
