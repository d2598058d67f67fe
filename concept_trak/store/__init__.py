"""Rows on disk: shards that survive a kill, cached arrays. Knows no model."""
