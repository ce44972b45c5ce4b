"""Label refinement from an image and class probabilities, without a network."""
