"""Rows on disk: shards that survive a kill, cached arrays, exports. Knows no model."""
