"""The method: order policies, the one decoding loop, sampling and confidence scores, guidance, the loss."""
