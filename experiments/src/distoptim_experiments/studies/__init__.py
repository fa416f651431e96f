"""Tables of papers and figures of our own."""
