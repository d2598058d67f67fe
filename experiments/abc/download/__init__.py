"""Downloads of the AbC release."""
