RANGE = "harness: "
STEP = RANGE + "step "
