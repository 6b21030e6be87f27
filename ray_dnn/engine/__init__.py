"""One replica's training: its state, what its virtual workers contribute, and how combined results are applied."""
