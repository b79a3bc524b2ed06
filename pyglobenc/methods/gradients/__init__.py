"""Methods that read gradients of a logit, and occlusion."""
