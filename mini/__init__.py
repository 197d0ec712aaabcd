"""The miniature world, end to end."""
