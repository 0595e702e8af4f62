"""The class of each pixel of upsampled logits."""
