"""Runs as they happen: started, watched, ended, judged."""
