"""Plan a run in stages: request, resolved, fitted, placed, checked, script. Begin at plan.py."""
