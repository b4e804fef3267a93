# shellcheck shell=bash
# source scripts/completion.bash        bash; in zsh after: autoload -U bashcompinit && bashcompinit
# `make 282h<tab>` completes the half-size experiment. make's list has it as half-282h-…, so that 282<tab> has one candidate only;
# all else completes as before, by bash-completion where that is installed, else by the targets of this repository.

_megatron_harness_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)

_megatron_harness_make() {
  local cur=${COMP_WORDS[COMP_CWORD]} targets=$_megatron_harness_root/experiments/targets.mk
  COMPREPLY=()
  if [[ $PWD == "$_megatron_harness_root" && $cur =~ ^[0-9]{3}h ]]; then
    while IFS=: read -r target _; do
      [[ $target == "half-$cur"* ]] && COMPREPLY+=("${target#half-}")
    done <"$targets"
  elif [[ -n $_megatron_harness_before ]]; then
    "$_megatron_harness_before" "$@"
  elif [[ $PWD == "$_megatron_harness_root" && -n $cur ]]; then
    while IFS=: read -r target _; do
      [[ $target =~ ^[a-z0-9][A-Za-z0-9._-]*$ && $target == "$cur"* ]] && COMPREPLY+=("$target")
    done < <(cat "$_megatron_harness_root/Makefile" "$targets")
  fi
}

# Who completed make before: bash-completion loads its function when it is first asked for it.
{ _comp_load make || _completion_loader make; } >/dev/null 2>&1 || true
_megatron_harness_before=$(complete -p make 2>/dev/null | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
if [[ $_megatron_harness_before == _megatron_harness_make ]]; then _megatron_harness_before=''; fi
complete -F _megatron_harness_make make
