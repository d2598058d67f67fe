"""The emoji artwork, built from pinned packages."""
