"""Words learned from pictures."""
