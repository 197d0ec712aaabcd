"""How weights lie on disk."""
