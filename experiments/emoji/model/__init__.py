"""The small text-to-image model that the repository embeds."""
