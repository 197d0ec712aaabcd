"""Pages in HTML that a person looks at."""
