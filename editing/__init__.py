"""What sample.py needs around an edit."""
