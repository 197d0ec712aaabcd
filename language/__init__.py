"""A language model writes the edits (Sec. 3.1.1)."""
