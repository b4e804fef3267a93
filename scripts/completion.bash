# shellcheck shell=bash
# source scripts/completion.bash        in bash, or in zsh after compinit
# `make <tab>` in this repository offers experiments and commands first. What more than five targets begin with, such as show-, is
# offered as a prefix; its targets (show-408) follow once it is typed. `make 282h<tab>` completes a half by its id. In other folders,
# and for options and settings, make completes as before.

_megatron_harness_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)

# Prints the targets, and the prefixes of many, that begin with $1.
_megatron_harness_targets() {
  awk -v typed="$1" '
    function offer(name,    prefix) {
      if (index(name, typed) != 1) return
      prefix = substr(name, 1, index(name, "-"))
      if (prefix == "" || index(typed, prefix) == 1) prefix = name
      names[prefix] = names[prefix] name "\n"
      count[prefix]++
    }
    /^#[a-z]+-101 ## / { variants[substr($1, 2, length($1) - 4)] }
    /^\.PHONY: / { offer($2) }
    /^[a-z0-9][^ ]+: ; .* (run|chapter|data|train) / {
      name = substr($1, 1, length($1) - 1)
      offer(name)
      if ($4 != "run") next
      for (variant in variants) offer(variant $5)
      if (typed ~ /^[0-9][0-9][0-9]h/ && sub(/^half-/, "", name)) offer(name)
    }
    END { for (prefix in count) printf "%s", (count[prefix] > 5 ? prefix "\n" : names[prefix]) }
  ' "$_megatron_harness_root/experiments/targets.mk"
}

# Is word $1 of the command line $2 for this repository's targets?
_megatron_harness_is_target() {
  [[ $PWD == "$_megatron_harness_root" && $1 != -* && $1 != *=* && $2 != *' -'[Cf]* ]]
}

if [[ -n ${ZSH_VERSION:-} ]]; then
  # shellcheck disable=SC2086,SC2154,SC2206,SC2296  # what bash does not know
  _megatron_harness_make() {
    if ! _megatron_harness_is_target "$PREFIX" "${words[*]}"; then
      _make "$@"
      return
    fi
    local found=(${(f)"$(_megatron_harness_targets "$PREFIX")"})
    compadd -S '' -- ${(M)found:#*-}
    compadd -- ${found:#*-}
  }
  compdef _megatron_harness_make make
else
  _megatron_harness_make() {
    if ! _megatron_harness_is_target "$2" "$COMP_LINE"; then
      COMPREPLY=()
      [[ -z $_megatron_harness_before ]] || "$_megatron_harness_before" "$@"
      return
    fi
    mapfile -t COMPREPLY < <(_megatron_harness_targets "$2")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *- ]]; then compopt -o nospace; fi
  }
  # Who completed make before: bash-completion loads its function when it is first asked for it.
  { _comp_load make || _completion_loader make; } >/dev/null 2>&1 || true
  _megatron_harness_before=$(complete -p make 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
  if [[ $_megatron_harness_before == _megatron_harness_make ]]; then _megatron_harness_before=''; fi
  complete -F _megatron_harness_make make
fi
