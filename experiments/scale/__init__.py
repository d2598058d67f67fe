"""How fast: engine and scoring against the published recipe done literally."""
