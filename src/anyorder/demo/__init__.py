"""A web page on which pictures are drawn in their own order, beside other orders."""
