"""A web page on which images are generated in their own order, beside other orders."""
