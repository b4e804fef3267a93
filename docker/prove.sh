#!/usr/bin/env bash
# usage: sudo docker/prove.sh [FOLDER]     FOLDER keeps 3 GB of layers, for the next time
# Builds docker/Dockerfile for real without a container daemon and without NVIDIA's image: on a Debian base from
# debootstrap, without torch, then runs make and its completion in bash and zsh inside. Needs debootstrap, buildah and a network.
#   SUITE=trixie   the Debian release; its python3 must be 3.12 or 3.13
#   MIRROR=url     where from
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
folder=${1:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
suite=${SUITE:-trixie}
export BUILDAH_ISOLATION=chroot
buildah=(buildah --storage-driver vfs --root "$folder/storage" --runroot "$folder/run")
# A network may have its own certificate authority: the host's are used.
host=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)

for tool in debootstrap buildah; do
  type -P "$tool" >/dev/null || {
    echo "error: no $tool here: apt install debootstrap buildah" >&2
    exit 2
  }
done

if [[ ! -e $folder/base/usr/bin/pip3 ]]; then
  echo "== a base: Debian $suite"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip "$suite" "$folder/base" \
    ${MIRROR:+"$MIRROR"} >"$folder/debootstrap.log"
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" copy --quiet "$container" "$folder/base" / >/dev/null
  "${buildah[@]}" commit --quiet --rm "$container" localhost/base >/dev/null
fi

echo "== docker/Dockerfile on it, without torch"
"${buildah[@]}" build --pull-never --layers "${host[@]}" --build-arg BASE=localhost/base --build-arg STAGES='light test' \
  --file docker/Dockerfile --tag localhost/megatron-harness .

echo "== in a container"
container=$("${buildah[@]}" from --pull-never localhost/megatron-harness)
inside() {
  echo "\$ $*"
  "${buildah[@]}" run "${host[@]}" "$container" -- bash --login -i -c "$*" 2>&1 | grep -v 'job control\|terminal process group'
}
inside 'pwd; python3 --version'
inside 'make list | tail -n 3'
inside 'make show-101 | head -n 4'
# shellcheck disable=SC2016  # expanded inside
inside '{ _comp_load make || _completion_loader make; } 2>/dev/null
  COMP_WORDS=(make 101) COMP_CWORD=1 COMP_LINE="make 101" COMP_POINT=8
  $(complete -p make | sed "s/.*-F \([^ ]*\).*/\1/") make 101 make
  echo "make 101<tab>: ${COMPREPLY[*]}"'
inside 'scripts/setup.sh test -- -m pytest -q tests/test_targets.py -k zsh'
"${buildah[@]}" rm "$container" >/dev/null
