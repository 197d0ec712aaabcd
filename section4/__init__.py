"""Section 4 of the paper: editors and baselines, measured and compared."""
