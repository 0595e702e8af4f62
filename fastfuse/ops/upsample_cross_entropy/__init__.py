"""The cross entropy of upsampled logits."""
