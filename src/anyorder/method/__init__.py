"""The method: order policies, the one decoding loop, draws and confidence scores, guidance, the loss."""
