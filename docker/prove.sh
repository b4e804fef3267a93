#!/usr/bin/env bash
# usage: sudo docker/prove.sh [FOLDER]     FOLDER keeps about 8 GB of layers, for the next time
# Builds docker/Dockerfile without a container daemon and without NVIDIA's image, on a Debian base from debootstrap.
# Then runs CPU miniatures, tables and completion in the image, not as root, with and without mounted folders.
# Stops at the first command that fails, with its exit status. Needs root, debootstrap, buildah and a network.
#   SUITE=trixie   the Debian release; its python3 must be 3.12 or 3.13
#   MIRROR=url     of Debian's packages
#   STORAGE_DRIVER=overlay   or vfs, where layers cannot be overlaid (each is then a whole copy)
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

for tool in debootstrap buildah; do
  type -P "$tool" >/dev/null || fail "no $tool here: apt install debootstrap buildah"
done
((EUID == 0)) || fail "debootstrap and buildah need root here: sudo docker/prove.sh"

folder=${1:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
folder=$(realpath "$folder")
suite=${SUITE:-trixie}
inside=/workspace/megatron-harness
export BUILDAH_ISOLATION=chroot
buildah=(buildah --storage-driver "${STORAGE_DRIVER:-overlay}" --root "$folder/storage" --runroot "$folder/run")
# A network may have its own certificate authority: the image build uses those of the host.
host=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)

if ! "${buildah[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
  echo "== a base: Debian $suite"
  rm -rf "$folder/base"
  debootstrap --variant=minbase --include=ca-certificates,python3-dev,python3-pip "$suite" "$folder/base" \
    ${MIRROR:+"$MIRROR"} >"$folder/debootstrap.log" || {
    tail -n 5 "$folder/debootstrap.log" >&2
    fail "debootstrap could not make a base; its log: $folder/debootstrap.log"
  }
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" copy --quiet "$container" "$folder/base" / >/dev/null
  "${buildah[@]}" commit --quiet --rm "$container" localhost/base >/dev/null
  rm -rf "$folder/base"
fi

echo "== docker/Dockerfile on it"
BASE=localhost/base DOCKER="${buildah[*]}" docker/build.sh --pull-never --layers "${host[@]}"

# in_container USER [OPTION…] -- COMMAND: runs a shell in a fresh container; prints its output, returns its exit status.
in_container() {
  local user=$1 container status=0
  local -a options=()
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  echo "\$ $*"
  container=$("${buildah[@]}" from --pull-never localhost/megatron-harness)
  "${buildah[@]}" run --user "$user" "${options[@]}" "$container" -- bash -c "set -euo pipefail; $*" || status=$?
  "${buildah[@]}" rm "$container" >/dev/null
  return $status
}

runs='make 101 && make 801 STEPS=20 && make table | tail -n 5 && make list | tail -n 1'

echo "== in a container: the image's user, nothing mounted"
in_container harness -- "id -un; pwd; python3 --version; cat COMMIT"
# shellcheck disable=SC2016  # expanded inside
in_container harness -- '[[ $(id -u) != 0 ]]; for out in .git tests megatron-lm/.git megatron-lm/tests; do [[ ! -e $out ]]; done'
in_container harness -- "$runs"

echo "== as user 12345 of the host, with data/, outdir/ and weights/ mounted"
rm -rf "$folder/checkout"
mkdir -p "$folder"/checkout/{data,outdir,weights}
cp data/*.* "$folder/checkout/data"
chown -R 12345:12345 "$folder/checkout"
mounts=()
for mounted in data outdir weights; do mounts+=(--volume "$folder/checkout/$mounted:$inside/$mounted"); done
in_container 12345:12345 "${mounts[@]}" -- "$runs && touch weights/mine"
foreign=$(find "$folder/checkout" ! -uid 12345)
[[ -z $foreign ]] || fail "these belong to another user than the caller: $foreign"
[[ -e $folder/checkout/weights/mine ]] || fail "weights/ was not mounted"
compgen -G "$folder/checkout/outdir/101-*/result.json" >/dev/null || fail "the run of 101 is not in the mounted outdir/"

echo "== completion"
# shellcheck disable=SC2016  # expanded inside
in_container harness -- 'bash -i -c "{ _comp_load make || _completion_loader make; } 2>/dev/null
  COMP_WORDS=(make 101) COMP_CWORD=1 COMP_LINE=\"make 101\" COMP_POINT=8
  \$(complete -p make | sed \"s/.*-F \([^ ]*\).*/\1/\") make 101 make
  echo \"make 101<tab>: \${COMPREPLY[*]}\"" 2>/dev/null'
# shellcheck disable=SC2016
in_container harness -- 'zsh -i -c "echo \"zsh completes make with: \$_comps[make]\""'
echo "== proven"
