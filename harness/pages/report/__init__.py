"""`make report`: one self-contained HTML page of every run and record, readable without a
network."""
