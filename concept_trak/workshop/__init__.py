"""Builds or fetches what the house stands on: embedded model, judge, art, tokens, downloads."""
