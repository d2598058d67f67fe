"""Class-conditional models: trained from scratch, and the classifier that checks what they draw."""
