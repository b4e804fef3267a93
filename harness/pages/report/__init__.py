"""`make report`: one self-contained HTML page of every run and record, without a network."""
