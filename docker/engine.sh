# shellcheck shell=bash
# Chooses the container tool for build.sh and run.sh, which source this file.
#   DOCKER=…   the tool and its options ("sudo docker"); default: docker, or podman where docker is not installed

# shellcheck disable=SC2034  # the scripts that source this use it
image=megatron-harness

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

find_engine() {
  local given=${DOCKER:-} answer
  if [[ -z $given ]]; then
    given=docker
    if ! type -P docker >/dev/null && type -P podman >/dev/null; then given=podman; fi
  fi
  read -ra engine <<<"$given"
  type -P "${engine[0]}" >/dev/null || fail "no ${engine[0]} here
install Docker (https://docs.docker.com/engine/install), or podman and DOCKER=podman"
  answer=$("${engine[@]}" info 2>&1 >/dev/null) || fail "$given is installed, but does not answer: ${answer##*$'\n'}
start its service (sudo systemctl start docker), join its group (sudo usermod -aG docker $(id -un)), or DOCKER='sudo docker'"
}

is_podman() {
  [[ " ${engine[*]##*/} " == *" podman "* ]]
}
