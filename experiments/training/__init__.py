"""The resumable training loop, and tokens learned by textual inversion."""
