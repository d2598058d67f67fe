"""A classifier that names object and style of a picture."""
