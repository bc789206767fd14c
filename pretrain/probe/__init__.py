"""Linear probes of frozen features and the quality of their units, from TSV files of labels."""
