"""Where: the sites, heads, norms and dataflow of a backbone, read without changing it."""
