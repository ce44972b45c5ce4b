"""Where users of the pytorch-grad-cam package look for its targets."""
