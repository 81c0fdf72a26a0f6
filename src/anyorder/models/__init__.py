"""The tokenizer, the any-order transformer, and the losses of the tokenizer."""
