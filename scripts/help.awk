# Prints the help in experiments/targets.mk: `#target ## what it does  SETTINGS` and `#KEY=value ## what it does`, by section.
# -v last=TITLE ends before that section; -v bold= -v normal= frame the titles; -v width= is the terminal's, 0 where there is none.
BEGIN { FS = " ## " }
$0 == "##@ " last { exit }
/^##@ / { if (sections++) print ""; say(substr($0, 5), 6, bold, normal) }
/^#[a-z0-9-]+ ## / {
  split($2, said, "  ")
  line = sprintf("  make %-15s %-54s %s", substr($1, 2), said[1], said[2])
  if (width && length(line) > width) line = sprintf("  make %-15s %s  %s", substr($1, 2), said[1], said[2])
  sub(/ +$/, "", line)
  say(line, 23)
}
/^#[A-Z0-9_]+=.* ## / { say(sprintf("  %-22s %s", substr($1, 2), $2), 25) }

# A line wider than the terminal continues below, indented by `hang`.
function say(line, hang, before, after,    cut) {
  while (width > 2 * hang && length(line) > width) {
    for (cut = width + 1; cut > hang && substr(line, cut, 1) != " "; cut--);
    if (cut <= hang) break
    print before substr(line, 1, cut - 1) after
    line = sprintf("%" hang "s", "") substr(line, cut + 1)
  }
  print before line after
}
