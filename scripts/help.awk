# Prints the Makefile's targets and settings from their comments: `target: ## what it does  OPTIONS`, `#KEY=value ## what it does`.
# -v last=TITLE ends before that section; -v bold= -v normal= frame the titles.
BEGIN { FS = " ## " }
$0 == "##@ " last { exit }
/^##@ / { print "\n" bold substr($0, 5) normal }
/^[a-z-]+:.* ## / {
  sub(/:.*/, "", $1)
  split($2, said, "  ")
  line = sprintf("  make %-14s %-54s %s", $1, said[1], said[2])
  sub(/ +$/, "", line)
  print line
}
/^#[A-Z_]+=.* ## / { printf "  %-22s %s\n", substr($1, 2), $2 }
