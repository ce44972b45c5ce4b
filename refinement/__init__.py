"""Label refinement that is not CLIP's: it needs an image and class probabilities, whoever made them."""
