"""Speed and memory, and the results."""
