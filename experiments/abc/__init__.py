"""AbC: Stable Diffusion v1.4 and its fine-tunes on exemplars, as the paper has it."""
